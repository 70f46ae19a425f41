"""What ``make`` runs: which lock goes into .venv, and that nothing is fetched that is there already."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Stands for python3, and for the python of the environment that it makes. Only pip's calls are recorded.
PYTHON = """\
#!/bin/sh
case "$*" in
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "new .venv" >>"$CALLS" ;;
    *" pip "*) for last; do :; done; echo "$last" >>"$CALLS" ;;
esac
"""

# Stands for a package manager, none of which may be called.
MANAGER = '#!/bin/sh\necho "$0 $*" >>"$CALLS"\nexit 1\n'

Setup = Callable[..., list[str]]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What ``tools/setup`` needs of the repository."""
    root = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "tools", root / "tools")
    (root / "archiver").mkdir()
    for name in ("requirements.lock", "requirements-runtime.lock", "pyproject.toml", "archiver/__init__.py"):
        (root / name).write_text("1")
    return root


@pytest.fixture
def setup(checkout: Path, tmp_path: Path) -> Setup:
    """Run ``tools/setup``; return what it made and which locks it installed."""
    calls = tmp_path / "calls"

    def run(*arguments: str) -> list[str]:
        calls.write_text("")
        environment = {"PYTHON": str(program(tmp_path / "python", PYTHON)), "CALLS": str(calls)}
        command = [str(checkout / "tools" / "setup"), *arguments]
        subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
        return calls.read_text().splitlines()

    return run


def test_setup_installs_once_what_is_asked_for(setup: Setup) -> None:
    assert setup() == ["new .venv", "requirements.lock"]
    assert setup() == []
    assert setup("runtime") == [], "the whole includes it"


def test_the_runtime_alone_is_completed_in_place(setup: Setup) -> None:
    assert setup("runtime") == ["new .venv", "requirements-runtime.lock"]
    assert setup("runtime") == []
    assert setup() == ["requirements.lock"]
    assert setup() == []


def test_what_was_complete_stays_complete_when_a_lock_changes(setup: Setup, checkout: Path) -> None:
    setup()
    (checkout / "pyproject.toml").write_text("2")
    assert setup("runtime") == ["requirements.lock"]
    assert setup() == []


def test_the_runtime_follows_its_own_lock(setup: Setup, checkout: Path) -> None:
    setup("runtime")
    (checkout / "requirements.lock").write_text("2")
    assert setup("runtime") == []
    (checkout / "requirements-runtime.lock").write_text("2")
    assert setup("runtime") == ["requirements-runtime.lock"]


def test_an_environment_that_was_moved_or_is_half_made_is_made_again(setup: Setup, checkout: Path) -> None:
    setup()
    stamp = checkout / ".venv" / ".made-from"
    stamp.write_text(stamp.read_text().replace(str(checkout), "/elsewhere"))
    assert setup() == ["new .venv", "requirements.lock"]
    stamp.unlink()
    assert setup("runtime") == ["new .venv", "requirements-runtime.lock"]


def test_no_package_manager_is_started_for_servers_that_are_there(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.touch()
    for name in ("apt-get", "npm"):
        program(tmp_path / "bin" / name, MANAGER)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    if not all(
        (Path(sys.prefix) / ".cache" / "servers" / name / ".made-from").exists()
        for name in ("debian", "node")
    ):
        pytest.skip("tools/servers has not fetched all servers")
    ended = subprocess.run(
        [REPOSITORY / "tools" / "servers"],
        env=environment | {"PATH": path, "CALLS": str(calls)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert (calls.read_text(), ended.stderr) == ("", "")
