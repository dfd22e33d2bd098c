"""What becomes of what was published: the account adds up, and frames become batches unchanged."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.durable.reading import Origin, run_of
from mesh.durable.recording_account import Account, Published
from mesh.durable.records import BatchOrigin
from mesh.sockets.outgoing import Outgoing, encode_batch, encode_message

ORIGIN = BatchOrigin(7, "sensors/a", 41, 123)


def frame(count: int = 1, size: int = 10) -> Published:
    return Published(ORIGIN, encode_batch([b"x" * size] * count))


def read(message: Outgoing) -> list[Any]:
    """The records of what was published, as they are read from a log."""
    batch = Published(ORIGIN, message).batch()
    run = run_of("s", "p", batch.header, b"".join(bytes(piece) for piece in batch.body))
    assert run is not None
    return list(run)


@given(
    st.lists(
        st.sampled_from(["take", "take", "submit", "refuse", "record", "lose", "miss", "give up"]),
        max_size=50,
    ),
    st.integers(0, 5000),
)
def test_every_message_is_waiting_under_way_recorded_or_lost(
    steps: list[str], bytes_max: int
) -> None:
    account = Account(bytes_max)
    waiting: list[int] = []
    under_way: list[int] = []
    ends: list[int] = []
    for number, step in enumerate(steps):
        if step == "take":
            before = account.has_room()
            assert account.take(frame(number % 5 + 1)) == before
            if before:
                waiting.append(number % 5 + 1)
        elif step == "submit" and waiting:
            account.submitted()
            under_way.append(waiting.pop(0))
        elif step == "refuse" and waiting:
            assert account.refused() == waiting.pop(0)
        elif step in ("record", "lose") and under_way:
            assert account.settle(recorded=step == "record") == under_way.pop(0)
        elif step == "miss":
            account.missed(3)
        elif step == "give up":
            assert account.give_up() == sum(waiting) + sum(under_way)
            waiting, under_way = [], []
        assert account.taken == account.recorded + account.lost + sum(waiting) + sum(under_way)
        assert (account.settled_to == account.taken) == (not waiting and not under_way)
        ends.append(account.settled_to)
        first = account.first()
        assert (first is None) == (not waiting)
        if not waiting:
            assert account.has_room() == (bytes_max > 0), "what is under way takes no room here"


def test_what_waits_is_bounded_in_bytes_with_what_a_frame_costs() -> None:
    account = Account(10 * limits.RECORDING_FRAME_BYTES)
    taken = sum(account.take(frame(size=1)) for _ in range(100))
    assert taken == 10
    assert (account.taken, account.lost) == (100, 90)


def test_the_end_waits_for_what_was_taken_before_it_and_for_nothing_else() -> None:
    account = Account(1 << 20)
    account.take(frame())
    account.end()
    account.take(frame())
    assert not account.over
    account.submitted()
    assert not account.over
    account.settle(recorded=True)
    assert account.over
    assert account.give_up() == 1


@pytest.mark.parametrize(
    ("payload", "headers"),
    [
        ({"a": [1, None, "x"]}, None),
        (b"short", {"k": 1, "n": None}),
        (b"l" * 100_000, None),
        (b"l" * 100_000, {"k": "v"}),
        (bytearray(b"l" * 100_000), None),
    ],
)
def test_a_message_is_recorded_as_it_was_sent(payload: Any, headers: dict[str, Any] | None) -> None:
    (record,) = read(encode_message(payload, headers, 1 << 20))
    assert record.payload == payload
    assert dict(record.headers) == (headers or {})
    assert record.origin == Origin("0000000000000007", "sensors/a", 41, 123)


@pytest.mark.parametrize("headers", [None, {"k": "v"}])
def test_an_array_is_recorded_as_it_was_sent(headers: dict[str, Any] | None) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(20_000, dtype="<f8")
    (record,) = read(encode_message({"big": array, "n": 1}, headers, 1 << 20))
    assert (record.payload["big"] == array).all()
    assert record.payload["n"] == 1
    assert dict(record.headers) == (headers or {})


def test_the_messages_of_a_frame_are_one_batch_and_each_says_which_it_was() -> None:
    message = encode_batch([b"a", msgspec.Raw(msgspec.msgpack.encode({"b": 1})), b"c"])
    records = read(message)
    assert [record.payload for record in records] == [b"a", {"b": 1}, b"c"]
    assert [record.origin.seq for record in records] == [41, 42, 43]
    batch = Published(ORIGIN, message).batch()
    assert batch.body[1] is message.body, "as it is encoded: not copied, not taken apart"
    assert batch.header.column_bytes < 40, "once for all of them"
