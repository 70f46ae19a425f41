"""What holds for the repository as a whole: the locks, the layers, and no word of where it was made."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
LOCK = REPOSITORY / "requirements.lock"
RUNTIME_LOCK = REPOSITORY / "requirements-runtime.lock"

# Written in parts, so that this file does not name them either.
REGISTRY_HOSTS = tuple(
    ".".join(parts).encode()
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("deb", "debian", "org"),
        ("archive", "ubuntu", "com"),
    )
)
INDEX_OPTION = re.compile(rb"-{2}(extra-)?index-url|-{2}find-links|-{2}trusted-host")


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def pins(lock: Path) -> dict[str, Requirement]:
    """Each requirement of a lock by its name, hashes cut off. Fails on a line that is anything else."""
    entries = re.sub(r" \\\n +", " ", lock.read_text()).splitlines()
    found: dict[str, Requirement] = {}
    for entry in entries:
        if entry.startswith("#"):
            continue
        pin, *hashes = entry.split(" --hash=sha256:")
        assert hashes, f"{lock.name}: without a hash: {entry}"
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes), entry
        requirement = Requirement(pin)
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], f"{lock.name}: {pin}"
        assert requirement.url is None
        assert requirement.name not in found, f"{lock.name}: pinned twice: {requirement.name}"
        found[requirement.name] = requirement
    return found


def version(requirement: Requirement) -> str:
    [specifier] = requirement.specifier
    return specifier.version


def kept_files() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = listed.stdout.decode().split("\0")
    return (REPOSITORY / name for name in names if name and (REPOSITORY / name).is_file())


@pytest.mark.parametrize("lock", [LOCK, RUNTIME_LOCK], ids=lambda lock: lock.name)
def test_a_lock_pins_and_hashes_all_and_names_no_place(lock: Path) -> None:
    assert pins(lock)
    assert "://" not in lock.read_text()


def test_the_image_gets_the_versions_that_are_tested() -> None:
    tested = {name: version(pin) for name, pin in pins(LOCK).items()}
    shipped = {name: version(pin) for name, pin in pins(RUNTIME_LOCK).items()}
    assert shipped.items() <= tested.items()


def test_the_locks_are_no_older_than_what_the_project_asks_for() -> None:
    asked = project()
    extras = asked["project"]["optional-dependencies"]
    runtime = [
        *asked["project"]["dependencies"],
        *(one for extra in ("oauth", "postgres", "web") for one in extras[extra]),
    ]
    for lock, wanted in ((RUNTIME_LOCK, runtime), (LOCK, [*runtime, *asked["dependency-groups"]["dev"]])):
        locked = pins(lock)
        for requirement in map(Requirement, wanted):
            pin = locked.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{lock.name} lacks {requirement.name}: make lock"
            assert requirement.specifier.contains(version(pin)), f"{lock.name} has {pin}: make lock"


def test_no_file_names_a_registry() -> None:
    naming = [
        str(file.relative_to(REPOSITORY))
        for file in kept_files()
        for content in [file.read_bytes()]
        if INDEX_OPTION.search(content) or any(host in content for host in REGISTRY_HOSTS)
    ]
    assert naming == []


def test_every_module_has_its_place_among_the_layers() -> None:
    """A module that no layer names may import whatever it likes: import-linter passes it by."""
    [layers, *others] = project()["tool"]["importlinter"]["contracts"]
    placed = {name.strip() for layer in layers["layers"] for name in layer.split("|")}
    modules = {
        f"archiver.{path.stem}"
        for path in (REPOSITORY / "archiver").iterdir()
        if (path.is_dir() and any(path.glob("*.py"))) or path.suffix == ".py"
        if not path.name.startswith("__")
    }
    assert modules <= placed
    [settings] = [
        contract for contract in others if contract.get("forbidden_modules") == ["archiver.settings"]
    ]
    may_see_settings = {"archiver.cli", "archiver.bootstrap", "archiver.settings"}
    assert placed - set(settings["source_modules"]) == may_see_settings
