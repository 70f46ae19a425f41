"""All that can happen to an archive, in any order: a short run. The long one is ``tests.soak.crash``."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.machine.machine import CrashMachine, expect_fair_shares

EXAMPLES, STEPS = 30, 40


@pytest.mark.slow
def test_whatever_happens_nothing_is_lost_altered_or_unaccounted_for() -> None:
    told = CrashMachine.figures.copy()
    run_state_machine_as_test(
        CrashMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    expect_fair_shares(CrashMachine.figures - told)
