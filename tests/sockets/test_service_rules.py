"""Which server gets a request, which request a handler starts: the rules, without any socket."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import Busy
from mesh.sockets import failure
from mesh.sockets.backlog import Backlog, Request, Verdict
from mesh.sockets.failure import describe, encode_failure, read_failure
from mesh.sockets.frame import FOR_EVER, Kind, Malformed, wire_name
from mesh.sockets.requests import Outstanding, RequestTable, ServerAccount
from mesh.sockets.single import Message, Writer, payload_of, receive

NAME = wire_name("add")
Table = RequestTable[Outstanding]
Account = ServerAccount[Outstanding]


def request(
    seq: int, now: float = 0.0, remaining: int = FOR_EVER, *, caller: str = "caller", size: int = 0
) -> Request[str]:
    return Request(caller, seq, remaining, bytes(size), now)


def opened(table: Table, *, retry: bool = False) -> Outstanding:
    new = Outstanding(retry)
    table.admit(new)
    return new


def join(table: Table, peer: int) -> Account:
    return table.join(peer, key=1)


def place(table: Table, new: Outstanding) -> Account:
    server = table.choose(new)
    assert server is not None
    table.placed(new, server)
    return server


# -- The client's table ------------------------------------------------------------------------


def test_equal_servers_take_turns() -> None:
    table = Table("add")
    servers = {join(table, peer) for peer in range(3)}
    for _ in range(4):
        turn = [(place(table, new), new) for new in (opened(table) for _ in range(3))]
        assert {server for server, _ in turn} == servers
        for server, new in turn:
            assert table.answered(server, new.seq) is new
    order = []
    for _ in range(6):
        new = opened(table)
        order.append(place(table, new).peer)
        table.answered(table.find(order[-1], 1), new.seq)  # type: ignore[arg-type]
    assert order[:3] == order[3:]
    assert sorted(order[:3]) == [0, 1, 2]


def test_the_server_that_owes_least_is_next() -> None:
    table = Table("add")
    busy, idle = join(table, 1), join(table, 2)
    for _ in range(3):
        table.placed(opened(table), busy)
    assert [place(table, opened(table)) for _ in range(3)] == [idle] * 3


def test_a_server_that_hangs_does_not_look_idle_once_its_callers_gave_up() -> None:
    table = Table("add")
    hanging, healthy = join(table, 1), join(table, 2)
    new = opened(table)
    table.placed(new, hanging)
    assert table.abandon(new) is hanging
    assert len(table) == 0
    for _ in range(3):
        answered = opened(table)
        assert place(table, answered) is healthy
        table.answered(healthy, answered.seq)
    assert table.answered(hanging, new.seq) is None
    assert table.owed(hanging)
    assert not table.owed(hanging), "it owed one answer, not two"
    assert hanging.owes == 0


def test_a_request_goes_once_to_each_server_that_is_too_busy() -> None:
    table = Table("add")
    servers = [join(table, peer) for peer in range(3)]
    new = opened(table)
    turned_away = []
    while True:
        server = place(table, new)
        turned_away.append(server)
        assert table.answered(server, new.seq) is new
        if not table.refused(server, new):
            break
        assert len(table) == 1
    assert sorted(s.peer for s in turned_away) == [s.peer for s in servers]
    assert len(table) == 0
    assert not table.waiting


def test_a_full_table_is_busy() -> None:
    table = Table("add", requests_max=2)
    first, _ = opened(table), opened(table)
    with pytest.raises(Busy, match="2 requests to 'add' are outstanding, which is the limit"):
        opened(table)
    table.abandon(first)
    opened(table)


def test_a_lost_server_takes_only_the_requests_that_may_not_be_retried() -> None:
    table = Table("add")
    server = join(table, 1)
    once, again, waiting = opened(table), opened(table, retry=True), Outstanding(False)
    for new in (once, again):
        table.placed(new, server)
    table.admit(waiting)
    assert table.leave(server) == [once]
    assert list(table.waiting.values()) == [again, waiting], "in the order in which they came"
    assert len(table) == 2
    assert table.choose(again) is None
    other = join(table, 2)
    assert place(table, again) is other
    assert table.abandon(once) is None, "its end was told already"
    assert len(table) == 2


def test_nobody_overtakes_those_that_wait() -> None:
    table = Table("add")
    server = join(table, 1)
    first, second = Outstanding(True), Outstanding(True)
    assert table.assign(first) is server
    table.put_back(first, server)  # there was no room
    assert table.assign(second) is None
    assert list(table.waiting.values()) == [first, second]
    assert table.choose(second) is server


def test_an_answer_of_another_server_is_nobodys() -> None:
    table = Table("add")
    one, other = join(table, 1), join(table, 2)
    new = opened(table)
    table.placed(new, one)
    assert table.answered(other, new.seq) is None
    assert not table.owed(other)
    assert table.answered(one, new.seq) is new
    assert table.answered(one, new.seq) is None


@pytest.mark.slow
@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("oqparlj"), st.integers(0, 3)), max_size=60))
def test_the_table_counts_what_is_open_whatever_happens(steps: list[tuple[str, int]]) -> None:
    table = Table("add", requests_max=1000)
    requests: list[Outstanding] = []
    for what, n in steps:
        server = table.find(n, 1)
        match what:
            case "o":
                requests.append(opened(table, retry=n == 0))
            case "q":
                requests.append(Outstanding(n == 0))
                placed = table.assign(requests[-1])
                if placed is not None and n == 3:
                    table.put_back(requests[-1], placed)
            case "j" if server is None:
                table.join(n, 1)
            case "p":
                for new in list(table.waiting.values())[:1]:
                    if table.choose(new) is not None:
                        place(table, new)
            case "a" if server is not None and server.requests:
                seq = next(iter(server.requests))
                answered = table.answered(server, seq)
                if n % 2 and answered is not None:
                    table.refused(server, answered)
            case "r" if requests:
                table.abandon(requests[n % len(requests)])
            case "l" if server is not None:
                table.leave(server)
        held = [s.requests for peer in range(4) if (s := table.find(peer, 1)) is not None]
        assert len(table) == len(table.waiting) + sum(map(len, held))
    for new in requests:
        table.abandon(new)
    assert len(table) == 0


# -- The server's backlog ----------------------------------------------------------------------


def test_no_more_run_than_may_and_no_more_wait_than_fit() -> None:
    backlog = Backlog[str](2, 3, 100)
    verdicts = [backlog.arrive(request(seq)) for seq in range(1, 8)]
    assert verdicts == [Verdict.WAIT] * 5 + [Verdict.BUSY] * 2
    start(backlog, 1)
    start(backlog, 2)
    assert (backlog.running, len(backlog)) == (2, 3)
    assert not backlog.can_start()
    assert backlog.start(0.0) == (None, [])
    assert backlog.arrive(request(8)) is Verdict.BUSY
    backlog.done()
    assert backlog.can_start()
    started, _ = backlog.start(0.0)
    assert started is not None
    assert started.seq == 3, "the first that waits"
    assert backlog.running == 2


def test_what_waits_is_bounded_in_bytes_but_what_need_not_wait_is_not() -> None:
    backlog = Backlog[str](1, 5, 100)
    assert backlog.arrive(request(1, size=1000)) is Verdict.WAIT
    assert backlog.arrive(request(0, size=100)) is Verdict.WAIT, "the first will not wait"
    backlog.cancel("caller", 0)
    start(backlog, 1)
    assert backlog.arrive(request(2, size=101)) is Verdict.BUSY
    assert backlog.arrive(request(3, size=60)) is Verdict.WAIT
    assert backlog.arrive(request(4, size=41)) is Verdict.BUSY
    assert backlog.arrive(request(5, remaining=50, size=40)) is Verdict.WAIT


def test_whatever_leaves_the_backlog_takes_its_bytes_along() -> None:
    backlog = Backlog[str](1, 5, 100)
    backlog.arrive(request(1))
    start(backlog, 1)

    def full() -> None:
        assert backlog.arrive(request(2, remaining=50, size=100)) is Verdict.WAIT
        assert backlog.arrive(request(3, size=1)) is Verdict.BUSY

    full()
    assert backlog.cancel("caller", 2) is not None
    full()
    backlog.expire(0.05)
    full()
    backlog.clear()
    full()
    backlog.done()
    start(backlog, 2)
    full()


def start(backlog: Backlog[str], seq: int) -> None:
    """The next to be started is that one."""
    started, expired = backlog.start(0.0)
    assert started is not None
    assert (started.seq, expired) == (seq, [])


def test_requests_are_started_in_the_order_of_their_arrival() -> None:
    backlog = Backlog[str](1, 2, 100)
    for seq in (2, 1, 3):
        backlog.arrive(request(seq))
    for seq in (2, 1, 3):
        start(backlog, seq)
        backlog.done()


def test_an_expired_request_is_never_started() -> None:
    """Its remaining time counts from its arrival."""
    backlog = Backlog[str](1, 5, 100)
    assert backlog.arrive(request(1, 100.0, 0)) is Verdict.EXPIRED
    backlog.arrive(request(2, 100.0))
    backlog.start(100.0)
    short, long = request(3, 100.0, 50), request(4, 100.0, 500)
    backlog.arrive(short)
    backlog.arrive(long)
    backlog.done()
    assert backlog.start(100.051) == (long, [short])
    backlog.done()
    assert backlog.start(100.051) == (None, [])


def test_the_expired_leave_the_backlog_without_a_free_handler() -> None:
    backlog = Backlog[str](1, 1, 100)
    backlog.arrive(request(1))
    start(backlog, 1)
    short = request(2, 0.0, 50)
    backlog.arrive(short)
    assert backlog.expire(0.049) == []
    assert backlog.expire(0.05) == [short]
    assert backlog.arrive(request(3)) is Verdict.WAIT


def test_a_cancelled_request_is_not_started_and_others_are_not_cancelled_with_it() -> None:
    backlog = Backlog[str](1, 5, 100)
    mine, theirs = request(2), request(2, caller="other caller")
    for each in (request(1), mine, theirs):
        backlog.arrive(each)
    start(backlog, 1)
    assert backlog.cancel("caller", 1) is None, "it runs"
    assert backlog.cancel("caller", 9) is None
    assert backlog.cancel("caller", 2) is mine
    backlog.done()
    assert backlog.start(0.0) == (theirs, [])


def test_a_repeated_request_is_refused() -> None:
    backlog = Backlog[str](1, 5, 100)
    assert backlog.arrive(request(2)) is Verdict.WAIT
    assert backlog.arrive(request(2)) is Verdict.REPEATED


def test_nobody_waits_for_a_server_that_left_after_all_others_turned_it_away() -> None:
    """Neither the request that the leaving server had, nor one that was waiting for it."""
    table = Table("add")
    full, leaving = join(table, 1), join(table, 2)
    had, waits = opened(table, retry=True), opened(table)
    for each in (had, waits):
        table.placed(each, full)
        assert table.answered(full, each.seq) is each
        assert table.refused(full, each), "there is another to try"
        assert table.choose(each) is leaving
    table.placed(had, leaving)
    assert table.leave(leaving) == []
    assert table.choose(had) is full
    assert table.choose(waits) is full


# -- What is answered instead of a result ------------------------------------------------------


def payload(message: Message) -> Any:
    """As it arrives at the other side."""
    frame = receive(Writer(NAME, Kind.ERROR, 1).parts(message, 1), NAME)
    assert (frame.kind, frame.sender, frame.seq) == (Kind.ERROR, 1, 1)
    return payload_of(frame, 1 << 20)


def test_an_error_travels_with_type_text_and_traceback() -> None:
    try:
        dict[str, int]()["missing"]
    except KeyError as error:
        code, raised = read_failure(payload(describe(failure.REMOTE, error)))
    assert code == "remote"
    assert (raised.type, raised.text) == ("KeyError", "'missing'")
    assert 'dict[str, int]()["missing"]' in raised.traceback


def test_an_error_is_cut_and_escaped_so_that_it_can_always_be_sent() -> None:
    message = encode_failure("remote", "T" * 1000, "\ud800" + "x" * 20_000, "old" + "t" * 60_000)
    _, raised = read_failure(payload(message))
    assert raised.type == "T" * failure.TYPE_CHARS_MAX
    assert raised.text.startswith("\\ud800x")
    assert len(raised.text) < failure.TEXT_CHARS_MAX + 10
    assert raised.traceback == "t" * failure.TRACEBACK_CHARS_MAX, "the end names the error"


def test_an_error_whose_text_raises_is_told_all_the_same() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    _, raised = read_failure(payload(describe(failure.REMOTE, Mute())))
    assert (raised.type, raised.text) == ("Mute", "<its text cannot be had: ValueError>")


@pytest.mark.parametrize(
    "fields", [None, [], ["remote", "T", "text"], ["remote", "T", "text", 5], {"a": 1}, "remote"]
)
def test_a_malformed_error_is_malformed(fields: object) -> None:
    with pytest.raises(Malformed):
        read_failure(fields)
