"""The documentation against the code: everything is documented, nothing else is, and links are valid."""

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import prometheus_client
import pytest
import typer
from typer.core import TyperGroup, TyperOption

from archiver import observe, settings, states
from archiver.cli import app
from tests.harness import layers, samples

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
COMMANDS = (DOCS / "reference" / "commands.md").read_text()
EVENTS = (DOCS / "reference" / "events-and-metrics.md").read_text()
SETTINGS = (DOCS / "reference" / "settings.md").read_text()
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "helm/**/*.md")
    for page in REPOSITORY.glob(pattern)
    if not page.is_symlink()
)

DECISIONS = sorted((DOCS / "decisions").glob("[0-9]*.md"))

SETTING_NAMES = {f"{settings.PREFIX}{name}".upper() for name in settings.Settings.model_fields}
SETTING_NAMES.add(settings.CONFIG)
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical"}

FENCE = re.compile(r"^(?P<fence>```+).*?^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)


def commands(command: Any, words: tuple[str, ...] = ("archiver",)) -> Iterator[tuple[str, Any]]:
    """All commands and groups, by their full names."""
    yield " ".join(words), command
    if isinstance(command, TyperGroup):
        for name, inner in command.commands.items():
            yield from commands(inner, (*words, name))


TREE = dict(commands(typer.main.get_command(app)))


def options(command: Any) -> set[str]:
    """The long options of a command."""
    return {
        name
        for parameter in command.params
        if isinstance(parameter, TyperOption)
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--") and name != "--help"
    }


def sections(text: str) -> dict[str, str]:
    """The text below each heading, up to the next heading of any level."""
    parts = re.split(r"^#+ +(.+?)\s*$", FENCE.sub("", text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


SECTIONS = sections(COMMANDS)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text())):
        text = re.sub(r"[^\w\- ]", "", re.sub(LINK, "", heading).lower())
        anchor = candidate = text.replace(" ", "-")
        times = 0
        while candidate in found:
            times += 1
            candidate = f"{anchor}-{times}"
        found.add(candidate)
    return found


def prose(page: Path) -> str:
    """A page without its code, in which brackets and parentheses are not links."""
    return CODE.sub("", FENCE.sub("", page.read_text()))


def called(page: Path) -> Iterator[str]:
    """The words after ``archiver`` in the commands of a page: in code spans, and after a prompt."""
    text = page.read_text()
    for span in CODE.findall(FENCE.sub("", text)):
        yield from re.findall(r"(?:^|/|python -m )archiver( .+)$", span.strip("`"))
    for block in FENCE.finditer(text):
        lines = re.sub(r"\\\n\s*", "", block[0]).splitlines()
        for line in lines:
            # After a prompt, or as the command that another one runs (kubectl exec ... -- archiver).
            yield from re.findall(r"(?:^\$ (?:time )?(?:\S*/)?|-- )archiver( [^|#]+)", line)


def resolved(words: list[str]) -> tuple[str, list[str]]:
    """The command that these words name, and the remaining words."""
    name = "archiver"
    while words and isinstance(TREE[name], TyperGroup) and not words[0].startswith("-"):
        name = f"{name} {words[0]}"
        if name not in TREE:
            return name, words
        words = words[1:]
    return name, words


def log_events() -> set[str]:
    """The first argument of every logging call in the source."""
    found: set[str] = set()
    for path in sorted((REPOSITORY / "archiver").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            event = str(node.args[0].value)
            match node.func:
                case ast.Attribute(value=ast.Name(id="log" | "_log"), attr=method) if method in LOG_METHODS:
                    found.add(event)
                case ast.Attribute(value=ast.Attribute(attr="log"), attr=method) if method in LOG_METHODS:
                    found.add(event)
                case ast.Attribute(value=ast.Call(func=ast.Attribute(attr="get_logger")), attr=method) if (
                    method in LOG_METHODS
                ):
                    found.add(event)
                case ast.Name(id="say") if re.fullmatch(r"[a-z]+\.[a-z_]+", event):
                    found.add(event)
    return found


def metrics() -> set[str]:
    """The metrics of observe.py, by the names that Prometheus sees."""
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for metric in vars(observe).values()
        if isinstance(metric, prometheus_client.metrics.MetricWrapperBase)
        for family in metric.collect()
    }


def documented_metrics() -> set[str]:
    return set(re.findall(r"^\| `(archiver_\w+)` \|", EVENTS.split("## Metrics")[1], re.MULTILINE))


def documented_events() -> set[str]:
    table = EVENTS.split("## Log events")[1].split("### ")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("name", sorted(set(TREE) - {"archiver"}))
def test_every_command_has_its_section(name: str) -> None:
    assert name in SECTIONS, f"docs/reference/commands.md has no heading {name!r}"


@pytest.mark.parametrize("name", sorted(name for name in TREE if options(TREE[name]) and name != "archiver"))
def test_every_option_is_in_its_commands_section(name: str) -> None:
    documented = set(re.findall(r"--[a-z][a-z-]*", SECTIONS[name]))
    assert options(TREE[name]) <= documented, (
        f"docs/reference/commands.md does not list all options of {name!r}"
    )


def test_the_options_of_the_program_itself_are_documented() -> None:
    assert options(TREE["archiver"]) <= set(re.findall(r"--[a-z][a-z-]*", COMMANDS))


def test_every_section_is_about_a_command_that_exists() -> None:
    documented = {heading for heading in SECTIONS if heading.startswith("archiver ")}
    assert documented <= set(TREE)


@pytest.mark.parametrize("page", samples.pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_no_generated_table_is_stale(page: Path) -> None:
    stale = samples.stale(page.read_text(), {})
    assert not stale, f"{page.name}: python -m tests.harness.samples rewrites it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_on_a_page_exists(page: Path) -> None:
    for line in called(page):
        name, left = resolved(line.split())
        assert name in TREE, f"{page.name}: there is no command {name!r}"
        documented = {word.partition("=")[0] for word in left if word.startswith("--") and word != "--help"}
        assert documented <= options(TREE[name]), f"{page.name}: {name} has no such option"


@pytest.mark.parametrize("page", samples.pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_every_field_of_a_json_sample_is_described_on_its_page(page: Path) -> None:
    text = page.read_text()
    described = set(re.findall(r"`(?:\w+\.)?([a-z_0-9]+)`", samples.BLOCK.sub("", text)))
    for block in samples.BLOCK.finditer(text):
        if "```json" in block["body"]:
            fields = set(re.findall(r'"([a-z_0-9]+)": ', block["body"]))
            assert fields <= described, f"{page.name}: {block['command']}"


def test_every_setting_is_documented() -> None:
    documented = set(re.findall(r"^\| `(ARCHIVER_\w+)` \|", SETTINGS, re.MULTILINE))
    assert documented == SETTING_NAMES


def test_every_default_is_documented_correctly() -> None:
    rows = re.findall(r"^\| `ARCHIVER_(\w+)` \| (?:`([^`]+)`|(unset)) \|", SETTINGS, re.MULTILINE)
    documented = {
        name.lower(): value or None for name, value, _ in rows if f"ARCHIVER_{name}" != settings.CONFIG
    }
    fields = settings.Settings.model_fields
    actual = {name: fields[name].default for name in fields}
    shown = {name: None if value is None else str(value).removesuffix(".0") for name, value in actual.items()}
    assert documented == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    assert set(re.findall(r"\bARCHIVER_[A-Z0-9_]*[A-Z0-9]", page.read_text())) <= SETTING_NAMES


def test_exactly_the_metrics_that_exist_are_documented() -> None:
    assert documented_metrics() == metrics()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_metric_that_a_page_names_exists(page: Path) -> None:
    assert set(re.findall(r"\barchiver_[a-z]\w*", page.read_text())) <= metrics()


def test_exactly_the_log_events_that_exist_are_documented() -> None:
    assert documented_events() == log_events()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_relative_link_is_valid(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(REPOSITORY), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_decision_is_listed() -> None:
    folder = DOCS / "decisions"
    pages = {page.name for page in folder.glob("[0-9]*.md")}
    assert set(LINK.findall((folder / "README.md").read_text())) == pages
    for name in pages:
        assert (folder / name).read_text().startswith(f"# {name[:4]}: ")


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_every_decision_has_a_status_a_date_and_its_sections(page: Path) -> None:
    text = page.read_text()
    status = r"Status: (accepted|replaced by \[\d{4}\]\(\d{4}[\w.-]+\)), \d{4}-\d{2}-\d{2}"
    assert re.fullmatch(status, text.splitlines()[2])
    assert {"Decision", "Why", "Costs", "Rejected"} <= set(sections(text))


def test_the_diagram_of_the_layers_matches_the_import_contract() -> None:
    page = layers.PAGE.read_text()
    assert layers.written(page) == page, "run python -m tests.harness.layers"


def test_the_layout_names_every_module() -> None:
    listing = (REPOSITORY / "CONTRIBUTING.md").read_text().split("```\narchiver/\n")[1].split("```")[0]
    named = set(re.findall(r"^  ([a-z0-9_]+)(?:/|\.py) ", listing, re.MULTILINE))
    modules = {
        path.stem
        for path in (REPOSITORY / "archiver").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and not path.name.startswith("__")
    }
    assert named == modules


@pytest.mark.parametrize(
    "lawful",
    [states.ACCOUNT_TRANSITIONS, states.SIGHTING_TRANSITIONS, states.LEASE_TRANSITIONS],
    ids=lambda lawful: type(next(iter(lawful))).__name__,
)
def test_the_diagrams_of_states_have_the_lawful_transitions(lawful: Mapping[str, Collection[str]]) -> None:
    arrows = re.findall(r"^ +(\w+) --> (\w+):", (DOCS / "concepts.md").read_text(), re.MULTILINE)
    drawn = {(one, other) for one, other in arrows if {one, other} & set(map(str, lawful))}
    assert drawn == {(str(one), str(other)) for one, following in lawful.items() for other in following}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_file_of_the_project_that_a_page_names_exists(page: Path) -> None:
    for span in CODE.findall(FENCE.sub("", page.read_text())):
        if re.fullmatch(r"(archiver|alembic|helm|tests|tools|docs)(/[\w.-]+)+/?", path := span.strip("`")):
            assert (REPOSITORY / path).exists(), f"{page.name} names {path}"


def test_the_checklists_name_tests_that_exist() -> None:
    page = (DOCS / "contributing" / "patterns.md").read_text()
    tests = "".join(file.read_text() for file in (REPOSITORY / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page):
        assert f"def {name}(" in tests, name
