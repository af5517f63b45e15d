"""What the documentation lists is what there is."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def test_every_allocation_is_explained_and_counted():
    names = {path.stem for path in (ROOT / "conf" / "allocation").glob("*.yaml")}
    table = (ROOT / "docs" / "concepts.md").read_text().partition("| `allocation` |")[2]
    rows = re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE)
    assert set(rows) == names and len(rows) == len(names)
    others = f"(or {NUMBERS[len(names) - 1]} other ways)"
    assert others in (ROOT / "README.md").read_text()


def test_the_page_on_families_names_all_that_is_looked_for_in_one():
    text = (ROOT / "docs" / "adding_a_model.md").read_text()
    looked_for = re.findall(
        r"family\w*(?:\(\w+\))?\.(\w+)|hasattr\(family\w*(?:\(\w+\))?, \"(\w+)\"\)",
        "".join((ROOT / "sparse" / name).read_text() for name in ("attach.py", "install.py")),
    )
    assert len(looked_for) > 5
    for name in {a or b for a, b in looked_for}:
        assert f"`{name}" in text, name
