"""Whether a machine finds a fault that is planted, and for what it is, by what it says: within so
many examples, and by the same one each time that Hypothesis has seen the same code.

Must not know the machines, nor the faults.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from mesh.errors import LogDamaged
from tests.support.planted_parts import Planting

SETTINGS = settings(
    max_examples=1000,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def is_found_out(
    machine: type[RuleBasedStateMachine],
    planted: Planting,
    found: str,
    examples_max: int = SETTINGS.max_examples,
) -> None:
    with planted(), pytest.raises((AssertionError, LogDamaged), match=found):
        run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=examples_max))
