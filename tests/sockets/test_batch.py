"""An open batch by itself: what a frame may hold, in which order it leaves, and who sees to what
came too late."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mesh import limits
from mesh.sockets import codec
from mesh.sockets.batch import (
    ALONE_BYTES_MIN,
    BYTES_MAX,
    ITEM_BYTES_MAX,
    LIST_MESSAGES_MAX,
    MESSAGES_MAX,
    Batch,
    Item,
    leading,
)
from mesh.sockets.frame import Kind, wire_name
from mesh.sockets.outgoing import encode_batch

SIZES = st.lists(st.integers(0, ITEM_BYTES_MAX) | st.integers(0, 200), max_size=700)


def items_of(sizes: list[int]) -> list[Item]:
    return [bytes(size) for size in sizes]


def filled(items: list[Item], room: int = MESSAGES_MAX) -> Batch:
    batch = Batch()
    batch.begin(room)
    batch.items.extend(items)
    return batch


def frames_of(batch: Batch, count_max: int = MESSAGES_MAX) -> list[list[Item]]:
    frames = []
    while batch.items:
        items = batch.next(count_max)
        message = encode_batch(items)
        frames.append(items[: message.count])
        batch.remove(message.count, len(message))
    return frames


# -- What a frame holds


@given(SIZES, st.integers(1, 600))
@example([128] * 600, 600)
@example([0] * 600, 600)
@example([ITEM_BYTES_MAX] * 40, 600)
def test_frames_are_as_full_as_the_bounds_allow_and_keep_the_order(
    sizes: list[int], count_max: int
) -> None:
    items = items_of(sizes)
    frames = frames_of(filled(items), count_max)
    assert [item for frame in frames for item in frame] == items
    for frame in frames:
        assert 1 <= len(frame) <= min(count_max, 512)
        assert sum(map(len, frame)) <= BYTES_MAX
    for frame, following in pairwise(frames):
        is_full = len(frame) == min(count_max, 512)
        assert is_full or sum(map(len, frame)) + len(following[0]) > BYTES_MAX


def test_an_item_over_the_bound_goes_alone() -> None:
    frames = frames_of(filled(items_of([10, BYTES_MAX + 1, 10, 10])))
    assert [list(map(len, frame)) for frame in frames] == [[10], [BYTES_MAX + 1], [10, 10]]


def test_looking_at_what_is_next_takes_nothing_out() -> None:
    batch = filled(items_of([1, 2, 3]))
    assert batch.next(2) == batch.next(2) == batch.items[:2]
    assert len(batch.items) == 3


@pytest.mark.parametrize("size", [BYTES_MAX // MESSAGES_MAX, ITEM_BYTES_MAX, 0])
def test_every_peer_lets_a_full_frame_in(size: int) -> None:
    """However small the largest message that it takes: 1024 bytes is the least it may ask for."""
    items = filled(items_of([size] * MESSAGES_MAX)).next()
    name = wire_name("n" * limits.NAME_BYTES_MAX)
    (frame,) = encode_batch(items).parts(name, Kind.DATA, sender=1, seq=1)
    assert len(frame) <= limits.FRAME_OVERHEAD_BYTES_MAX


# -- What goes together of a list that is sent in one call

LISTED = st.one_of(
    st.integers(0, 300).map(bytes),
    st.integers(0, 30_000).map(bytes),
    st.just(bytearray(7)),
    st.just(memoryview(b"1234")),
    st.integers(0, 70_000).map(bytes),
)


@given(st.lists(LISTED, max_size=300), st.integers(1024, BYTES_MAX))
@example([bytes(100)] * 2000, BYTES_MAX)
@example([bytes(1000)] * 200, BYTES_MAX)
@example([bytes(BYTES_MAX)] * 2, BYTES_MAX)
def test_what_leads_fits_and_is_as_much_as_may_be(payloads: list[Any], bytes_max: int) -> None:
    count, size = leading(payloads, bytes_max)
    assert 0 <= count <= min(len(payloads), LIST_MESSAGES_MAX)
    sizes = [len(bytes(payload)) for payload in payloads[:count]]
    assert sum(sizes) == size <= bytes_max
    if any(size >= ALONE_BYTES_MIN for size in map(len, payloads)):
        assert all(size < ALONE_BYTES_MIN for size in sizes)
    elif count < min(len(payloads), LIST_MESSAGES_MAX):
        assert sum(sizes) + len(bytes(payloads[count])) > bytes_max
    if count:
        frame = encode_batch(payloads[:count])
        assert frame.count == count
        assert msgpack.unpackb(frame.body) == [bytes(payload) for payload in payloads[:count]]


# -- Room


@given(st.lists(st.integers(0, ITEM_BYTES_MAX), min_size=1, max_size=512), st.data())
def test_room_follows_the_sizes_of_what_left(sizes: list[int], data: st.DataObject) -> None:
    batch = filled(items_of(sizes))
    count = data.draw(st.integers(1, len(sizes)))
    batch.remove(count, max(1, sum(sizes[:count])))
    assert 1 <= batch.room <= MESSAGES_MAX
    mean = sum(sizes[:count]) / count
    assert batch.room == MESSAGES_MAX or (batch.room + 1) * mean > BYTES_MAX
    assert batch.room * mean <= BYTES_MAX
    assert len(batch.items) == len(sizes) - count


def test_room_grows_again_when_items_get_small() -> None:
    batch = filled(items_of([4096] * 10))
    batch.remove(10, 40_960)
    assert batch.room == BYTES_MAX // 4096
    batch.items.extend(items_of([10] * 5))
    batch.remove(5, 50)
    assert batch.room == MESSAGES_MAX


def test_where_nothing_leaves_the_room_stays() -> None:
    batch = filled(items_of([10] * 3), room=200)
    batch.remove(0, 1)
    assert (batch.room, len(batch.items)) == (200, 3)


def test_room_is_lowered_before_anybody_sees_that_there_are_fewer() -> None:
    batch = filled(items_of([10] * 300))
    rooms: list[int] = []

    class Watched(list[Item]):
        def __delitem__(self, which: Any) -> None:
            rooms.append(batch.room)
            super().__delitem__(which)

    batch.items = Watched(batch.items)
    batch.remove(100, 1000, 250)
    batch.remove(0, 1, 240)
    batch.remove(200, 2000, 0)
    assert rooms == [250, 240, 0]


def test_a_batch_that_is_shut_stays_so_until_it_begins() -> None:
    batch = filled(items_of([10] * 3))
    batch.shut()
    batch.remove(2, 20)
    assert batch.room == 0
    batch.put_back(items_of([10]))
    assert batch.room == 0
    batch.begin(7)
    assert batch.room == 7
    assert Batch().room == 0, "a new one is shut"


# -- What comes back, what is taken back


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=20), st.data())
def test_what_had_no_room_comes_first_again(items: list[bytes], data: st.DataObject) -> None:
    """Also when senders went on appending meanwhile."""
    earlier = data.draw(st.integers(0, len(items)))
    batch = filled([*items[:earlier]])
    tried = batch.next()
    batch.remove(len(tried), 100)
    batch.items.extend(items[earlier:])
    batch.put_back(tried)
    assert batch.items == items


def test_a_sender_withdraws_its_own_item_and_not_its_like() -> None:
    first, second = bytes([1, 2]), bytes(bytearray([1, 2]))
    assert first == second
    assert first is not second
    batch = filled([first, second])
    assert batch.withdraw(second)
    assert len(batch.items) == 1
    assert batch.items[0] is first
    assert not batch.withdraw(second), "it has left"
    assert batch.withdraw(first)
    assert batch.items == []


def test_what_is_given_up_is_counted_and_cannot_be_withdrawn() -> None:
    item = bytes([1])
    batch = filled([item, item])
    assert batch.give_up() == 2
    assert not batch.withdraw(item)
    batch.items.append(item)
    assert batch.withdraw(item), "that came later"


@pytest.mark.parametrize("run", range(20))
def test_every_item_has_exactly_one_who_sees_to_it(run: int) -> None:
    """The rule of the module, with threads: who closes sees it, or its sender sees that it is
    shut."""
    batch = Batch()
    batch.begin()
    too_late: list[Item] = []
    sent: list[Item] = []
    started = threading.Barrier(5)

    def send(sender: int) -> None:
        started.wait()
        i = 0
        while len(batch.items) < batch.room:
            item = f"{sender} {i}".encode()
            sent.append(item)
            batch.items.append(item)
            if not batch.room:
                too_late.append(item)
            i += 1

    threads = [threading.Thread(target=send, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    while len(batch.items) < run * 10:
        pass
    batch.shut()
    seen = list(batch.items)
    for thread in threads:
        thread.join()
    assert set(seen) | set(too_late) == set(sent)
    assert len(sent) == len(set(sent))


# -- As bytes


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(codec.pack(value))


@pytest.mark.parametrize("size", [0, 1, 31, 32, 255, 256, 4095, 4096, 65535, 65536])
def test_bytes_of_all_lengths_are_packed_as_msgpack_packs_them(size: int) -> None:
    item = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    assert codec.pack_items([item]) == msgpack.packb([item])
    assert codec.pack_items([item, item]) == codec.pack_body([codec.pack(item)] * 2)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 512, 65535, 65536])
def test_batches_of_all_lengths_are_packed_as_msgpack_packs_them(count: int) -> None:
    assert codec.pack_items([b"x"] * count) == msgpack.packb([b"x"] * count)


PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.lists(PLAIN, max_size=20))
def test_payloads_of_all_kinds_are_packed_as_msgpack_packs_them(payloads: list[Any]) -> None:
    items = [each if type(each) is bytes else raw(each) for each in payloads]
    packed = codec.pack_items(items)
    assert packed == msgpack.packb(payloads)
    assert codec.unpack(packed) == payloads
