"""Whether the owner of a lease is dead: said only where it can be known; and memory that is given back."""

import os
import platform
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_memory_that_is_free_between_pieces_is_given_back() -> None:
    """Run apart: how much is free depends on all that a process did."""
    script = """if True:
        import ctypes, os
        from archiver.process import give_back_memory
        malloc, free = (getattr(ctypes.CDLL(None), name) for name in ("malloc", "free"))
        malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        pieces = [malloc(64_000) for _ in range(1_000)]
        for piece in pieces:
            ctypes.memset(ctypes.c_void_p(piece), 1, 64_000)
        for number, piece in enumerate(pieces):
            if number % 20:
                free(piece)
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        before = resident()
        print(give_back_memory(), before - resident())
    """
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    gave, octets = said.split()
    assert gave == "True"
    assert int(octets) > 40_000_000
