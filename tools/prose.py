#!/usr/bin/env python3
"""Checks the project's English: words to avoid, and sentences that are too long.

Reads documentation, and the comments, docstrings and messages of code. The
words, the limits and the paths are in ``prose.toml``, the reasons in
``docs/style.md``. Prints ``path:line``, what is wrong and what to write
instead, and exits with 1 if it printed anything.

Leaves to people whether a text is clear: it finds only what a pattern can.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
CONFIG = Path(__file__).with_suffix(".toml")

FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"<!-- (sample|usage|settings|metrics): .*?<!-- end -->", re.DOTALL)
HIDDEN = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"(`+)[^`]+?\1")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)\s]*\)|<https?:[^>]+>")
BULLET = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
END_OF_SENTENCE = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9`])")
SQL = re.compile(r"\b(SELECT|INSERT|UPDATE|CREATE|ALTER|WHERE|VALUES|RETURNING)\b")
DIRECTIVE = re.compile(r"!|\s*(noqa|type:|pragma|syntax=)")


class Text(NamedTuple):
    """A paragraph, list item, table cell, comment, message or sentence, and where it begins."""

    line: int
    words: str
    is_prose: bool = True
    """False for a line of code, whose length means nothing."""


class Problem(NamedTuple):
    line: int
    what: str
    instead: str


def markdown(source: str) -> Iterator[Text]:
    """The paragraphs, headings, list items and table cells of a page, without its code."""
    for hidden in (GENERATED, FENCE, HIDDEN):
        source = hidden.sub(lambda found: "\n" * found[0].count("\n"), source)
    paragraph: list[str] = []
    for number, raw in enumerate([*_plain(source).split("\n"), ""], 1):
        line = raw.lstrip("> ")
        is_alone = line.startswith(("#", "|"))
        if paragraph and (is_alone or not line.strip() or BULLET.match(line)):
            yield Text(number - len(paragraph), "\n".join(paragraph))
            paragraph = []
        if is_alone:
            yield from (Text(number, cell.strip()) for cell in line.strip("#| ").split("|"))
        elif line.strip():
            paragraph.append(BULLET.sub("", line))


def python(source: str) -> Iterator[Text]:
    """The docstrings of a module, its strings of more than one word, and its comments."""
    tree = ast.parse(source)
    inner = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
            value = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            value = node.value
        else:
            continue
        if " " in value.strip() and not SQL.search(value):
            yield from _moved(node.lineno, markdown(value))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (token for token in tokens if token.type == tokenize.COMMENT)
    yield from _comments({comment.start[0]: comment.string[1:] for comment in comments})


def other(source: str) -> Iterator[Text]:
    """The comments of any other file, which begin with #, and its other lines, one by one."""
    lines = dict(enumerate(source.split("\n"), 1))
    marked = {number: line.lstrip()[1:] for number, line in lines.items() if line.lstrip().startswith("#")}
    yield from _comments(marked)
    yield from (Text(number, _plain(line), False) for number, line in lines.items() if number not in marked)


def sentences(text: Text) -> Iterator[Text]:
    start = 0
    for end in [*(found.end() for found in END_OF_SENTENCE.finditer(text.words)), len(text.words)]:
        yield Text(text.line + text.words.count("\n", 0, start), text.words[start:end].strip())
        start = end


