"""One timeout for several waits, one after the other: when all of them have to be over, and what is
left of it. Whatever is left, errors say what the caller gave."""

from __future__ import annotations

import time

import msgspec

from mesh.options import check_timeout


class Remaining(float):
    """What is left of a timeout, in seconds, for one of several waits that share it."""

    __slots__ = ("whole",)
    whole: float
    """What the caller gave."""

    def __new__(cls, left_s: float, whole: float) -> Remaining:
        remaining = super().__new__(cls, left_s)
        remaining.whole = whole
        return remaining


class Deadline(msgspec.Struct, frozen=True, gc=False):
    """When several waits, one after the other, have to be over."""

    at: float
    timeout: float
    """Of all of them, in seconds."""


def deadline_of(timeout: float | None) -> Deadline | None:
    """Raises `InvalidOption`."""
    timeout = check_timeout(timeout)
    return None if timeout is None else Deadline(time.monotonic() + timeout, timeout)


def left_of(deadline: Deadline | None) -> Remaining | None:
    """For the next of its waits."""
    if deadline is None:
        return None
    return Remaining(max(0.0, deadline.at - time.monotonic()), deadline.timeout)


def within(timeout: float | None) -> str:
    """`timeout` as the texts of errors say it."""
    if isinstance(timeout, Remaining):
        timeout = timeout.whole
    return f"within {round(timeout, 3) or timeout:g} s" if timeout else "at once"
