"""Ends a process with the one that started it, even if that was killed and could not see to it.

A worker calls `hold`; ``python -m bench.lifeline COMMAND ...`` becomes a program that does not.
Linux: prctl(2), PR_SET_PDEATHSIG, which an exec leaves as it is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "BENCH_PARENT"
"""The variable that names who started it."""
_PR_SET_PDEATHSIG = 1


def hold() -> None:
    """Be killed when the parent ends, or exit if it has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(os.environ[PARENT]):
        sys.exit("the benchmark has ended")


if __name__ == "__main__":
    hold()
    os.execv(sys.argv[1], sys.argv[1:])
