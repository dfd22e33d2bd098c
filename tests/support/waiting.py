"""Waiting for a condition that has no descriptor and no event, with a deadline. For tests only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_pause = threading.Event()


def until(condition: Callable[[], object], what: str = "it", timeout: float = 10.0) -> None:
    """Return once `condition()` is true; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        _pause.wait(0.002)