def length(sentence: Text) -> int:
    """The number of words; a code span is one."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.words.split())


def percentile(lengths: list[int]) -> int:
    """The length that nine of ten sentences do not exceed."""
    return sorted(lengths)[int(len(lengths) * 0.9)] if lengths else 0


def check(name: str, source: str, config: dict[str, Any]) -> list[Problem]:
    """Find the problems of one file, by line. Its name decides how it is read."""
    suffix = Path(name).suffix
    limits, found, lengths = config["limits"], list[Problem](), list[int]()
    phrases = config["phrases"] | (config["documentation"] if suffix == ".md" else {})
    for text in {".md": markdown, ".txt": markdown, ".py": python}.get(suffix, other)(source):
        for match, instead in _matches(phrases, r"\b(?:{})(?!\w)", text.words):
            line = text.line + text.words.count("\n", 0, match.start())
            found.append(Problem(line, f'"{" ".join(match[0].split())}"', instead))
        for sentence in sentences(text) if text.is_prose else ():
            lengths.append(length(sentence))
            for match, instead in _matches(
                config["openings"], r"\A\W*(?:{})\b(?=[^?]*[.:;]\W*\Z)", sentence.words
            ):
                found.append(Problem(sentence.line, f'"{match[0]} ..."', instead))
            if lengths[-1] > limits["sentence_words"]:
                what = f"a sentence of {lengths[-1]} words"
                found.append(Problem(sentence.line, what, f"two, of {limits['sentence_words']} at most"))
    reached = percentile(lengths) if suffix == ".md" and len(lengths) >= limits["page_sentences"] else 0
    if reached >= limits["page_percentile_words"]:
        found.append(Problem(1, f"one sentence in ten has {reached} words or more", "shorter ones"))
    return sorted(found)


def main(arguments: list[str], root: Path = ROOT, config_file: Path = CONFIG) -> int:
    parser = argparse.ArgumentParser(description="Check the project's English. docs/style.md has the rules.")
    parser.add_argument("paths", nargs="*", help="check only files below these, on the to-do list or not")
    parser.add_argument("--shrink", action="store_true", help="take files that are clean off the to-do list")
    options = parser.parse_args(arguments)
    config = tomllib.loads(config_file.read_text())
    checked, todo = config["check"], dict.fromkeys(config["todo"]["paths"], 0)
    complaints: list[str] = []
    for path in sorted({path for pattern in checked["paths"] for path in root.glob(pattern)}):
        name = str(path.relative_to(root))
        if path.is_symlink() or not path.is_file() or name in checked["skip"]:
            continue
        problems = check(name, path.read_text(), config)
        waiting = [start for start in todo if name.startswith(start)]
        for start in waiting:
            todo[start] += len(problems)
        if name.startswith(tuple(options.paths)) if options.paths else not waiting:
            complaints += (f"{name}:{line}: {what}; better: {instead}" for line, what, instead in problems)
    clean = [start for start, count in todo.items() if not count]
    if options.shrink:
        kept = [line for line in config_file.read_text().splitlines(True) if line.strip(' ",\n') not in clean]
        config_file.write_text("".join(kept))
    elif not options.paths:
        complaints += (
            f"{config_file.name}: {start} is clean: run tools/prose.py --shrink" for start in clean
        )
    sys.stdout.writelines(f"{complaint}\n" for complaint in complaints)
    return 1 if complaints else 0


def _matches(rules: dict[str, str], form: str, words: str) -> Iterator[tuple[re.Match[str], str]]:
    for phrase, instead in rules.items():
        for match in re.finditer(form.format(phrase.replace(" ", r"\s+")), words, re.IGNORECASE):
            yield match, instead


def _comments(lines: dict[int, str]) -> Iterator[Text]:
    """Comments by line number; those of adjacent lines are one text."""
    together: list[str] = []
    for number, line in sorted(lines.items()):
        together.append("" if DIRECTIVE.match(line) else line)
        if number + 1 not in lines:
            yield from _moved(number - len(together) + 1, markdown("\n".join(together)))
            together = []


def _moved(first: int, texts: Iterator[Text]) -> Iterator[Text]:
    return (text._replace(line=first + text.line - 1) for text in texts)


def _plain(source: str) -> str:
    """A code span becomes one word, and a link what a reader sees of it."""
    spans = CODE.sub(lambda found: "X" + "\n" * found[0].count("\n"), source)
    return LINK.sub(lambda found: found[1] or "X", spans)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
