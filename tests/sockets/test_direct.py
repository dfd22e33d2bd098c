"""What a direct line promises: an answer, or the word that there is none, in time; and that nothing
which is wrong with one of them is any other's matter."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.sockets import direct
from mesh.sockets.direct import (
    PACKET_BYTES_MAX,
    Answer,
    DirectLine,
    DirectListener,
    NotReceived,
)
from mesh.sockets.home import Counters
from tests.support.waiting import until


class Server:
    """Echoes, or does what a test says."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.handle: Callable[[bytes, Answer, bool], Callable[[], object] | None] = self.echo
        self.lone: list[bool] = []
        self.listener = DirectListener(self.path, self._handle, "test")

    def _handle(self, data: bytes, answer: Answer, lone: bool) -> Callable[[], object] | None:
        self.lone.append(lone)
        return self.handle(data, answer, lone)

    def echo(self, data: bytes, answer: Answer, lone: bool) -> None:
        answer(data.upper())

    def line(self) -> DirectLine:
        return DirectLine(self.path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "direct")
    yield server
    server.listener.close()
    until(lambda: "mesh direct test" not in [each.name for each in threading.enumerate()])


def ask(line: DirectLine, request: bytes, timeout: float | None = 10) -> bytes | None:
    assert line.claim()
    return line.exchange(request, timeout)


def test_a_request_is_answered(server: Server) -> None:
    line = server.line()
    for n in range(1000):
        assert ask(line, b"request %d" % n) == b"REQUEST %d" % n
    assert all(server.lone)
    line.close()


def test_it_is_answered_from_any_thread_and_after_what_the_handler_returns(server: Server) -> None:
    def by_another(data: bytes, answer: Answer, lone: bool) -> None:
        threading.Thread(target=answer, args=(data,)).start()

    line = server.line()
    server.handle = by_another
    assert ask(line, b"a") == b"a"
    server.handle = lambda data, answer, lone: lambda: answer(data)
    assert ask(line, b"b") == b"b"
    line.close()


def test_one_at_a_time_has_the_line(server: Server) -> None:
    line = server.line()
    assert line.claim()
    assert not line.claim()
    assert line.exchange(b"a", 10) == b"A"
    assert line.claim()
    assert line.exchange(b"b", 10) == b"B"
    line.close()
    assert not line.claim()


@pytest.mark.parametrize("timeout", [0.05, 0.7])
def test_who_waits_too_long_is_told_in_time_and_nobody_gets_the_late_answer(
    server: Server, timeout: float
) -> None:
    late: list[Answer] = []
    server.handle = lambda data, answer, lone: late.append(answer)
    line = server.line()
    began = time.monotonic()
    assert ask(line, b"a", timeout) is None
    assert timeout <= time.monotonic() - began < timeout + 5
    assert not line.claim(), "its answer would be taken for that of the next"
    late[0](b"late")
    server.handle = server.echo
    other = server.line()
    assert ask(other, b"b") == b"B"
    other.close()


@pytest.mark.parametrize("end", ["line", "listener"])
def test_who_waits_is_told_when_the_line_is_closed_at_either_end(server: Server, end: str) -> None:
    server.handle = lambda data, answer, lone: None
    line = server.line()
    answers: list[bytes | None] = []
    asking = threading.Thread(target=lambda: answers.append(ask(line, b"a")))
    asking.start()
    until(lambda: len(server.lone) == 1)
    (line if end == "line" else server.listener).close()
    asking.join(10)
    assert answers == [None]
    assert not line.claim()


@pytest.mark.parametrize("when", ["before it was sent", "unread", "read"])
def test_who_was_turned_away_knows_whether_the_request_was_received(
    tmp_path: Path, when: str
) -> None:
    path = str(tmp_path / "direct")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        line = DirectLine(path)
        end, _ = listener.accept()

        def turn_away() -> None:
            if when != "before it was sent":
                until(lambda: end.recv(100, socket.MSG_PEEK) == b"a")
            if when == "read":
                end.recv(100)
            end.close()

        if when == "before it was sent":
            turn_away()
        else:
            threading.Thread(target=turn_away).start()
        if when == "read":
            assert ask(line, b"a") is None
        else:
            with pytest.raises(NotReceived):
                ask(line, b"a")
        assert not line.claim()


