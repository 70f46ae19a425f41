"""The settings: variables over a file over defaults, and no secret in a complaint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from archiver import settings
from archiver.errors import UsageError


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """These variables and no other settings, for the length of the block."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(settings.PREFIX)]:
        del os.environ[name]
    os.environ.update({f"{settings.PREFIX}{name}": value for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_without_any_everything_lies_in_one_folder() -> None:
    with environment():
        found = settings.load()
    assert (found.database_url, found.store_url) == ("sqlite:///archive/archiver.db", "file:archive/store")
    assert found.http_listen is None


def test_variables_come_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "archiver.toml"
    file.write_text('workers = 3\nstore_url = "s3://bucket/prefix"\n')
    with environment(CONFIG=str(file), WORKERS="5"):
        found = settings.load()
    assert (found.workers, found.store_url) == (5, "s3://bucket/prefix")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKERS", "0"),
        ("WORKERS", "many"),
        ("LEASE_SECONDS", "1"),
        ("LOG_LEVEL", "loud"),
        ("BATCH_SECONDS", "-1"),
        ("MESSAGE_BYTES", "1e99"),
        ("HTTP_HOSTS", "https://a.example"),
        ("HTTP_HOSTS", "*.a.example"),
        ("HTTP_HOSTS", "a.example:443"),
    ],
)
def test_a_wrong_value_names_its_variable(name: str, value: str) -> None:
    with environment(**{name: value}), pytest.raises(UsageError, match=f"ARCHIVER_{name}: ") as caught:
        settings.load()
    assert caught.value.hint is not None


def test_names_are_a_list_in_the_file_and_have_commas_in_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "archiver.toml"
    file.write_text('http_hosts = ["a.example", "fd00::1"]')
    with environment(CONFIG=str(file)):
        assert settings.load().http_hosts == ["a.example", "fd00::1"]
    with environment(HTTP_HOSTS="a.example, b.example,"):
        assert settings.load().http_hosts == ["a.example", "b.example"]


@pytest.mark.parametrize("content", ["workers = ", "\xff", "wrokers = 3", 'secret_key = ["sesame"]'])
def test_a_file_that_makes_no_sense_is_wrong_use(tmp_path: Path, content: str) -> None:
    file = tmp_path / "archiver.toml"
    file.write_bytes(content.encode("latin-1"))
    with environment(CONFIG=str(file)), pytest.raises(UsageError) as caught:
        settings.load()
    assert "sesame" not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"


def test_an_unknown_key_is_named_with_its_file_and_the_key_that_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "archiver.toml"
    file.write_text('stor_url = "file:x"\n')
    with environment(CONFIG=str(file)), pytest.raises(UsageError) as caught:
        settings.load()
    expected = f"invalid settings: unknown key stor_url in {file}; did you mean store_url?"
    assert str(caught.value) == expected


def test_a_file_that_is_not_there_is_wrong_use(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with environment(CONFIG=str(path)), pytest.raises(UsageError, match="no configuration file"):
            settings.load()


def test_secrets_are_not_shown() -> None:
    with environment(SECRET_KEY="sesame", API_TOKEN="sesame"):
        assert "sesame" not in repr(settings.load())
    with environment(SECRET_KEY="sesame", WORKERS="sesame"), pytest.raises(UsageError) as caught:
        settings.load()
    assert "sesame" not in f"{caught.value} {caught.value.__cause__}"


def test_a_misspelt_variable_is_noticed() -> None:
    with environment(WROKERS="3", WORKERS="3", CONFIG="x"):
        assert settings.unknown() == ["ARCHIVER_WROKERS"]
