"""A short run of the fuzzer, and everything that it ever found. The long one is ``tests.fuzz.wire``."""

from pathlib import Path

import pytest

from tests.fuzz.wire import CORPUS, TARGETS, block, check, fuzz

SECONDS_EACH = 30.0


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_is_in_the_corpus_holds(path: Path) -> None:
    check(path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_nothing_is_found_in_a_short_run(target: str) -> None:
    assert fuzz(SECONDS_EACH, target=target) > 0


def test_the_slow_reader_reads_as_the_standard_says() -> None:
    assert block(b"a\r\n..b\r\n.c\r\n.\r\nrest") == b"a\r\n.b\r\nc\r\n"
    assert block(b".\r\n") == b""
    assert block(b"a\n.\n") is None
