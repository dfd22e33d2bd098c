"""Streams that are being opened: who waits for that, and who does not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import pytest

from mesh.durable.hosted import Hosted
from mesh.durable.openings import Openings
from mesh.durable.outcomes import CLOSED, Refused
from mesh.options import StreamOptions
from tests.support.waiting import until

MISSING = Refused("missing", "there is none")


class Opening:
    """Opens what it is asked for when it is told to."""

    def __init__(self) -> None:
        self.begun: SimpleQueue[str] = SimpleQueue()
        self.outcomes: SimpleQueue[Hosted | Refused | BaseException] = SimpleQueue()
        self.outcomes_of: dict[str, SimpleQueue[Hosted | Refused | BaseException]] = {}
        """Of one alone."""
        self.hosted: dict[str, Hosted] = {}
        self.opened: list[Hosted] = []
        self.told: SimpleQueue[object] = SimpleQueue()
        self.openings = Openings(
            self.hosted,
            lambda name, make: MISSING if name == "none" else None,
            self.open_one,
            self.opened.append,
        )

    def open_one(self, name: str, options: StreamOptions | None, make: bool) -> Hosted | Refused:
        self.begun.put(name)
        found = self.outcomes_of.get(name, self.outcomes).get(timeout=10)
        if isinstance(found, BaseException):
            raise found
        return found

    def ask(self, name: str, what: object, **more: bool | int) -> None:
        self.openings.when_open(
            name,
            lambda hosted: self.told.put(what),
            self.told.put,
            make=True,
            **more,  # type: ignore[arg-type]
        )

    def is_told(self) -> object:
        return self.told.get(timeout=10)


@pytest.fixture
def opening() -> Opening:
    return Opening()


def some() -> Hosted:
    return Hosted.__new__(Hosted)


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_all_that_is_asked_meanwhile_is_passed_on_in_its_order(opening: Opening) -> None:
    for n in range(20):
        opening.ask("a", n)
    hosted = some()
    opening.outcomes.put(hosted)
    assert [opening.is_told() for _ in range(20)] == list(range(20))
    until(lambda: opening.opened == [hosted])
    assert opening.hosted == {"a": hosted}
    assert opening.begun.qsize() == 1
    opening.ask("a", "at once")
    assert opening.told.get(block=False) == "at once"


def test_who_asks_for_another_stream_does_not_wait(opening: Opening) -> None:
    opening.ask("a", "a")
    assert opening.begun.get(timeout=10) == "a"
    opening.ask("b", "b")
    assert opening.begun.get(timeout=10) == "b"
    opening.outcomes.put(some())
    opening.outcomes.put(some())
    assert {opening.is_told(), opening.is_told()} == {"a", "b"}
    until(lambda: not opening.openings._under_way)


def test_what_is_not_to_be_had_is_tried_anew_by_each_who_asks(opening: Opening) -> None:
    opening.ask("a", "first")
    opening.ask("a", "second")
    damaged = Refused("damaged", "it does not read")
    opening.outcomes.put(damaged)
    assert opening.is_told() == damaged
    opening.outcomes.put(some())
    assert opening.is_told() == "second"
    assert opening.openings.find("none") == MISSING


def test_a_fault_in_opening_is_answered(opening: Opening, caplog: pytest.LogCaptureFixture) -> None:
    opening.ask("a", "a")
    opening.outcomes.put(ZeroDivisionError())
    told = opening.is_told()
    assert isinstance(told, Refused)
    assert told.code == "storage"
    assert "ZeroDivisionError" in caplog.text


class Finding:
    """Somebody who has begun to open a stream there and then."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._interrupted: SimpleQueue[BaseException] = SimpleQueue()
        self._thread = in_thread(self._find)
        assert opening.begun.get(timeout=10) == "a"

    def _find(self) -> None:
        try:
            self._opening.openings.find("a")
        except KeyboardInterrupt as error:
            self._interrupted.put(error)

    def is_interrupted(self) -> None:
        assert isinstance(self._interrupted.get(timeout=10), KeyboardInterrupt)
        self._thread.join()


def test_who_opens_it_there_and_then_and_is_interrupted_leaves_nobody_waiting(
    opening: Opening,
) -> None:
    finding = Finding(opening)
    opening.ask("a", "another")
    opening.outcomes.put(KeyboardInterrupt())
    opening.outcomes.put(some())
    assert opening.is_told() == "another"
    finding.is_interrupted()
    until(lambda: not opening.openings._under_way)
    assert list(opening.hosted) == ["a"]


