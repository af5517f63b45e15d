"""Videos inside a page: WebM (VP9), which every current browser plays from a data URI."""

import base64
import html
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.train.reporting.page import Html

FRAMES_PER_SECOND = 12


def webm(frames: NDArray[np.uint8], *, quality: int = 24) -> bytes:
    """Encode frames [F, H, W, 3] of even sides; quality is VP9's crf, lower is better."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="webm") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(quality), "b": "0", "deadline": "good", "cpu-used": "4"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def playing(video: bytes, title: str, text: str = "") -> Html:
    """Return a video that plays in a loop, with a title and a line below it."""
    data = base64.b64encode(video).decode()
    return Html(
        f'<figure class="arm"><video autoplay loop muted playsinline controls '
        f'aria-label="{html.escape(title)}" src="data:video/webm;base64,{data}"></video>'
        f"<figcaption><b>{html.escape(title)}</b> {html.escape(text)}</figcaption></figure>"
    )


def side_by_side(*figures: Html) -> Html:
    """Return figures in a grid as wide as the page."""
    return Html('<div class="arms">\n' + "\n".join(figures) + "\n</div>")