def test_what_is_answered_after_the_listener_was_closed_is_no_answer(server: Server) -> None:
    """It may say no more than that the server closes."""
    go_on = threading.Event()

    def held_up(data: bytes, answer: Answer, lone: bool) -> None:
        assert go_on.wait(10)
        answer(b"closed")

    server.handle = held_up
    line = server.line()
    answers: list[bytes | None] = []
    asking = threading.Thread(target=lambda: answers.append(ask(line, b"a")))
    asking.start()
    until(lambda: len(server.lone) == 1)
    server.listener.close()
    go_on.set()
    asking.join(10)
    assert answers == [None]


def test_a_handler_that_fails_ends_its_line_and_no_other(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(data: bytes, answer: Answer, lone: bool) -> None:
        if data == b"fail":
            raise ZeroDivisionError
        answer(data)

    server.handle = fail
    line, other = server.line(), server.line()
    assert ask(line, b"fail") is None
    assert ask(other, b"a") == b"a"
    assert "ZeroDivisionError" in caplog.text
    other.close()


def test_a_packet_that_is_too_large_ends_its_line(server: Server) -> None:
    line = server.line()
    assert ask(line, b"x" * PACKET_BYTES_MAX) == b"X" * PACKET_BYTES_MAX
    assert ask(line, b"x" * (PACKET_BYTES_MAX + 1)) is None
    assert len(server.lone) == 1


def test_an_empty_packet_is_the_end(server: Server) -> None:
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plain.connect(server.path)
    plain.settimeout(10)
    plain.send(b"")
    assert plain.recv(100) == b""
    plain.close()


def test_there_are_no_more_lines_than_may_be(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "LINES_MAX", 2)
    lines = [server.line() for _ in range(3)]
    assert [ask(each, b"a") for each in lines[:2]] == [b"A", b"A"]
    with pytest.raises(NotReceived):
        ask(lines[2], b"a")
    counters = Counters()
    server.listener.count(counters)
    assert counters.dropped == {"lines full": 1}
    lines[0].close()
    until(lambda: len(server.listener._lines) == 1)
    again = server.line()
    assert ask(again, b"b") == b"B"
    for each in (*lines, again):
        each.close()


def test_what_comes_together_is_told_so(server: Server) -> None:
    go_on = threading.Event()

    def held_up(data: bytes, answer: Answer, lone: bool) -> None:
        if data == b"first":
            assert go_on.wait(10)
        answer(data)

    lines = [server.line() for _ in range(3)]
    for line in lines:
        assert ask(line, b"before") == b"BEFORE"
    server.lone.clear()
    server.handle = held_up
    threads = [
        threading.Thread(target=ask, args=(line, data))
        for line, data in zip(lines, (b"first", b"b", b"c"), strict=True)
    ]
    threads[0].start()
    until(lambda: len(server.lone) == 1)
    for thread in threads[1:]:
        thread.start()
    until(lambda: all(line._claimed.locked() for line in lines))
    time.sleep(0.05)  # nothing tells when the kernel has both
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert server.lone == [True, False, False]
    for line in lines:
        line.close()


def test_nobody_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        DirectLine(str(tmp_path / "none"))


def test_no_descriptor_is_left(server: Server) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        line = server.line()
        assert ask(line, b"a") == b"A"
        line.close()
    server.handle = lambda data, answer, lone: None
    for _ in range(5):
        assert ask(server.line(), b"a", 0.01) is None
    until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before)


def test_who_does_not_accept_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "stopped")
    stopped = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stopped.bind(path)
    stopped.listen(1)
    lines: list[DirectLine] = []
    errors: list[OSError] = []

    def connect() -> None:
        try:
            while True:
                lines.append(DirectLine(path))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(10)
    assert len(errors) == 1
    for line in lines:
        line.close()
    stopped.close()


def test_a_line_that_is_closed_as_it_is_given_back_leaves_no_descriptor(server: Server) -> None:
    line = server.line()
    claimed = line._claimed

    class Claimed:
        acquire = claimed.acquire

        def release(self) -> None:
            line._claimed = claimed
            line.close()
            claimed.release()

    assert line.claim()
    line._claimed = Claimed()  # type: ignore[assignment]
    assert line.exchange(b"a", 10) == b"A"
    assert line._socket.fileno() == -1
