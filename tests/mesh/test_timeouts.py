"""Several waits share a timeout, and what is said of it is what was given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mesh.errors import InvalidOption
from mesh.timeouts import Remaining, deadline_of, left_of, within


def test_several_waits_end_when_one_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mesh.timeouts.time", SimpleNamespace(monotonic=lambda: now))
    deadline = deadline_of(5)
    left = []
    for now in (100.0, 103.0, 105.0, 107.0):  # noqa: B007
        remaining = left_of(deadline)
        assert within(remaining) == "within 5 s"
        left.append(remaining)
    assert left == [5.0, 2.0, 0.0, 0.0]


def test_without_a_timeout_nothing_is_left_of_it() -> None:
    assert deadline_of(None) is None
    assert left_of(None) is None


@pytest.mark.parametrize(
    ("timeout", "text"),
    [
        (0, "at once"),
        (0.05, "within 0.05 s"),
        (0.00001, "within 1e-05 s"),
        (1.23456, "within 1.235 s"),
        (Remaining(0.0, 0.2), "within 0.2 s"),
        (Remaining(0.0, 0.0), "at once"),
    ],
)
def test_a_timeout_is_said_as_it_was_given(timeout: float, text: str) -> None:
    assert within(timeout) == text


def test_what_is_no_timeout_is_no_deadline() -> None:
    with pytest.raises(InvalidOption, match="timeout must be 0 to 1e9 s or None, not -1"):
        deadline_of(-1)
