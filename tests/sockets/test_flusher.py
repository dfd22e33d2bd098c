"""The thread that closes old batches: when it looks, at what, how often, and when it does not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from mesh.sockets.flusher import BLOCKED_S_MAX, Flusher
from tests.support.waiting import until

WINDOW_S = 0.0005


class Core:
    """Counts how often it is looked at, and answers as it is told."""

    def __init__(self, answer: Callable[[], bool] = lambda: True) -> None:
        self.answer = answer
        self.looks: list[float] = []

    def close_batches(self) -> bool:
        self.looks.append(time.monotonic())
        return self.answer()


@pytest.fixture
def flusher() -> Iterator[Flusher]:
    flusher = Flusher(WINDOW_S)
    yield flusher
    flusher.close()
    ended(flusher)


def ended(flusher: Flusher) -> None:
    if flusher._thread is not None:
        flusher._thread.join(timeout=5)
        assert not flusher._thread.is_alive()


def test_no_thread_is_made_before_a_batch_is_opened(flusher: Flusher) -> None:
    assert flusher._thread is None
    assert flusher.watch(Core())
    assert flusher._thread is not None


def test_a_core_is_looked_at_in_each_window_until_it_is_forgotten(flusher: Flusher) -> None:
    core = Core()
    began = time.monotonic()
    assert flusher.watch(core)
    until(lambda: len(core.looks) >= 3)
    times = [began, *core.looks]
    assert all(later - earlier >= WINDOW_S for earlier, later in pairwise(times))
    flusher.forget(core)
    other = Core()
    assert flusher.watch(other)
    until(lambda: len(other.looks) >= 2)
    looks = len(core.looks)
    until(lambda: len(other.looks) >= 10)
    assert len(core.looks) == looks


def test_watched_twice_a_core_is_looked_at_once_in_a_window_and_not_put_off(
    flusher: Flusher,
) -> None:
    core = Core()
    assert flusher.watch(core)
    turn = flusher._cores[core]
    for _ in range(5):
        assert flusher.watch(core)
    assert flusher._cores[core] is turn
    until(lambda: len(core.looks) >= 5)
    looks = core.looks
    assert all(later - earlier >= WINDOW_S for earlier, later in pairwise(looks))


def test_with_nothing_open_it_sleeps(flusher: Flusher) -> None:
    core = Core()
    flusher.watch(core)
    until(lambda: core.looks)
    flusher.forget(core)
    flusher._bell = Bell(flusher._bell)  # type: ignore[assignment]
    flusher.watch(core)
    flusher.forget(core)
    until(lambda: flusher._bell.timeouts[-1:] == [-1])  # type: ignore[attr-defined]


class Bell:
    """Notes for how long the thread sleeps."""

    def __init__(self, bell: object) -> None:
        self.bell = bell
        self.timeouts: list[float] = []

    def release(self) -> None:
        self.bell.release()  # type: ignore[attr-defined]

    def acquire(self, timeout: float) -> None:
        self.timeouts.append(timeout)
        self.bell.acquire(timeout=timeout)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_what_has_no_room_is_tried_ever_more_rarely_and_at_once_again_when_it_has(
    flusher: Flusher,
) -> None:
    """Each 0.5 ms it would be tried 800 times in this time, and burn a core's tenth."""
    room = threading.Event()
    core = Core(room.is_set)
    began = time.monotonic()
    flusher.watch(core)
    until(lambda: time.monotonic() - began > 0.4)
    tried, elapsed = len(core.looks), time.monotonic() - began
    assert tried <= 4 + elapsed / BLOCKED_S_MAX + 2
    assert tried >= 5, "and yet it is tried again and again"
    pauses = [later - earlier for earlier, later in zip(core.looks, core.looks[1:], strict=False)]
    assert all(pause >= min(WINDOW_S * 2**i, BLOCKED_S_MAX) for i, pause in enumerate(pauses, 1))
    assert flusher._cores[core].pause_s == BLOCKED_S_MAX
    room.set()
    until(lambda: len(core.looks) > tried + 20)
    assert flusher._cores[core].pause_s == WINDOW_S


def test_one_without_room_keeps_no_other_waiting(flusher: Flusher) -> None:
    blocked, busy = Core(lambda: False), Core()
    flusher.watch(blocked)
    until(lambda: len(blocked.looks) >= 6)  # so that its pauses are the longest
    flusher.watch(busy)
    until(lambda: len(busy.looks) >= 200)
    meanwhile = [at for at in blocked.looks if busy.looks[0] <= at <= busy.looks[-1]]
    assert len(meanwhile) <= (busy.looks[-1] - busy.looks[0]) / BLOCKED_S_MAX + 2


def test_a_core_that_fails_keeps_no_other_waiting_and_is_tried_again(
    flusher: Flusher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mesh.sockets.flusher.FAILED_S", 0.01)

    def fail() -> bool:
        raise MemoryError("for the moment")

    failing, other = Core(fail), Core()
    with caplog.at_level(logging.ERROR, "mesh.sockets.flusher"):
        flusher.watch(failing)
        flusher.watch(other)
        until(lambda: len(failing.looks) >= 2 and len(other.looks) >= 2)
    assert "for the moment" in caplog.text
    failing.answer = lambda: True
    looks = len(failing.looks)
    until(lambda: len(failing.looks) > looks + 3)


def test_once_closed_it_watches_nothing_and_its_thread_ends(flusher: Flusher) -> None:
    core = Core()
    flusher.watch(core)
    until(lambda: core.looks)
    flusher.close()
    ended(flusher)
    assert not flusher.watch(core)
    flusher.close()


def test_without_a_window_no_batch_is_ever_opened() -> None:
    flusher = Flusher(0)
    assert not flusher.watch(Core())
    assert flusher._thread is None


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), OSError()])
def test_where_no_thread_is_to_be_had_no_batch_is_opened(
    flusher: Flusher, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert not flusher.watch(Core())
    core = Core()
    assert flusher.watch(core), "the next time there may be one"
    until(lambda: core.looks)


def test_eight_threads_that_open_at_once_start_one_thread(flusher: Flusher) -> None:
    cores = [Core() for _ in range(8)]
    started = threading.Barrier(8)

    def open_one(core: Core) -> None:
        started.wait()
        assert flusher.watch(core)

    before = threading.active_count()
    threads = [threading.Thread(target=open_one, args=(core,)) for core in cores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: all(core.looks for core in cores))
    assert threading.active_count() == before + 1
