"""The samples in the documentation are what the program prints."""

from pathlib import Path

import pytest

from tests.harness import samples

PAGES = samples.pages()


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    return samples.play()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(samples.DOCS)))
def test_no_sample_of_a_page_is_stale(page: Path, outputs: dict[str, str]) -> None:
    text = page.read_text()
    assert samples.samples(text) <= outputs.keys(), (
        f"{page.name}: the story in samples.py runs no such command"
    )
    assert not samples.stale(text, outputs), (
        f"{page.name} is stale; python -m tests.harness.samples rewrites it"
    )


def test_a_block_is_stale_when_anything_but_times_and_ids_differs() -> None:
    command = "archiver status --json"
    printed = '```json\n{"at": "2026-01-01T00:00:00+00:00", "lost": 0}\n```\n'
    page = f"<!-- sample: {command} -->\n{printed}<!-- end -->\n"
    later = {command: printed.replace("2026-01-01", "2026-02-02")}
    lost = {command: printed.replace("0}", "1}")}
    assert samples.stale(page, later) == []
    assert samples.stale(page, lost) == [command]
    assert '"lost": 1' in samples.rewritten(page, lost)
    assert samples.stale(samples.rewritten(page, lost), lost) == []
