"""What a consumer is told that it holds is what its sidecar says that it does, or less."""

from __future__ import annotations

from mesh.durable.held import Held


def test_what_is_settled_twice_or_was_never_here_counts_once_or_not_at_all() -> None:
    held = Held(4)
    held.add(range(10, 14), until=30.0, now=0.0)
    assert held.count(0.0) == 4
    for offset in (10, 10, 12, 99):
        held.discard(offset)
    assert held.count(0.0) == 2


def test_what_may_be_handed_back_with_another_does_not_count() -> None:
    held = Held(4)
    held.add(range(10, 14), until=30.0, now=0.0)
    held.discard_from(12)
    assert held.count(0.0) == 2


def test_what_comes_again_counts_once() -> None:
    held = Held(4)
    held.add(range(4), until=30.0, now=0.0)
    held.add(range(4), until=60.0, now=30.0)
    assert held.count(31.0) == 4


def test_what_was_not_settled_in_time_is_not_held_unless_that_was_extended() -> None:
    held = Held(4)
    held.add(range(4), until=30.0, now=0.0)
    held.discard(1)
    held.extend((0, 1, 7), until=50.0)
    assert held.count(29.0) == 3
    assert held.count(30.0) == 1
    assert held.count(50.0) == 0


def test_a_sidecar_that_has_forgotten_gives_all_again() -> None:
    held = Held(4)
    held.add(range(4), until=30.0, now=0.0)
    held.clear()
    assert held.count(0.0) == 0


def test_what_others_have_long_settled_takes_no_memory() -> None:
    held = Held(4)
    for n in range(100):
        held.add(range(4 * n, 4 * n + 4), until=n + 1.0, now=float(n))
        assert len(held._until) <= 12
