"""The crash machine for as long as one likes: ``python -m tests.soak.crash --seconds 3600 --seed 1``.

Hypothesis draws a story of up to fifty steps, from empty to at rest, and the
next one. What fails is shrunk and shown step by step; the seed that is named
with it finds it again. ``TMPDIR`` on a RAM disk makes it several times faster,
and loses nothing: it is processes that die here, not machines.
"""

import argparse
import logging
import sys
import time

import structlog
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.machine.machine import CrashMachine, expect_fair_shares

STORIES_A_ROUND = 100
STEPS = 50


def crash(seconds: float, first_seed: int, *, stories: int = STORIES_A_ROUND, steps: int = STEPS) -> str:
    """Tell stories for so long, at least one round; gives the figures. Raises what a story breaks."""
    ends_at = time.monotonic() + seconds
    told = CrashMachine.figures.copy()
    number = first_seed
    while True:
        sys.stderr.write(f"seed {number}\n")
        run_state_machine_as_test(
            seed(number)(type("CrashMachine", (CrashMachine,), {})),
            settings=settings(
                max_examples=stories,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
        number += 1
        if time.monotonic() >= ends_at:
            figures = CrashMachine.figures - told
            expect_fair_shares(figures)
            return ", ".join(f"{count} {what}" for what, count in figures.items())


def main() -> int:
    """Tell stories until the time is over, or one breaks a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    sys.stdout.write(
        f"{crash(arguments.seconds, arguments.seed)}: nothing lost, altered or unaccounted for\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
