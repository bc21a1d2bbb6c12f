"""Every fault that each commit has to survive has a law that says so, and the table of docs/reliability knows it."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
EACH_COMMIT = (1, 3, 6, 11, 14, 17, 18, 20, 23, 27, 29, 30, 33, 36, 37, 40)
MARK = re.compile(r'pytest\.mark\.fault\("F(\d+)"\)')


def marked() -> set[int]:
    found = set()
    for path in TESTS.rglob("test_*.py"):
        found |= {int(number) for number in MARK.findall(path.read_text(encoding="utf-8"))}
    return found


def test_every_fault_of_each_commit_has_a_law() -> None:
    assert set(EACH_COMMIT) - marked() == set()


def test_the_table_of_promises_names_every_fault_that_has_a_law_and_files_that_exist() -> None:
    page = (TESTS.parent / "docs" / "reliability" / "README.md").read_text(encoding="utf-8")
    rows = {int(number) for row in re.findall(r"^\| (F[^|]+) \|", page, re.M) for number in re.findall(r"\d+", row)}
    assert marked() - rows == set()
    for path in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (TESTS.parent / path).exists(), path
