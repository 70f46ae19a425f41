"""A poll that fails says so, says whose turn it is, and does not make it worse."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from archiver.demo import processes
from tests.conftest import Mailbox
from tests.harness.archive import Archive
from tests.harness.cli import wait_for

pytestmark = pytest.mark.slow

REFUSALS = 4
"""After so many refused logins in a row an account is paused."""


def test_a_server_that_is_down_is_tried_later(
    in_directory: Archive, mailbox: Callable[..., Mailbox], corpus: list[bytes]
) -> None:
    box = mailbox(corpus[:2])
    (nobody,) = processes.free_ports(1)
    url = f"pop3s://{box.user}@127.0.0.1:{nobody}"

    ended = in_directory.cli.run("sync", url, box.url, *in_directory.access(box), "--json")

    # The other account of the same command is archived all the same.
    assert (ended.code, ended.err) == (1, "")
    down, up = ended.json
    assert (down["account"], down["outcome"], down["listed"], down["new"]) == (url, "try_later", 0, 0)
    assert f"127.0.0.1:{nobody}" in down["error"]
    assert (up["outcome"], up["new"]) == ("ok", 2)
    assert in_directory.status()["failing"] == 1

    told = in_directory.cli.run("sync", url, *in_directory.access(box))
    assert told.code == 1
    assert b"try later" in told.out


def is_refused_so_often(archive: Archive, refusals: int) -> bool:
    return archive.rows("SELECT refusals FROM lease") == [(refusals,)]


def test_a_refused_password_pauses_an_account_until_it_is_corrected(
    archive: Archive, mailbox: Callable[..., Mailbox], corpus: list[bytes], tmp_path: Path
) -> None:
    box = mailbox(corpus[:5])
    password = tmp_path / "password"
    password.write_text("what it was before\n")
    access = ("--ca-file", box.ca_file, "--password-file", password)
    cli = archive.cli
    cli.run("account", "add", "alice", box.url, *access, "--interval", "1")

    # Named on the command line it is tried at once, and refused.
    ended = cli.run("sync", "alice", "--json")
    assert ended.code == 1
    assert [report["outcome"] for report in ended.json] == ["operator_needed"]
    assert archive.status()["failing"] == 1

    # The service asks again, ever more rarely, and then no more.
    service = cli.start("run")
    for refusals in range(2, REFUSALS + 1):
        [(due_in_future,)] = archive.rows("SELECT due_at > CURRENT_TIMESTAMP FROM lease")
        assert due_in_future
        archive.change("UPDATE lease SET due_at = CURRENT_TIMESTAMP WHERE owner IS NULL")
        wait_for(partial(is_refused_so_often, archive, refusals), "another refusal")
    assert archive.rows("SELECT due_at, owner FROM lease") == [(None, None)]
    assert {line["outcome"] for line in service.log("poll.ended")} == {"operator_needed"}
    paused = cli.run("account", "show", "alice", "--json").json[0]
    assert (paused["state"], archive.status()["paused"]) == ("waiting", 1)
    assert paused["state_reason"] == paused["last_error"]

    # A sync of all leaves it alone; one that names it, with the right password, sets it free.
    password.write_text(f"{box.password}\n")
    assert cli.do("sync", "--json").json == []
    [report] = cli.do("sync", "alice", "--json").json
    assert (report["outcome"], report["new"]) == ("ok", 5)
    summary = archive.status()
    assert (summary["paused"], summary["failing"]) == (0, 0)
    wait_for(lambda: service.log("poll.ended")[-1]["outcome"] == "ok", "the service polls it again")
    service.terminate()
    assert service.wait(30).code == 0
    archive.expect_each_once(corpus[:5])
