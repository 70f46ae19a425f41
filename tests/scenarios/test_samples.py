"""The samples in the documentation are what the program prints."""

import pytest

from tests.harness import samples


@pytest.mark.slow
@pytest.mark.slow
def test_every_sample_is_what_the_program_prints() -> None:
    outputs = samples.play()
    pages = {str(page.relative_to(samples.DOCS)): page.read_text() for page in samples.pages()}
    unknown = {name: samples.samples(text) - outputs.keys() for name, text in pages.items()}
    assert not any(unknown.values()), f"the story in samples.py does not run these commands: {unknown}"
    stale = {name: found for name, text in pages.items() if (found := samples.stale(text, outputs))}
    assert not stale, f"python -m tests.harness.samples rewrites these: {stale}"


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
