"""Text of strangers on a terminal, in the log and over HTTP."""

import json
import os
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archiver import observe
from archiver.cli import output
from archiver.errors import OperatorNeeded
from archiver.printable import printable
from archiver.web.problems import problem

HOSTILE = (
    *("\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\x90q\x9c", "\x00", "\x7f", "\b\b\b", "good\rbad"),
    *(
        "\u202egnp.exe",
        "\u2066a\u2069",
        "\u200f",
        "\ufeff",
        "\u200b",
        "\U000e0041",
        "\u2028",
        "\x85",
        "\udc9b",
    ),
)
"""ANSI escapes by seven and by eight bits, overwriting, bidirectional overrides, what is invisible."""


def harmless(text: str) -> bool:
    kinds = {unicodedata.category(each) for each in text if each not in "\n\t"}
    return kinds.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"})


@given(st.text(st.characters()) | st.sampled_from(HOSTILE))
def test_nothing_that_acts_is_left_and_a_second_time_changes_nothing(text: str) -> None:
    made = printable(text)
    assert harmless(made)
    assert printable(made) == made
    made.encode()


@pytest.mark.parametrize(
    "text", ["", "Größe 5 €", "日本語", "שלום", "مرحبا", "a\tb\nc", "a\u00a0b", "👍", "back\\slash"]
)
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_commands_show_it_escaped(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = output.table("a")
    made.add_row(text)
    output.show(made)
    output.say(text)
    output.note(text)
    output.complain(OperatorNeeded(f"said {text}", hint=text))
    output.emit({"text": text})
    shown = capsys.readouterr()
    assert harmless(shown.out)
    assert harmless(shown.err)
    assert printable(text) in shown.out


@pytest.mark.parametrize("text", HOSTILE)
def test_an_answer_over_http_is_ascii(text: str) -> None:
    content = bytes(problem(404, text).body)
    assert content.isascii()
    assert json.loads(content)["detail"] == text


def test_a_traceback_in_the_log_is_escaped() -> None:
    read, write = os.pipe()
    lines = observe.Lines(write, lambda _: None)
    print(*HOSTILE, file=lines)
    lines.drain()
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as reader:
        assert harmless(reader.read())
    assert sys.stderr is not lines
