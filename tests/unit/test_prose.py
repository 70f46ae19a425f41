"""The checker of the project's English: what it finds, where, and how its to-do list shrinks."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tools import prose

CONFIG: dict[str, Any] = {
    "limits": {"sentence_words": 12, "page_percentile_words": 8, "page_sentences": 3},
    "phrases": {"nobody|somebody": "name the role", "so many": "this many"},
    "openings": {"who": "name the role", "what (is|was)": "name the subject"},
    "documentation": {"octets?": "bytes"},
}

TOML = """
[limits]
sentence_words = 12
page_percentile_words = 8
page_sentences = 3

[check]
paths = ["*.md", "code/*.py"]
skip = ["skipped.md"]

[todo]
paths = [
    "later.md",
    "code/",
]

[phrases]
'nobody' = 'name the role'

[openings]

[documentation]
"""


def found(name: str, source: str) -> list[tuple[int, str]]:
    return [(line, what) for line, what, _ in prose.check(name, source, CONFIG)]


def test_a_phrase_is_found_with_its_line_and_what_to_write_instead() -> None:
    assert prose.check("a.md", "One.\n\nHere nobody\nreads.\n", CONFIG) == [(3, '"nobody"', "name the role")]


def test_a_phrase_may_run_over_a_line_break_and_begin_with_a_capital() -> None:
    assert found("a.md", "It takes so\nmany.\n\nNobody reads.\n") == [(1, '"so many"'), (4, '"Nobody"')]


def test_part_of_a_word_is_no_phrase() -> None:
    assert found("a.md", "It is also manyfold.\n") == []


@pytest.mark.parametrize(
    "source",
    [
        "```console\n$ nobody\n```\n",
        "- A list:\n\n  ```\n  nobody\n  ```\n",
        "The user `nobody` and ``nobody``.\n",
        "See [the page](nobody.md).\n",
        "<!-- nobody -->\n",
        "<!-- usage: archiver sync -->\nnobody\n<!-- end -->\n",
    ],
)
def test_code_links_and_remarks_of_a_page_are_not_its_prose(source: str) -> None:
    assert found("a.md", source) == []


def test_lines_are_counted_through_code() -> None:
    assert found("a.md", "```\nx\ny\n```\n\nnobody\n") == [(6, '"nobody"')]


def test_cells_and_list_items_are_sentences_by_themselves() -> None:
    seven = "one two three four five six seven"
    assert found("a.md", f"| {seven} | {seven} |\n\n- {seven}\n- {seven}\n") == []


def test_a_long_sentence_is_found_where_it_begins() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve\nthirteen"
    assert found("a.md", f"Short,\nyes. O{long[1:]}.\n") == [(2, "a sentence of 13 words")]


def test_a_code_span_is_one_word() -> None:
    assert (
        found("a.md", "Run `archiver account edit sales --password-file FILE --tls none` as root today.\n")
        == []
    )


def test_a_page_of_sentences_below_the_limit_may_still_be_too_dense() -> None:
    nine = "One two three four five six seven eight nine."
    assert found("a.md", f"{nine} {nine} {nine}\n") == [(1, "one sentence in ten has 9 words or more")]
    assert found("a.md", f"{nine} {nine}\n") == []
    assert found("a.py", f'"""{nine} {nine} {nine}"""\n') == []


def test_a_sentence_without_a_subject_is_found_and_a_question_is_not() -> None:
    assert found("a.md", "Who loses it pays. Who pays? What was lost stays lost.\n") == [
        (1, '"What was ..."'),
        (1, '"Who ..."'),
    ]
    assert found("a.md", "# What is archived\n") == []


def test_some_words_are_only_for_code() -> None:
    assert found("a.md", "Two octets.\n") == [(1, '"octets"')]
    assert found("a.py", "# Two octets.\n") == []


def test_docstrings_comments_and_messages_of_a_module_are_read() -> None:
    source = '''"""A module.

That nobody reads.
"""

x = 1
"""Read by nobody."""


def nobody() -> str:
    # Here
    # nobody looks.
    y = nobody["nobody"]  # nobody
    return f"{y} is nobody for {x}" + "nobody else"
'''
    assert found("a.py", source) == [(line, '"nobody"') for line in (3, 7, 12, 13, 14, 14)]


def test_sql_and_directives_are_not_read() -> None:
    source = 'x = "SELECT so many FROM y WHERE z"  # noqa: nobody\n'
    assert found("a.py", source) == []


def test_other_files_are_read_line_by_line_and_their_comments_as_sentences() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert found("a.yaml", f"# Where nobody\n# looks.\nkey: {long}\nhelp: nobody\n") == [
        (1, '"nobody"'),
        (4, '"nobody"'),
    ]
    assert found("a.yaml", f"# {long}\n") == [(1, "a sentence of 13 words")]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "prose.toml").write_text(TOML)
    (tmp_path / "now.md").write_text("Clean.\n")
    (tmp_path / "skipped.md").write_text("nobody\n")
    (tmp_path / "later.md").write_text("nobody\n")
    (tmp_path / "code" / "clean.py").write_text("")
    (tmp_path / "code" / "later.py").write_text("# nobody\n")
    return tmp_path


def run(tree: Path, *arguments: str) -> int:
    return prose.main(list(arguments), tree, tree / "prose.toml")


def test_what_is_still_to_do_or_skipped_does_not_fail(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree) == 0
    assert capsys.readouterr().out == ""


def test_what_is_not_on_the_list_fails(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "now.md").write_text("For nobody.\n")
    assert run(tree) == 1
    assert capsys.readouterr().out == 'now.md:1: "nobody"; better: name the role\n'


def test_named_paths_are_checked_though_they_are_on_the_list(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "now.md").write_text("For nobody.\n")
    assert run(tree, "code") == 1
    assert capsys.readouterr().out == 'code/later.py:1: "nobody"; better: name the role\n'


def test_the_list_must_shrink(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "later.md").write_text("Clean.\n")
    assert run(tree) == 1
    assert capsys.readouterr().out == "prose.toml: later.md is clean: run tools/prose.py --shrink\n"

    assert run(tree, "--shrink") == 0
    assert '"later.md"' not in (tree / "prose.toml").read_text()
    assert '"code/"' in (tree / "prose.toml").read_text()
    assert run(tree) == 0


def test_a_path_on_the_list_that_is_gone_counts_as_clean(tree: Path) -> None:
    (tree / "later.md").unlink()
    assert run(tree) == 1
    assert run(tree, "--shrink") == 0
    assert run(tree) == 0


def test_the_rules_of_the_project_can_be_applied() -> None:
    rules = tomllib.loads(prose.CONFIG.read_text())
    assert [what for _, what, _ in prose.check("a.md", "Nobody is told anew. There is none.", rules)] == [
        '"Nobody"',
        '"anew"',
        '"is told"',
    ]
    long = " ".join(["word"] * (rules["limits"]["sentence_words"] + 1))
    assert [what for _, what, _ in prose.check("a.md", f"{long}.", rules)] == ["a sentence of 41 words"]