def test_who_opens_it_for_another_and_is_interrupted_leaves_it_to_others(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that was begun for the first has not had its turn yet."""
    with monkeypatch.context() as patch:
        patch.setattr("mesh.durable.openings._start", lambda name, work: True)
        opening.ask("a", "the first")
    finding = Finding(opening)
    opening.outcomes.put(KeyboardInterrupt())
    opening.outcomes.put(some())
    assert opening.is_told() == "the first"
    finding.is_interrupted()


def test_who_was_to_open_it_and_died_before_that_leaves_it_to_others(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mesh.durable.openings._start", lambda name, work: True)
        opening.ask("a", "a")
    opening.openings.go_on()
    opening.outcomes.put(some())
    assert opening.is_told() == "a"


def test_who_brings_more_while_too_much_waits_is_held_up(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.WRITER_BYTES_MAX", 100)
    opening.ask("a", 0, size=101, patient=True)
    assert opening.begun.get(timeout=10) == "a"
    for n in (1, 2):
        opening.ask("a", n, size=1000)
    thread = in_thread(lambda: opening.ask("a", 3, patient=True))
    thread.join(0.05)
    assert thread.is_alive()
    opening.outcomes.put(some())
    assert [opening.is_told() for _ in range(4)] == [0, 1, 2, 3]


def test_what_waits_as_it_is_closed_is_refused_and_what_is_under_way_ends(opening: Opening) -> None:
    opening.ask("a", "a")
    assert opening.begun.get(timeout=10) == "a"
    opening.ask("a", "another")
    opening.openings.close()
    assert opening.is_told() == CLOSED
    assert not opening.openings.wait(0.01)
    opening.ask("b", "b")
    assert opening.is_told() == CLOSED
    opening.outcomes.put(some())
    assert opening.openings.wait(10)
    assert list(opening.hosted) == ["a"]  # to be closed by who closes all
    assert opening.is_told() == "a"


def test_who_asks_for_what_is_looked_after_waits_and_gets_it(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Hosted] = []
    monkeypatch.setattr(Hosted, "close", lambda hosted, timeout: closed.append(hosted))
    first, second = some(), some()
    looked_after: list[Hosted] = []
    thread = in_thread(lambda: opening.openings.look_after("a", looked_after.append))
    assert opening.begun.get(timeout=10) == "a"
    opening.ask("a", "asked")
    opening.outcomes.put(first)
    opening.outcomes.put(second)
    assert opening.is_told() == "asked"
    thread.join()
    assert looked_after == closed == [first]
    until(lambda: opening.hosted == {"a": second})


def test_as_many_are_opened_at_a_time_as_may_be_and_the_others_in_their_turn(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.OPENINGS_MAX", 2)
    names = list("abcdef")
    for name in names:
        opening.ask(name, name)
    assert {opening.begun.get(timeout=10) for _ in range(2)} == {"a", "b"}
    opening.openings.go_on()  # each second, those that are not begun
    opening.openings.aside("x", lambda: opening.told.put("not now"))
    for begun in "cdef":
        opening.outcomes.put(some())
        assert opening.begun.get(timeout=10) == begun
    for _ in range(2):
        opening.outcomes.put(some())
    assert sorted(str(opening.is_told()) for _ in names) == names
    until(lambda: sorted(opening.hosted) == names)
    assert opening.begun.empty()
    until(lambda: not any(each.name.startswith("mesh open") for each in threading.enumerate()))
    opening.openings.aside("x", lambda: opening.told.put("again"))
    assert opening.is_told() == "again"


def test_what_has_not_had_its_turn_as_it_is_closed_is_not_opened(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.OPENINGS_MAX", 1)
    for name in "abc":
        opening.ask(name, name)
    assert opening.begun.get(timeout=10) == "a"
    opening.openings.close()
    assert [opening.is_told() for _ in "bc"] == [CLOSED, CLOSED]
    opening.outcomes.put(some())
    assert opening.is_told() == "a"
    assert opening.openings.wait(10)
    assert list(opening.hosted) == ["a"]
    assert opening.begun.empty()


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_open_as_its_opener_is_interrupted_is_known_to_who_closes_all(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread is free to go on with it."""
    monkeypatch.setattr("mesh.limits.OPENINGS_MAX", 1)
    opening.ask("b", "b")
    assert opening.begun.get(timeout=10) == "b"
    opening.outcomes_of["a"] = SimpleQueue()
    finding = Finding(opening)
    opening.openings.when_open("a", interrupt, opening.told.put, make=True)
    opening.ask("a", "another")
    hosted = some()
    opening.outcomes_of["a"].put(hosted)
    finding.is_interrupted()
    assert opening.hosted == {}
    opening.openings.close()
    assert opening.is_told() == CLOSED
    assert opening.hosted == {"a": hosted}
    opening.outcomes.put(some())
    assert opening.openings.wait(10)


def test_whoever_is_interrupted_as_a_thread_begins_takes_nobodys_place(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.OPENINGS_MAX", 1)
    with monkeypatch.context() as patch:
        patch.setattr("mesh.durable.openings._start", lambda name, work: interrupt(work))
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                opening.openings.aside("a", lambda: None)
        with pytest.raises(KeyboardInterrupt):
            opening.ask("a", "a")
    opening.openings.go_on()
    opening.outcomes.put(some())
    assert opening.is_told() == "a"


def test_where_there_are_no_more_threads_who_asks_for_one_opens_that_one(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mesh.durable.openings._start", lambda name, work: True)
        for name in "ab":
            opening.ask(name, name)
    monkeypatch.setattr("mesh.durable.openings._start", lambda name, work: False)
    opening.outcomes.put(some())
    opening.ask("c", "mine")
    assert opening.is_told() == "mine"
    assert list(opening.hosted) == ["c"]
    assert not opening.openings.aside("d", lambda: opening.told.put("done"))
    assert opening.told.empty()
