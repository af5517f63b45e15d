"""The fault catalogue: how often each case runs, and the table that `make faults` writes.

`@pytest.mark.case("F1")` on any test of the tree names its case, `control=True` a test that breaks
the protection and requires that the case notices. Counts are short unless the variable FAULTS asks
for more: `full`, or a list such as `F1,F4:40` of cases in full or with a count of their own.
"""

import datetime
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
ASKED = os.environ.get("FAULTS", "")


def how_often(case: str, short: int, full: int) -> int:
    """Return how often a case runs."""
    if ASKED == "full":
        return full
    asked = dict(part.partition(":")[::2] for part in ASKED.split(",") if part)
    return int(asked[case] or full) if case in asked else short


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Iterator[Callable[[int, int], Iterator[int]]]:
    """Return a function of the short and full count that gives the numbers of the rounds."""
    done: dict[str, Any] = {"count": 0, "full": 0, "passed": 0}

    def count(short: int, full: int) -> Iterator[int]:
        often = how_often(request.node.get_closest_marker("case").args[0], short, full)
        done["count"], done["full"] = often, full
        for number in range(often):
            yield number
            done["passed"] += 1

    yield count
    request.node.user_properties.append(("rounds", done))


@pytest.fixture
def injection() -> Callable[[str], str]:
    """Return a function: name in injections.py -> what the launcher takes to inject it."""
    return lambda name: f"{HERE / 'injections.py'}:{name}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("case"):
            is_control = bool(mark.kwargs.get("control"))
            item.user_properties.append(("case", (list(mark.args), is_control)))


_reports: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    properties = dict(report.user_properties)
    if not ASKED or "case" not in properties:
        return
    row = _reports.setdefault(report.nodeid, {"seconds": 0.0, "failed": False, "ran": False})
    row |= properties
    row["seconds"] += report.duration if report.when == "call" else 0
    row["failed"] |= report.failed
    row["ran"] |= report.when == "call" and not report.skipped


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _reports and not hasattr(session.config, "workerinput"):
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        name = f"faults_{machine.lower().replace(' ', '-')}_{datetime.date.today()}.md"
        (RESULTS / name).write_text(table(machine))


def table(machine: str) -> str:
    """Return the results as Markdown, one row a case."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for report in _reports.values():
        cases, control = report["case"]
        for case in cases:
            rows.setdefault(case, []).append({**report, "control": control})
    lines = [
        "# Fault injection",
        "",
        f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, commit {commit()}, {machine},",
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}.",
        f"Written by `make faults FAULTS={ASKED}`; the cases are those of tests/faults/README.md.",
        "A control breaks the protection; it passes when the case notices.",
        "",
        "| case | tests | rounds | of full | passed | controls noticed | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(case, rows[case]) for case in sorted(rows, key=_order)]
    return "\n".join(lines) + "\n"


def _row(case: str, found: list[dict[str, Any]]) -> str:
    tests = [one for one in found if not one["control"]]
    controls = [one for one in found if one["control"]]
    ran = [one for one in tests if one["ran"] or one["failed"]]
    single = {"count": 1, "full": 1}
    counts = [one.get("rounds", {**single, "passed": int(not one["failed"])}) for one in ran]
    count, full, passed = (sum(one[key] for one in counts) for key in ("count", "full", "passed"))
    noticed = f"{sum(not one['failed'] for one in controls)} of {len(controls)}"
    seconds = sum(one["seconds"] for one in found)
    skipped = f" ({len(tests) - len(ran)} not run here)" if len(ran) < len(tests) else ""
    return (
        f"| {case} | {len(tests)}{skipped} | {count} | {full} | {passed} | "
        f"{noticed if controls else '-'} | {seconds:.0f} |"
    )


def _order(case: str) -> tuple[str, int]:
    return case.rstrip("0123456789"), int("".join(filter(str.isdigit, case)) or 0)


def commit() -> str:
    """Return what git says, or the variable COMMIT where the tree is a copy."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    said = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return said or os.environ.get("COMMIT", "unknown")
