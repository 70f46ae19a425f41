"""No behaviour that is known of real servers is forgotten: the page beside this file names its tests."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = re.findall(r"(?m)^\| ((?:[A-Z]+|5\.)\d+b?) \| (.+?) \| (.+?) \|$", (HERE / "quirks.md").read_text())
NUMBERED = {"G": 14, "M": 15, "Y": 17, "D": 7, "C": 5, "CY": 3, "W": 6, "5.": 26}
SINGLE = {"D3b", "U1", "Q1", "P1", "S1", "GM1", "T1", "H1", "MP1", "GR1", "N1", "O1", "DM1", "PX1", "J1"}
TESTS = set(re.findall(r"(?m)^def (test_\w+)", "".join(path.read_text() for path in HERE.glob("test_*.py"))))


def test_the_page_has_every_quirk_once() -> None:
    known = {f"{letter}{number}" for letter, last in NUMBERED.items() for number in range(1, last + 1)}
    assert sorted(name for name, _, _ in ROWS) == sorted(known | SINGLE)


def test_every_test_on_the_page_exists() -> None:
    named = {test for _, _, shown in ROWS for test in re.findall(r"`(\w+)`", shown)}
    assert named <= TESTS


def test_every_quirk_is_shown_or_says_why_not() -> None:
    silent = [shown for _, _, shown in ROWS if "`" not in shown]
    assert all(shown.startswith(("the caller: ", "no octet differs", "looks as ")) for shown in silent), (
        silent
    )


def test_every_test_that_is_named_after_a_quirk_is_on_the_page() -> None:
    ids = [name.lower().replace(".", "_") for name, _, _ in ROWS]
    named = {test for test in TESTS if any(test.startswith(f"test_{each}_") for each in ids)}
    assert named
    assert {test for test in named if not any(f"`{test}`" in shown for _, _, shown in ROWS)} == set()
