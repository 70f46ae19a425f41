"""The wheel, installed where nothing of this repository lies, archives a mailbox."""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import connect

import pytest
from alembic.script import ScriptDirectory

from archiver import __version__
from archiver.demo import start_mail_server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]

REPOSITORY = Path(__file__).parents[2]
INSTALL_SECONDS = 300.0
COMMAND_SECONDS = 60.0

MESSAGES = [
    b"Subject: first\r\n\r\nA line.\r\n",
    b"Subject: second\r\n\r\n.a line that begins with a dot\r\n",
    b"Subject: \xff, an octet that no charset explains\r\n\r\n\r\n",
]


@dataclass(frozen=True, slots=True)
class Installation:
    """A virtual environment with the wheel and its locked dependencies, and an empty directory to work in."""

    programs: Path
    work: Path

    @property
    def database(self) -> Path:
        return self.work / "archive.db"

    def run(self, program: str, *arguments: str | Path, timeout_seconds: float = COMMAND_SECONDS) -> str:
        """Run one of the environment's programs, to its good end; gives its standard output."""
        ended = subprocess.run(
            [self.programs / program, *arguments],
            cwd=self.work,
            env=_clean_environment() | {"ARCHIVER_DATABASE_URL": f"sqlite:///{self.database}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        assert ended.returncode == 0, (
            f"{program} {arguments}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        )
        return ended.stdout


def _clean_environment() -> dict[str, str]:
    """This process's environment, less what would lead back to the repository or to another archive."""
    leading_back = ("PYTHON", "VIRTUAL_ENV", "ARCHIVER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(leading_back)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    root = tmp_path_factory.mktemp("wheel")
    this = Installation(programs=Path(sys.executable).parent, work=REPOSITORY)
    this.run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", root / "dist")
    this.run("python", "-m", "venv", root / "environment")
    [wheel] = (root / "dist").glob("*.whl")

    fresh = Installation(programs=root / "environment" / "bin", work=root / "work")
    fresh.work.mkdir()
    install = ("-m", "pip", "install", "--quiet", "--no-deps")
    lock = REPOSITORY / "requirements-runtime.lock"
    fresh.run("python", *install, "--require-hashes", "-r", lock, timeout_seconds=INSTALL_SECONDS)
    fresh.run("python", *install, wheel)
    return fresh


def test_the_runtime_lock_holds_all_that_the_wheel_asks_for(installed: Installation) -> None:
    assert "No broken requirements" in installed.run("python", "-m", "pip", "check")


def test_the_command_tells_its_version(installed: Installation) -> None:
    assert __version__ in installed.run("archiver", "--version")


def test_a_mailbox_is_archived_with_the_migrations_of_the_wheel(
    installed: Installation, tmp_path: Path
) -> None:
    installed.run("archiver", "db", "upgrade")

    package = Path(installed.run("python", "-c", "import archiver; print(archiver.__path__[0])").strip())
    assert package.is_relative_to(installed.programs.parent)
    head = ScriptDirectory(str(package / "db" / "migrations")).get_current_head()
    assert head is not None
    with closing(connect(installed.database)) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [(head,)]

    password = tmp_path / "password"
    password.write_text("correct horse\n")
    mail = tmp_path / "mail"
    mail.mkdir()
    with start_mail_server(mail, {"alice": "correct horse"}) as server:
        server.deliver("alice", MESSAGES)
        trust = ("--ca-file", server.ca_file, "--password-file", password)
        sync = ("sync", server.url("alice"), *trust, "--json")
        [first] = map(json.loads, installed.run("archiver", *sync).splitlines())
        [again] = map(json.loads, installed.run("archiver", *sync).splitlines())

    assert (first["outcome"], first["listed"], first["new"]) == ("ok", 3, 3)
    assert (again["outcome"], again["new"], again["known"]) == ("ok", 0, 3)
    objects = {file.stem: file.read_bytes() for file in installed.work.glob("archive/**/messages/*/*/*.eml")}
    assert objects == {hashlib.sha256(message).hexdigest(): message for message in MESSAGES}
