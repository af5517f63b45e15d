"""The table of README.md names every case, and every file that it names holds the case."""

import re
from pathlib import Path

HERE = Path(__file__).parent
CASES = {
    f"{kind}{n}" for kind, last in (("F", 12), ("R", 7), ("N", 14)) for n in range(1, last + 1)
}
CASES |= {f"C{n}" for n in range(5, 13)} | {"SOAK"}
ELSEWHERE = {"F10", "N9"}  # nothing to test; a tool of the GPU machine


def rows() -> dict[str, list[str]]:
    """Return case -> the test files named for it, without folder tests/ and ending."""
    lines = [line for line in (HERE / "README.md").read_text().splitlines() if line[:3] != "| c"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    return {row[0]: re.findall(r"\w+/test_\w+", row[2]) for row in cells if row[0] != "---"}


def marks(file: str) -> set[str]:
    """Return the cases that a test file marks."""
    text = (HERE.parent / f"{file}.py").read_text()
    found = re.findall(r'@pytest\.mark\.case\(((?:"\w+"(?:, )?)+)', text)
    return {case for marks in found for case in re.findall(r"\w+", marks)}


def test_every_case_of_the_catalogue_is_in_the_table() -> None:
    assert rows().keys() >= CASES


def test_every_file_named_for_a_case_marks_it() -> None:
    for case, files in rows().items():
        assert bool(files) is (case not in ELSEWHERE), case
        assert all(case in marks(file) for file in files), (case, files)
