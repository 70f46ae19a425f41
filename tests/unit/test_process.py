"""Whether the owner of a lease is dead: said only where it can be known."""

import os
import socket
import subprocess
import sys

import pytest

from archiver.process import is_dead, name_owner

_CHILD = "from archiver.process import name_owner; print(name_owner(), flush=True); input()"


def test_this_process_lives_and_is_named_for_this_machine() -> None:
    name = name_owner()
    assert name.startswith(f"{socket.gethostname()}/")
    assert f"/{os.getpid()}/" in name
    assert name == name_owner()
    assert not is_dead(name)


def test_a_process_that_ended_is_dead() -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from archiver.process import name_owner as n; print(n(), flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert not is_dead(name)
    child.communicate("\n", timeout=30)
    assert is_dead(name)


def test_a_number_that_another_process_has_now_is_no_life() -> None:
    host, namespace, pid, started = name_owner().split("/")
    assert is_dead(f"{host}/{namespace}/{pid}/{int(started) - 1}")


def test_of_other_machines_and_containers_nothing_is_known() -> None:
    host, namespace, _, started = name_owner().split("/")
    boot, _, number = namespace.rpartition("-")
    for name in (
        f"elsewhere/{namespace}/1999999999/{started}",
        f"{host}/{boot}-1/1999999999/{started}",
        # Two machines made from one image: same name, and every first namespace has the same number.
        f"{host}/{'0' * len(boot)}-{number}/1999999999/{started}",
        f"{host}/-/1999999999/{started}",
    ):
        assert not is_dead(name), name


@pytest.mark.parametrize("name", ["", "x", "a/b", "a/b/c/d", "////", "../../.."])
def test_what_is_no_name_is_nobody(name: str) -> None:
    assert not is_dead(name)


def test_a_process_whose_start_was_not_known_is_not_taken_for_dead() -> None:
    host, namespace, pid, _ = name_owner().split("/")
    assert not is_dead(f"{host}/{namespace}/{pid}/-")
    assert not is_dead(f"{host}/{namespace}/not a number/1")
