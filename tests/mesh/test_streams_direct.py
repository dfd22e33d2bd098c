"""An append by the direct line is an append like any other, whatever becomes of the line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh import Node, StreamOptions
from mesh.durable import appending
from mesh.durable import route as routes
from mesh.durable.batch import Batch
from mesh.durable.encoding import item_of
from mesh.durable.records import batch_of
from mesh.durable.route import RemoteRoute
from mesh.durable.stream import Stream
from mesh.errors import Closed, LogFull, Timeout
from mesh.message import Stats
from mesh.sockets import direct
from mesh.sockets.direct import PACKET_BYTES_MAX, DirectLine
from tests.mesh.test_streams import kill_and_start_again, sound
from tests.support.opcodes import before_opcode
from tests.support.processes import Program, Programs
from tests.support.waiting import until


class Lines:
    """What went by direct lines, and what is to become of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exchanged = 0
        self.lose_answer = False
        self.interrupt = False
        self.then: Callable[[], object] = lambda: None
        """Done when a line was given back, and its answer not taken in."""
        exchange = DirectLine.exchange

        def observed(line: DirectLine, request: bytes, timeout: float | None) -> bytes | None:
            answer = exchange(line, request, timeout)
            self.exchanged += answer is not None
            self.then()
            if self.interrupt or self.lose_answer:
                line.close()
            if self.interrupt:
                raise KeyboardInterrupt
            return None if self.lose_answer else answer

        monkeypatch.setattr(DirectLine, "exchange", observed)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    return Lines(monkeypatch)


@pytest.fixture
def orders(sidecar: Program, tmp_path: Path) -> Iterator[Stream]:
    """Its producer is known to the log."""
    with Node("writer") as node:
        orders = node.stream("orders")
        assert orders.append(0).offset == 0
        yield orders
        sidecar.kill(signal.SIGCONT)
    sound(tmp_path / "log")


def payloads(orders: Stream) -> list[object]:
    return [record.payload for record in orders.replay()]


def route_of(orders: Stream) -> RemoteRoute:
    (appender,) = orders._producing.appenders
    assert isinstance(appender.route, RemoteRoute)
    return appender.route


def a_batch(payload: object) -> Batch:
    return batch_of([item_of(payload, bytes_max=1 << 20)[0]])


def test_an_append_that_is_alone_goes_by_the_line(orders: Stream, lines: Lines) -> None:
    for n in range(1, 50):
        assert orders.append(n).offset == n
    assert lines.exchanged == 49
    orders.append_nowait(50)
    assert orders.append(51).offset == 51
    assert lines.exchanged == 49, "it would overtake what is under way"
    assert orders.append(b"x" * PACKET_BYTES_MAX).offset == 52
    assert lines.exchanged == 49
    assert payloads(orders) == [*range(52), b"x" * PACKET_BYTES_MAX]


def test_an_append_whose_answer_is_lost_is_there_once(orders: Stream, lines: Lines) -> None:
    lines.lose_answer = True
    receipt = orders.append(1)
    assert (receipt.offset, receipt.repeated) == (1, True)
    lines.lose_answer = False
    assert orders.append(2).offset == 2
    assert lines.exchanged == 1
    assert payloads(orders) == [0, 1, 2]


def test_a_ctrl_c_leaves_the_append_under_way(orders: Stream, lines: Lines) -> None:
    lines.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        orders.append(1)
    lines.interrupt = False
    assert orders.append(2).offset == 2
    assert payloads(orders) == [0, 1, 2]


def test_a_sidecar_that_hangs_is_waited_for_no_longer_than_said(
    orders: Stream, sidecar: Program
) -> None:
    sidecar.kill(signal.SIGSTOP)
    with pytest.raises(Timeout, match=r"no receipt within 0\.3 s"):
        orders.append(1, timeout=0.3)
    with pytest.raises(Timeout):
        orders.append(2, timeout=0.1)
    sidecar.kill(signal.SIGCONT)
    orders.flush()
    assert payloads(orders) == [0, 1, 2]


@pytest.mark.slow
def test_a_line_that_broke_is_there_again(orders: Stream, sidecar: Program, lines: Lines) -> None:
    core = route_of(orders).core
    first = core.line
    sidecar.kill(signal.SIGSTOP)
    with pytest.raises(Timeout):
        orders.append(1, timeout=0.05)
    sidecar.kill(signal.SIGCONT)
    orders.flush()
    until(lambda: core.line is not None and core.line is not first)
    assert orders.append(2).offset == 2
    assert lines.exchanged == 1


def test_what_goes_by_the_line_is_counted_at_either_end(tmp_path: Path, lines: Lines) -> None:
    with Node("sidecar", durable=tmp_path / "log") as sidecar, Node("writer") as node:
        orders = node.stream("orders")

        def counted() -> tuple[Stats, Stats]:
            """The sidecar counts an answer when it is under way already."""
            until(lambda: (now := sidecar.stats()).sent["stream"] == now.received["stream"])
            return node.stats(), sidecar.stats()

        orders.append(b"x" * 1000)
        before, there_before = counted()
        orders.append(b"x" * 1000)
        assert lines.exchanged == 1
        after, there = counted()
        assert after.sent["stream"] == before.sent["stream"] + 1
        assert after.received["stream"] == before.received["stream"] + 1
        assert 1000 < after.bytes_sent - before.bytes_sent < 1200
        assert 0 < after.bytes_received - before.bytes_received < 100
        assert there.received["stream"] == there_before.received["stream"] + 1
        assert there.sent["stream"] == there_before.sent["stream"] + 1
        assert 1000 < there.bytes_received - there_before.bytes_received < 1200
        assert 0 < there.bytes_sent - there_before.bytes_sent < 100


