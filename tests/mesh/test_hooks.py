"""Users' hooks: in order, in a thread of their own, bounded, whatever they do."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from mesh import limits
from mesh.hooks import Hooks


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    hooks = Hooks("n")
    yield hooks
    hooks.close()
    hooks.join(5)
    assert "mesh hooks n" not in [thread.name for thread in threading.enumerate()]


def test_events_are_told_in_order_in_one_thread_of_their_own(hooks: Hooks) -> None:
    told: SimpleQueue[tuple[int, str]] = SimpleQueue()
    for event in range(100):
        hooks.run(lambda event: told.put((event, threading.current_thread().name)), event)
    assert [told.get(timeout=5) for _ in range(100)] == [(i, "mesh hooks n") for i in range(100)]


@pytest.mark.parametrize("raises", [lambda event: 1 / 0, sys.exit, lambda event: next(iter(()))])
def test_a_hook_that_raises_is_logged_and_the_next_event_goes_on(
    hooks: Hooks, raises: object, caplog: pytest.LogCaptureFixture
) -> None:
    told: SimpleQueue[int] = SimpleQueue()
    hooks.run(raises, 1)  # type: ignore[arg-type]
    hooks.run(told.put, 2)
    assert told.get(timeout=5) == 2
    assert "a hook of node 'n' raised on 1" in caplog.text


def test_events_that_wait_are_bounded_and_the_rest_counted(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HOOK_EVENTS_MAX", 3)
    started, go_on = threading.Event(), threading.Event()
    told: SimpleQueue[int] = SimpleQueue()

    def holds(event: int) -> None:
        started.set()
        go_on.wait(5)

    hooks.run(holds, 0)
    assert started.wait(5)
    for event in range(5):
        hooks.run(told.put, event)
    assert hooks.dropped == 2
    go_on.set()
    assert [told.get(timeout=5) for _ in range(3)] == [0, 1, 2]


def test_what_waits_when_they_are_closed_is_told_and_what_comes_later_counted(
    hooks: Hooks,
) -> None:
    told: list[int] = []
    for event in range(10):
        hooks.run(told.append, event)
    hooks.close()
    hooks.run(told.append, 10)
    hooks.join(5)
    assert (told, hooks.dropped) == ([*range(10)], 1)


def test_hooks_that_are_closed_start_no_thread() -> None:
    hooks = Hooks("late")
    hooks.close()
    hooks.run(print, 1)
    assert "mesh hooks late" not in [thread.name for thread in threading.enumerate()]
    assert hooks.dropped == 1


def test_where_no_thread_is_to_be_had_events_are_counted(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    told: SimpleQueue[int] = SimpleQueue()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        hooks.run(told.put, 1)
    hooks.run(told.put, 2)
    assert (told.get(timeout=5), hooks.dropped) == (2, 1)


def test_a_hook_may_close_them() -> None:
    hooks = Hooks("n")
    ended = threading.Event()

    def close(event: int) -> None:
        hooks.close()
        hooks.join(5)
        ended.set()

    hooks.run(close, 1)
    assert ended.wait(2)
