"""What is wrong is said in a line, before anything is made; and a password is said nowhere."""

import base64
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Mailbox
from tests.harness.archive import Archive, Bucket
from tests.harness.cli import Ended, wait_for
from tests.harness.seaweedfs import SeaweedFS

pytestmark = pytest.mark.slow

COMPLAINT = re.compile(r"archiver: \S[^\n]*\n(  hint: \S[^\n]*\n)?")
URL = "pop3s://alice@127.0.0.1:995"
SECRET_KEY = base64.b64encode(bytes(range(32))).decode()


def expect_refusal(ended: Ended, reason: str) -> None:
    """Exit code 2, one line that tells why, perhaps a hint, and nothing else."""
    assert ended.code == 2, ended
    assert ended.out == b""
    assert COMPLAINT.fullmatch(ended.err), ended.err
    assert re.search(reason, ended.err), ended.err


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text("correct horse\n")
    return file


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["sync", "imap://alice@127.0.0.1"], "pop3s://", id="unknown scheme"),
        pytest.param(["sync", "pop3s://127.0.0.1:995"], "no user", id="no user"),
        pytest.param(
            ["sync", "pop3s://alice:tr0ub4dor@127.0.0.1"], "must not contain a password", id="password"
        ),
        pytest.param(["sync", URL, "--password-file", "nowhere"], "nowhere", id="no password file"),
        pytest.param(["sync", "bob"], "no account named bob", id="unknown account"),
        pytest.param(["sync", URL, "--delete", "at-once"], "at-once", id="unknown deletion policy"),
        pytest.param(["sync", URL, "--delete", "after-days=-1"], "after-days=N", id="negative days"),
        pytest.param(["sync", URL, "--tls", "none"], "pop3s://", id="pop3s without TLS"),
        pytest.param(["sync", URL, "--ca-file", "nowhere.pem"], "nowhere.pem", id="no CA file"),
        pytest.param(["sync", URL], "--password-stdin", id="nobody to ask for the password"),
        pytest.param(
            ["account", "add", "alice", "pop3s://a:tr0ub4dor@b"], "password", id="a password, added"
        ),
        pytest.param(["message", "get", "0123456789"], "no archive yet", id="no archive"),
    ],
)
def test_wrong_use_touches_nothing(in_directory: Archive, arguments: list[str], reason: str) -> None:
    ended = in_directory.cli.run(*arguments)

    expect_refusal(ended, reason)
    assert "tr0ub4dor" not in ended.err
    assert made_in(in_directory) == []


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("DATABASE_URL", "mysql://root:tr0ub4dor@localhost/mail", "mysql"),
        ("DATABASE_URL", "tr0ub4dor", "database URL"),
        ("STORE_URL", "ftp://root:tr0ub4dor@localhost/mail", "unknown scheme"),
        ("WORKERS", "0", "ARCHIVER_WORKERS"),
        ("LEASE_SECONDS", "short", "ARCHIVER_LEASE_SECONDS"),
        ("CONFIG", "nowhere.toml", "nowhere.toml"),
    ],
)
def test_a_wrong_setting_is_named_and_touches_nothing(
    in_directory: Archive, password_file: Path, setting: str, value: str, reason: str
) -> None:
    ended = in_directory.cli.run(
        "sync", URL, "--password-file", password_file, environment={f"ARCHIVER_{setting}": value}
    )

    expect_refusal(ended, reason)
    assert "tr0ub4dor" not in ended.err
    assert made_in(in_directory) == []


def test_a_store_that_cannot_be_written_to(in_directory: Archive, password_file: Path) -> None:
    protected = in_directory.cli.directory / "protected"
    protected.mkdir(mode=0o500)
    # Without these rights root, too, obeys a directory's mode.
    drop = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()

    for store in (protected, protected / "below", password_file / "below"):
        ended = in_directory.cli.run(
            *("sync", URL, "--password-file", password_file),
            environment={"ARCHIVER_STORE_URL": f"file:{store}"},
            under=drop,
        )
        expect_refusal(ended, re.escape(str(store)))

    assert list(protected.iterdir()) == []
    assert made_in(in_directory) == ["protected"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param({"ARCHIVER_STORE_URL": "s3://no-such-bucket/mail"}, "create the bucket", id="no bucket"),
        pytest.param({"AWS_SECRET_ACCESS_KEY": "wrong"}, "AWS_SECRET_ACCESS_KEY", id="wrong secret key"),
        pytest.param({"AWS_ACCESS_KEY_ID": "nobody"}, "AWS_ACCESS_KEY_ID", id="unknown key"),
        pytest.param({"AWS_ACCESS_KEY_ID": ""}, "AWS_ACCESS_KEY_ID", id="no key"),
    ],
)
def test_a_bucket_that_cannot_be_used(
    in_bucket: Archive,
    s3: SeaweedFS,
    bucket: str,
    password_file: Path,
    environment: dict[str, str],
    reason: str,
) -> None:
    ended = in_bucket.cli.run("sync", URL, "--password-file", password_file, environment=environment)

    expect_refusal(ended, reason)
    assert s3.secret_key not in ended.err
    expect_empty(in_bucket)