def test_what_was_to_go_by_the_line_and_did_not_goes_the_usual_way(
    orders: Stream, lines: Lines
) -> None:
    """Its thread died in between."""
    (appender,) = orders._producing.appenders
    pending, ask = appender.route.link.run(lambda: appender.submit_and_claim(a_batch(1)))
    with appender.route.link.lock:
        appender.release(ask)
    orders.flush()
    assert pending.appended is not None
    assert lines.exchanged == 0
    assert payloads(orders) == [0, 1]


@pytest.mark.slow
def test_what_a_line_that_is_turned_away_did_not_carry_was_sent_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a refusal is one, and no doubt."""
    monkeypatch.setattr(direct, "LINES_MAX", 0)
    with Node("log", durable=tmp_path / "log"), Node("writer") as node:
        orders = node.stream("orders", options=StreamOptions(bytes_max=2000))
        orders.append("x" * 1000, timeout=10)
        with pytest.raises(LogFull):
            orders.append("x" * 1000, timeout=10)
        core = route_of(orders).core
        until(lambda: core.line is not None and not core.line.closed)
        with pytest.raises(LogFull):
            orders.append("x" * 1000, timeout=10)
    sound(tmp_path / "log")


def test_threads_that_append_at_once_have_each_its_receipt(orders: Stream, lines: Lines) -> None:
    offsets: list[int | None] = []

    def append() -> None:
        for _ in range(200):
            offsets.append(orders.append("x").offset)

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(filter(None, offsets)) == list(range(1, 801))


def test_a_line_that_was_given_back_may_carry_what_another_stream_appends(
    orders: Stream, lines: Lines
) -> None:
    """Before the answer that came by it was taken in."""
    with Node("other") as node:
        one, other = node.stream("orders"), node.stream("others")
        one.append(1)
        other.append(0)
        (appender,) = other._producing.appenders
        begun = []

        def begin() -> None:
            lines.then = lambda: None
            begun.append(appender.route.link.run(lambda: appender.submit_and_claim(a_batch(1))))

        lines.then = begin
        assert one.append(2).offset == 2
        ((pending, ask),) = begun
        appending._wait(appender, pending, ask, None)
        assert lines.exchanged == 2
        assert payloads(other) == [0, 1]


@pytest.mark.slow
def test_a_producer_goes_on_wherever_a_ctrl_c_has_come(
    orders: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "_LATE_S", 0.01)

    def interrupt() -> None:
        raise KeyboardInterrupt

    core = route_of(orders).core
    assert core.line is not None
    path, core._path, old = core._path, "", []  # it is not to be connected again by itself
    traced, nth, interrupted = sys.gettrace(), 0, True
    while interrupted:
        nth += 1
        interrupted = False
        sys.settrace(before_opcode(nth, {routes.__file__}, interrupt, where_signals_come=True))
        try:
            orders.append(2 * nth, timeout=10)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(traced)
        orders.append(2 * nth + 1, timeout=10)
        old.append(core.line)
        core.line.close()
        core.line = DirectLine(path)
    for line in old:
        line._socket.close()  # who was interrupted while claiming it has it still
    assert nth > 20
    there = [each for each in payloads(orders) if isinstance(each, int)]
    assert there == sorted(set(there))
    assert set(range(3, 2 * nth + 2, 2)) <= set(there)


@pytest.mark.slow
def test_a_sidecar_that_comes_back_has_a_line_again(
    sidecar: Program, programs: Programs, tmp_path: Path, lines: Lines
) -> None:
    with Node("writer") as node:
        orders = node.stream("orders")
        orders.append(0)
        first = route_of(orders).core.line
        kill_and_start_again(sidecar, programs, tmp_path / "log")
        assert orders.append(1, timeout=30).offset == 1
        until(lambda: route_of(orders).core.line not in (None, first))
        before = lines.exchanged
        assert orders.append(2).offset == 2
        assert lines.exchanged == before + 1


def test_who_waits_on_a_line_is_told_when_its_node_is_closed(sidecar: Program) -> None:
    node = Node("writer")
    orders = node.stream("orders")
    orders.append(0)
    sidecar.kill(signal.SIGSTOP)
    errors: list[BaseException] = []

    def append() -> None:
        try:
            orders.append(1, timeout=None)
        except Closed as error:
            errors.append(error)

    thread = threading.Thread(target=append)
    thread.start()
    line = route_of(orders).core.line
    assert line is not None
    until(lambda: line._claimed.locked())
    node.close()
    thread.join(10)
    assert len(errors) == 1
    sidecar.kill(signal.SIGCONT)
