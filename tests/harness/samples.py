"""The generated blocks of the documentation, so that they say what the program says.

Owns the text between these marks and ``<!-- end -->`` in ``docs/``:

- ``<!-- sample: COMMAND -->``: what a command printed in the story below, which
  runs real commands on an archive made for it
- ``<!-- usage: COMMAND -->``: what ``--help`` says, as Markdown
- ``<!-- settings: NAME ... -->``: a table of settings
- ``<!-- metrics: all -->``: the table of metrics

``python -m tests.harness.samples`` rewrites them if any is stale. Two runs of the
story differ in times, ids and ports. A block is stale only if something else
differs, so a second rewrite changes nothing.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import tempfile
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import prometheus_client
import typer
from typer.core import TyperArgument, TyperGroup, TyperOption
from typer.testing import CliRunner

from archiver import observe, settings
from archiver.cli import app
from archiver.demo.corpus import corpus
from archiver.demo.pop3d import Pop3Server
from archiver.errors import ArchiverError
from tests.harness.cli import cli, wait_for

DOCS: Final = Path(__file__).parents[2] / "docs"
HOST: Final = "pop.example.com"
"""Shown in place of the loopback address."""
PLACE: Final = "/srv/archiver"
"""Shown in place of the temporary directory."""

BLOCK: Final = re.compile(
    r"^<!-- (?P<kind>sample|usage|settings|metrics): (?P<command>.+?) -->\n(?P<body>.*?)^<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)

_VARYING: Final = (
    (r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?( UTC|\+00:00|Z)?)?", "TIME"),
    (r"(in )?\b\d+(\.\d+)? (ms|s|min|h|d)( ago)?\b", "WAIT"),
    (r"\b\d+(\.\d+)?/s\b", "RATE"),
    (r"\b[0-9a-f]{8,}\b", "HEX"),
    (r"\b\d+\.\d+\b(?! [kMG]?B)", "NUMBER"),
    (r"(?<=seconds\": )[\d.]+", "NUMBER"),
    (r"(?<=days_left\": )\d+|\b\d+(?= days)", "NUMBER"),
    (r"[ ─━]+", " "),
)
"""What differs between two runs, and what it is compared as."""


def stale(page: str, outputs: dict[str, str]) -> list[str]:
    """The commands whose blocks in this page are stale: samples only if ``outputs`` has them."""
    return [
        block["command"]
        for block in BLOCK.finditer(page)
        if block["kind"] != "sample" or block["command"] in outputs
        if _compared(block["body"]) != _compared(_body(block, outputs))
    ]


def samples(page: str) -> set[str]:
    """The commands whose output this page shows."""
    return {block["command"] for block in BLOCK.finditer(page) if block["kind"] == "sample"}


def rewritten(page: str, outputs: dict[str, str]) -> str:
    """The page with new blocks. Raises KeyError for a sample that the story does not have."""
    return BLOCK.sub(
        lambda found: f"<!-- {found['kind']}: {found['command']} -->\n{_body(found, outputs)}<!-- end -->",
        page,
    )


def pages() -> list[Path]:
    """The pages that have such blocks."""
    return [page for page in sorted(DOCS.rglob("*.md")) if BLOCK.search(page.read_text())]


def _compared(body: str) -> str:
    for pattern, instead in _VARYING:
        body = re.sub(pattern, instead, body)
    return body


def _body(block: "re.Match[str]", outputs: dict[str, str]) -> str:
    match block["kind"]:
        case "usage":
            return usage(block["command"])
        case "settings":
            return settings_table(block["command"].split())
        case "metrics":
            return metrics_table()
    return outputs[block["command"]]


def settings_table(names: list[str]) -> str:
    """Settings, by the names of their fields, with their defaults and descriptions."""
    fields = settings.Settings.model_fields
    rows = []
    for name in names:
        default = fields[name].default
        shown = "unset" if default is None else f"`{str(default).removesuffix('.0')}`"
        rows.append(
            (f"`{settings.PREFIX}{name.upper()}`", f"{shown} | {_cell(fields[name].description or '')}")
        )
    lines = [f"| {name} | {rest} |" for name, rest in rows]
    return "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *lines]) + "\n"


def metrics_table() -> str:
    """The metrics by the names that Prometheus sees."""
    rows = []
    for metric in vars(observe).values():
        if isinstance(metric, prometheus_client.metrics.MetricWrapperBase):
            (family,) = metric.collect()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append((f"`{name}`", f"{family.type} | {_cell(family.documentation)}"))
    lines = [f"| {name} | {rest} |" for name, rest in sorted(rows)]
    return "\n".join(["| metric | type | meaning |", "| --- | --- | --- |", *lines]) + "\n"


# What --help says


def usage(name: str) -> str:
    """A command's help as Markdown: how it is called, what it does, its arguments and options."""
    command: Any = typer.main.get_command(app)
    for word in name.split()[1:]:
        command = command.commands[word]
    parts = [_paragraphs(command.help or "")]
    if isinstance(command, TyperGroup):
        rows = [
            (
                f"[`{name} {inner}`](#{f'{name} {inner}'.replace(' ', '-')})",
                _paragraphs(each.help or "").split("\n")[0],
            )
            for inner, each in command.commands.items()
        ]
        parts.append(_table("command", "what it does", rows))
    else:
        arguments = [each for each in command.params if isinstance(each, TyperArgument)]
        options = [each for each in command.params if isinstance(each, TyperOption) and each.name != "help"]
        words = [name, *(["[OPTIONS]"] if options else []), *map(_argument, arguments)]
        parts.insert(0, f"```\n{' '.join(words)}\n```")
        rows = [(f"`{_argument(each)}`", each.help or "") for each in arguments if each.help]
        rows += [(_option(each), _help(each)) for each in options]
        if rows:
            parts.append(_table("option", "meaning", rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _table(left: str, right: str, rows: list[tuple[str, str]]) -> str:
    cells = [(left, right), ("---", "---"), *((_cell(a), _cell(b)) for a, b in rows)]
    return "\n".join(f"| {a} | {b} |" for a, b in cells)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _argument(argument: TyperArgument) -> str:
    name = argument.metavar or str(argument.name).upper()
    if name.startswith("["):
        return name
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def _option(option: TyperOption) -> str:
    names = " / ".join([*option.opts, *option.secondary_opts])
    return f"`{names}`" if option.is_flag else f"`{names} {option.metavar}`"


def _help(option: TyperOption) -> str:
    text = option.help or ""
    default = option.default
    if option.is_flag or default in (None, "", ()) or callable(default) or "default" in text.lower():
        return text
    return f"{text} Default: `{default}`."


# The story


@dataclass(slots=True)
class Story:
    """Commands run one after the other in one directory, and what each of them printed."""

    server: Pop3Server
    directory: Path
    environment: dict[str, str]
    outputs: dict[str, str] = field(default_factory=dict)

    def run(self, command: str, stdin: bytes = b"") -> str:
        """Run a command, and keep what it printed for pages that show it."""
        typed, piped, _ = command.partition(" | sha256sum")
        words = [self._real(word) for word in typed.split()[1:]]
        result = CliRunner().invoke(app, words, input=stdin, env=self.environment)
        output = result.output_bytes if piped else result.output.encode()
        if isinstance(result.exception, ArchiverError):
            output = f"archiver: {result.exception}\n  hint: {result.exception.hint}\n".encode()
        elif result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if piped:
            output = f"{hashlib.sha256(result.stdout_bytes).hexdigest()}  -\n".encode()
        self.keep(command, output.decode())
        return result.stdout

    def keep(self, command: str, printed: str) -> None:
        """Take a text as what a command printed."""
        shown = self._shown(printed)
        if "--json" in command.split() or printed.startswith("{"):
            lines = "\n".join(spread(json.loads(line)) for line in shown.splitlines())
            self.outputs[command] = f"```json\n{lines}\n```\n"
        else:
            lines = "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())
            self.outputs[command] = f"```console\n$ {command}\n{lines}\n```\n"

    def _real(self, word: str) -> str:
        return word.replace(HOST, f"{self.server.host}:{self.server.pop3s_port}")

    def _shown(self, text: str) -> str:
        text = text.replace(f"{self.server.host}:{self.server.pop3s_port}", HOST)
        text = text.replace(f'"{self.server.host}"', f'"{HOST}"')
        text = text.replace(f'"port": {self.server.pop3s_port}', '"port": 995')
        return text.replace(str(self.directory), PLACE)


def spread(value: Any) -> str:
    """A JSON object with a field on each line; lists of objects, an object on each line."""
    lines = []
    for key, inner in value.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            rows = ",\n    ".join(json.dumps(each) for each in inner)
            lines.append(f"{json.dumps(key)}: [\n    {rows}\n  ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(inner)}")
    return "{\n  " + ",\n  ".join(lines) + "\n}"


def play() -> dict[str, str]:
    """Play the story, and give the Markdown of each command's output."""
    with tempfile.TemporaryDirectory(prefix="archiver-samples-") as place, contextlib.chdir(place):
        directory = Path(place)
        key, old = (base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2))
        environment = {"ARCHIVER_SECRET_KEY": old, "COLUMNS": "100"}
        with Pop3Server(directory / "server", {"anna": "anna's", "sales": "sales'"}) as server:
            story = Story(server, directory, environment)
            _archive(story)
            environment["ARCHIVER_SECRET_KEY"] = f"{key},{old}"
            story.run("archiver account reseal --json")
            _service(story)
            _look_after(story)
            _trouble(story)
    return story.outputs


def _archive(story: Story) -> None:
    """Two mailboxes: anna's, which is archived whole, and sales, of which one message is too large."""
    samples = corpus(40, seed=20260101, scale=0.4)
    story.server.deliver("anna", [next(samples) for _ in range(20)])
    small = [message for message in samples if len(message) < 20_000][:2]
    story.server.deliver("sales", [*small, b"Subject: A large one\r\n\r\n" + b"0123456789abcdef\r\n" * 3_000])
    (story.directory / "ca.pem").write_bytes(story.server.ca_file.read_bytes())
    (story.directory / "sales.password").write_text("sales'")
    story.run("archiver db upgrade --json")
    story.run("archiver db current --json")
    story.run(
        "archiver account add sales pop3s://sales@pop.example.com --password-file sales.password"
        " --ca-file ca.pem --json"
    )
    story.run(
        "archiver account add anna pop3s://anna@pop.example.com --password-stdin --ca-file ca.pem"
        " --interval-max 900",
        stdin=b"anna's",
    )
    story.run("archiver account check sales")
    story.run("archiver account check sales --json")
    story.run("archiver sync anna --json")
    story.environment["ARCHIVER_MESSAGE_BYTES"] = "40000"
    story.run("archiver sync anna")
    story.run("archiver sync sales")
    story.run("archiver status")
    story.run("archiver status --json")
    story.run("archiver status --days 1 --json")
    story.run("archiver account list")
    story.run("archiver account list --json")
    story.run("archiver account show anna")
    story.run("archiver account show anna --json")
    story.run("archiver account show sales --json")
    story.run("archiver account deletable sales --delete after-archived --json")
    story.run("archiver message list --limit 3")
    captures = story.run("archiver message list --limit 1 --json")
    digest = json.loads(captures)["sha256"]
    story.run(f"archiver message show {digest[:8]}")
    story.run(f"archiver message get {digest[:8]} | sha256sum")
    story.run("archiver feed tail --after 20 --json")
    story.run("archiver verify")


def _service(story: Story) -> None:
    """The service polls both accounts once; its log, and a request to it."""
    environment = story.environment | {
        "ARCHIVER_HTTP_LISTEN": "127.0.0.1:0",
        "ARCHIVER_RAMP_SECONDS": "0",
        "ARCHIVER_DATABASE_URL": f"sqlite:///{story.directory}/archive/archiver.db",
        "ARCHIVER_STORE_URL": f"file:{story.directory}/archive/store",
    }
    with cli(story.directory / "service", environment) as commands:
        running = commands.start("run")
        (listening,) = wait_for(lambda: running.log("http.listening"), "HTTP is served")
        wait_for(lambda: running.log("service.started"), "the service has started")
        request = urllib.request.Request(f"{listening['address']}/v1/accounts/anna/poll", method="POST")
        with urllib.request.urlopen(request) as answer:
            story.keep("POST /v1/accounts/anna/poll", answer.read().decode())
        (ended,) = wait_for(lambda: running.log("poll.ended")[:1], "a poll has ended")
        story.keep("poll.ended", json.dumps(ended))
        running.terminate()
        running.wait()


def _look_after(story: Story) -> None:
    story.run("archiver db prune --json")
    story.run("archiver db recount --json")
    story.run("archiver db catch-up --json")
    story.run("archiver account poll sales")


def _trouble(story: Story) -> None:
    """A wrong password, and a damaged object."""
    (story.directory / "sales.password").write_text("mistyped")
    story.run("archiver sync sales --json")
    store = story.directory / "archive" / "store"
    objects = sorted((store / "messages").rglob("*.eml"), key=lambda path: path.name)
    objects[0].chmod(0o600)
    objects[0].write_bytes(objects[0].read_bytes()[:-2] + b"!\n")
    story.run("archiver verify --json")


def main() -> int:
    outputs = play()
    if any(stale(page.read_text(), outputs) for page in pages()):
        # All of them: an id is then the same wherever it is shown.
        for page in pages():
            page.write_text(rewritten(page.read_text(), outputs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