@pytest.mark.parametrize("command", [["sync"], ["run"], ["status"], ["db", "upgrade"]], ids=" ".join)
def test_a_database_of_a_newer_release_is_left_alone(
    tmp_path: Path, in_directory: Archive, command: list[str]
) -> None:
    in_directory.cli.do("db", "upgrade")
    in_directory.change("UPDATE alembic_version SET version_num = '9999_from_the_future'")
    before = (tmp_path / "archive" / "archiver.db").read_bytes()

    expect_refusal(in_directory.cli.run(*command), "9999_from_the_future")

    assert (tmp_path / "archive" / "archiver.db").read_bytes() == before
    assert in_directory.objects.written() == {}


def test_a_postgresql_of_a_newer_release_is_left_alone(in_bucket: Archive) -> None:
    in_bucket.change("UPDATE alembic_version SET version_num = '9999_from_the_future'")

    for command in (["sync"], ["status"], ["db", "upgrade"]):
        expect_refusal(in_bucket.cli.run(*command), "9999_from_the_future")

    expect_empty(in_bucket)


def test_a_postgresql_without_schema_is_not_given_one_by_a_poll(
    in_bucket: Archive, postgres_url: str, password_file: Path
) -> None:
    in_bucket.change("DROP SCHEMA public CASCADE")
    in_bucket.change("CREATE SCHEMA public")

    expect_refusal(in_bucket.cli.run("sync", URL, "--password-file", password_file), "archiver db upgrade")

    assert in_bucket.rows("SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []
    assert in_bucket.objects.written() == {}


def test_a_password_is_not_kept_without_a_key(in_directory: Archive) -> None:
    ended = in_directory.cli.run("account", "add", "alice", URL, "--password-stdin", given=b"tr0ub4dor\n")

    expect_refusal(ended, "openssl rand -base64 32")
    assert made_in(in_directory) == []


def test_a_password_is_found_nowhere(
    archive: Archive, mailbox: Callable[..., Mailbox], corpus: list[bytes], tmp_path: Path
) -> None:
    """One account has a password file, one a sealed password; some polls work, and some do not."""
    by_file, sealed = mailbox(corpus[:3]), mailbox(corpus[3:6])
    cli = archive.cli
    cli.environment["ARCHIVER_SECRET_KEY"] = SECRET_KEY
    trusting = ("--ca-file", sealed.ca_file)
    cli.do(
        *("account", "add", "sealed", sealed.url, *trusting, "--password-stdin", "--interval", "1", "--json"),
        given=f"{sealed.password}\n".encode(),
    )
    archive.sync(by_file)
    assert cli.do("sync", "sealed", "--json").json[0]["new"] == 3
    wrong = f"not the {by_file.password}"
    (tmp_path / "wrong").write_text(wrong)
    assert cli.run("sync", by_file.url, "--password-file", tmp_path / "wrong").code == 1
    for command in ("check", "resume"):
        cli.run("account", command, by_file.url)
        cli.run("account", command, "sealed")
    service = cli.start("run", environment={"ARCHIVER_LOG_LEVEL": "debug"})
    wait_for(lambda: len(service.log("poll.ended")) >= 2, "a poll of each account by the service")
    service.terminate()
    assert service.wait().code == 0

    octets = {
        **cli.output(),
        **{key: archive.objects.read(key) for key in archive.objects.written()},
        "database": archive.database(),
    }
    told = [
        form
        for box, password in ((by_file, by_file.password), (sealed, sealed.password), (by_file, wrong))
        for form in (
            password.encode(),
            base64.b64encode(password.encode()),
            base64.b64encode(f"\0{box.user}\0{password}".encode()),
            SECRET_KEY.encode(),
        )
    ]
    assert len(archive.captured()) == 6
    assert {name for name, content in octets.items() if any(form in content for form in told)} == set()


def made_in(archive: Archive) -> list[str]:
    """What lies in the directory that commands ran in, and where the archive would be."""
    here, there = archive.cli.directory, archive.cli.directory.parent / "archive"
    made = [path.name for path in here.iterdir() if path.name != "output"]
    return made + ([there.name] if there.exists() else [])


def expect_empty(archive: Archive) -> None:
    assert isinstance(archive.objects, Bucket)
    assert archive.objects.written() == {}
    assert archive.objects.uploads() == []
    assert archive.rows("SELECT count(*) FROM account") == [(0,)]
