"""Pieces of a report in HTML: one self-contained page that opens from a file, dark or light."""

import base64
import html
import struct
from collections.abc import Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2024; --soft: #5b6470;
  --line: #d9dee4; --panel: #f4f6f8; --accent: #0067a5; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9aa4af;
  --line: #333a42; --panel: #1d2126; --accent: #6db9ef; } }
body { margin: 0 auto; max-width: 58rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0; }
a { color: var(--accent); }
.lead { font-size: 1.15rem; padding: .8rem 1rem; background: var(--panel);
  border-left: 4px solid var(--accent); }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .7rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .3rem; }
th, td { text-align: left; padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; }
td { white-space: nowrap; }
td:last-child { white-space: normal; min-width: 7rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; display: block; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--panel); padding: .8rem; overflow-x: auto; font-size: .85rem; }
.arms { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem; }
.arm { margin: 0; }
video { width: 100%; display: block; }
@media (prefers-reduced-motion: reduce) { .moving { display: none; } }
"""
SCREEN_DPI, IMAGE_DPI = 96, 144


class Html(str):
    """Text that is already HTML; every other string is escaped where it enters the page."""


def escape(value: object) -> Html:
    """Return the value as HTML."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def document(title: str, subtitle: str, sections: Sequence[Html]) -> Html:
    """Return the whole page."""
    return Html(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n'
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: Html) -> Html:
    """Return a section with its heading."""
    return Html(f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>")


def heading(text: str) -> Html:
    """Return a heading inside a section."""
    return Html(f"<h3>{escape(text)}</h3>")


def paragraph(text: str, style: str = "") -> Html:
    """Return a paragraph; style is "", "lead" or "soft"."""
    return Html(f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>")


def table(head: Sequence[object], rows: Sequence[Sequence[object]], caption: str = "") -> Html:
    """Return a table whose first cell of each row is the row's heading."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll"><table>{below}<thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def details(summary: str, *parts: Html) -> Html:
    """Return parts folded away behind a summary line."""
    return Html(
        f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"
    )


def preformatted(text: str) -> Html:
    """Return text as it is written, in a fixed-width box."""
    return Html(f"<pre>{escape(text)}</pre>")


def link(text: str, target: str) -> Html:
    """Return a link to a file of this machine; the target is already a valid relative URL."""
    return Html(f'<a href="{html.escape(target)}">{escape(text)}</a>')


def plot(path: Path, alt: str) -> Html:
    """Return the plot of this path inlined, with the `-dark` file beside it for dark screens."""
    dark = path.with_stem(path.stem + "-dark")
    width = struct.unpack(">I", path.read_bytes()[16:20])[0] * SCREEN_DPI // IMAGE_DPI
    return Html(
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
        f'<img src="{_inline(path)}" width="{width}" alt="{html.escape(alt)}">'
        "</picture></figure>"
    )


def image(path: Path, alt: str, *, moving: bool = False) -> Html:
    """Return one picture inlined; a moving one is hidden from readers who asked for no motion."""
    style = ' class="moving"' if moving else ""
    return Html(f'<figure{style}><img src="{_inline(path)}" alt="{html.escape(alt)}"></figure>')


def _inline(path: Path) -> str:
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
