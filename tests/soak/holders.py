"""Workers that stand still past their leases: ``python -m tests.soak.holders --rounds 20 --seed 1``.

A real ``archiver run`` is stopped by SIGSTOP at a moment that chance chooses,
while it polls several mailboxes, each at another step. Another one works on
them once the leases have run out, with deletion switched off; then the first
goes on by SIGCONT. It must write nothing more and delete nothing.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from archiver.demo.corpus import corpus as generate_corpus
from archiver.demo.dovecot import Dovecot
from tests.conftest import Mailbox
from tests.harness.archive import Archive
from tests.harness.cli import Running, wait_for
from tests.harness.proxy import Proxy
from tests.harness.witness import Witness
from tests.soak.kill import grounds

BOXES = 6
MESSAGES = 30
LEASE_SECONDS = 5
LONGEST_LATENCY_SECONDS = 0.12
BATCH_MESSAGES = 3

LONGEST_WAIT_SECONDS = 2.5
"""From the first session to the stop, at most: the fastest polls are at their end by then."""

TAKE_OVER_SECONDS = 90.0


class Held(NamedTuple):
    """A lease that a stopped process has in its hand."""

    witness: Witness
    token: int


class Trial:
    """An archive with mailboxes at different distances, and two services that take turns."""

    def __init__(self, archive: Archive, chance: random.Random, boxes: list[Witness]) -> None:
        self.archive = archive
        self.chance = chance
        self.boxes = boxes
        self._unique = 0
        self._contents = list(generate_corpus(40, 1, scale=0.05))
        archive.cli.environment |= {
            "ARCHIVER_LEASE_SECONDS": f"{LEASE_SECONDS}",
            "ARCHIVER_BATCH_MESSAGES": f"{BATCH_MESSAGES}",
        }

    def round(self) -> int:
        """One stop, one take-over, one return; gives how many leases were lost on the way."""
        for witness in self.boxes:
            witness.deliver(self.message() for _ in range(self.chance.randint(MESSAGES // 2, MESSAGES)))
        self._policy("after-archived")
        first = self.archive.cli.start("run")
        held = self._stop(first)
        self._policy("never")
        second = self.archive.cli.start("run")
        wait_for(lambda: self._has_polled(second, held), "the other one has them", seconds=TAKE_OVER_SECONDS)
        second.terminate()
        assert second.wait().code == 0
        before = {one.witness.account: (one.witness.on_server(), _written_by(one)) for one in held}

        os.kill(first.pid, signal.SIGCONT)
        wait_for(lambda: self._has_given_up(first, held), "the first one sees that it is late")
        first.terminate()
        assert first.wait().code == 0
        for one in held:
            after = (one.witness.on_server(), _written_by(one))
            assert after == before[one.witness.account], (one.witness.account, "a late worker went on")
            query = (
                f"SELECT 1 FROM poll WHERE account_id = '{one.witness.account_id}' AND token = {one.token}"
            )
            assert not self.archive.rows(query), (one.witness.account, "a late worker kept a report")
        for witness in self.boxes:
            witness.expect_nothing_lost()
        return len(held)

    def come_to_rest(self) -> None:
        """Poll to the end, and see that everything is there, once."""
        for _ in range(2):
            reports = self.archive.cli.do("sync", "--json").json
            assert {report["outcome"] for report in reports} == {"ok"}, reports
        for witness in self.boxes:
            witness.expect_each_once()
        self.archive.expect_proved(sum(len(set(witness.delivered)) for witness in self.boxes))

    def message(self) -> bytes:
        """A message that nobody was sent before."""
        self._unique += 1
        return b"X-Delivery: %d\r\n%b" % (self._unique, self._contents[self._unique % len(self._contents)])

    def _policy(self, policy: str) -> None:
        self.archive.change(f"UPDATE account SET delete_policy = '{policy}'")

    def _stop(self, running: Running) -> list[Held]:
        """Stop it while it polls, and not in a transaction: that would hold its locks, and the others up."""
        [owner] = wait_for(
            lambda: [line["owner"] for line in running.log("service.started")], "the service has begun"
        )
        wait_for(lambda: self._held_by(owner), "it polls")
        time.sleep(self.chance.uniform(0, LONGEST_WAIT_SECONDS))
        while True:
            os.kill(running.pid, signal.SIGSTOP)
            if self.archive.is_unlocked() and (held := self._held_by(owner)):
                return held
            os.kill(running.pid, signal.SIGCONT)
            time.sleep(self.chance.uniform(0, 0.05))

    def _held_by(self, owner: str) -> list[Held]:
        rows = self.archive.rows(f"SELECT account_id, token FROM lease WHERE owner = '{owner}'")
        of = {witness.account_id: witness for witness in self.boxes}
        return [Held(of[account_id], token) for account_id, token in rows]

    def _has_polled(self, second: Running, held: list[Held]) -> bool:
        ended = {line["account"] for line in second.log("poll.ended") if line["outcome"] == "ok"}
        return ended >= {one.witness.account for one in held}

    def _has_given_up(self, first: Running, held: list[Held]) -> bool:
        ended = {(line["account"], line["token"]): line["outcome"] for line in first.log("poll.ended")}
        outcomes = [ended.get((one.witness.account, one.token)) for one in held]
        assert set(outcomes) <= {None, "lease_lost"}, outcomes
        return None not in outcomes


def _written_by(held: Held) -> int:
    """How many segments a poll wrote."""
    return sum(segment[0]["poll"] == held.token for segment in held.witness.segments())


@contextmanager
def trial(archive: Archive, server: Dovecot, seed: int, *, boxes: int = BOXES) -> Iterator[Trial]:
    """An archive with mailboxes, for as many rounds as wanted."""
    chance = random.Random(seed)
    with ExitStack() as stack:
        witnesses = []
        for number in range(boxes):
            latency = chance.uniform(0.001, LONGEST_LATENCY_SECONDS)
            proxy = stack.enter_context(Proxy(server.pop3s_port, latency_seconds=latency))
            user = f"held{seed}-{number}-{time.monotonic_ns()}"
            box = Mailbox(server, user, f"secret of {user}")
            server.add_user(box.user, box.password)
            url = f"pop3s://{user}@{proxy.host}:{proxy.port}"
            added = archive.cli.run("account", "add", user, url, *archive.access(box), "--interval", "1")
            assert added.code == 0, added
            witnesses.append(Witness(archive, box, user))
        yield Trial(archive, chance, witnesses)


def main() -> int:
    """Hold trials, and tell how many leases were lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    lost = 0
    with tempfile.TemporaryDirectory(prefix="archiver-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        with (
            grounds(directory) as (archive, mail, _),
            trial(archive, mail, arguments.seed) as one,
        ):
            for _ in range(arguments.rounds):
                lost += one.round()
            one.come_to_rest()
    sys.stdout.write(
        f"{arguments.rounds} rounds, {lost} leases lost: nothing written, nothing deleted late\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
