"""A whole sidecar on a disk that does all it may, against what it said: producers that repeat what
they are not sure of, groups and their dead letters, readers, quotas, retention, idle time.

- What was acknowledged is there, once, where the receipt says, until retention may take it; what
  was refused is not. With a durability that may lose its last records so they go, and no others,
  and whoever had read them is told.
- What was settled is, after a crash if that was synced, after a kill if it was written; nothing is
  settled that nobody settled; and in the end everything is, with nothing left that nobody gets.
- Every question is answered once, in time; what the sidecar tells of itself is what the files say;
  and its logs are sound whenever they are opened.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.support.sidecar_machine import SidecarMachine

TestSidecar = SidecarMachine.TestCase
TestSidecar.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSidecar = pytest.mark.slow(TestSidecar)
