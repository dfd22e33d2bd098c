"""Arrays: what is sent arrives with dtype and shape, and nothing else is made into an array."""

from __future__ import annotations

import gc
import math
import sys
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import Array, Node
from mesh.errors import NotSerializable, PayloadTooLarge
from mesh.sockets import codec
from mesh.sockets.codec import ARRAY, DETACH_BYTES_MIN, unpack_frame
from mesh.sockets.frame import Codec, Flag, Frame, Kind, Malformed, Part, decode, encode, is_array
from mesh.sockets.outgoing import Outgoing, encode_message
from tests.support.processes import Programs

LIMIT = 1 << 24
LARGE = DETACH_BYTES_MIN


def parts_of(message: Outgoing) -> list[Part]:
    return message.parts(b"/a\0", Kind.DATA, sender=1, seq=1)


def received(parts: list[Part]) -> Any:
    if not is_array(parts[0]):
        parts = [bytes(part) for part in parts]  # as they are read from a socket
    [payload], _ = unpack_frame(decode(parts), LIMIT)
    return payload


def passed_on(payload: Any) -> Any:
    return received(parts_of(encode_message(payload, None, LIMIT)))


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


DTYPES = [
    *("|b1", "|i1", "|u1", "<i2", ">i2", "<u4", ">i8", "<f2", "<f4", ">f8", "<c8", ">c16"),
    *("|S5", "<m8[ns]", ">M8[25us]", "<M8[D]", "<M8"),
]


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    seed=st.integers(0, 255),
)
def test_an_array_arrives_as_it_was_sent(dtype: str, shape: list[int], seed: int) -> None:
    items = math.prod(shape)
    raw = bytes((seed + 7 * i) % (2 if dtype == "|b1" else 256) for i in range(items * 16))
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, raw)
    got = passed_on(array)
    assert (type(got), got.dtype.str, got.shape) == (np.ndarray, dtype, tuple(shape))
    assert got.tobytes() == array.tobytes()
    assert not got.flags.writeable
    assert got.flags.aligned


@pytest.mark.parametrize("size", [1, LARGE - 1, LARGE, 3 * LARGE])
def test_a_large_one_is_a_view_of_what_came(size: int) -> None:
    array = np.arange(size, dtype=np.uint8)
    parts = parts_of(encode_message(array, None, LIMIT))
    assert (len(parts) == 2) is (size >= LARGE)
    got = received(parts)
    assert (got == array).all()
    if len(parts) == 2:
        assert np.shares_memory(got, np.frombuffer(parts[1], np.uint8))


def test_a_read_only_one_leaves_without_a_copy() -> None:
    array = read_only(np.arange(LARGE, dtype=np.float64).reshape(2, -1))
    [_, data] = parts_of(encode_message(array, None, LIMIT))
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    "payload",
    [np.zeros(LARGE, np.uint8), bytearray(LARGE), memoryview(bytearray(LARGE))],
    ids=["array", "bytearray", "memoryview"],
)
def test_what_is_changed_after_it_was_sent_arrives_as_it_was(payload: Any) -> None:
    message = encode_message(payload, None, LIMIT)
    payload[0] = 1
    assert received(parts_of(message))[0] == 0


@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_bytes_that_nobody_can_change_leave_without_a_copy(kind: Any) -> None:
    payload = kind(bytes(LARGE))
    [_, data] = parts_of(encode_message(payload, None, LIMIT))
    assert np.shares_memory(np.frombuffer(payload, np.uint8), np.frombuffer(data, np.uint8))
    assert passed_on(payload) == bytes(LARGE)


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_other_buffers_arrive_as_bytes(kind: Any, size: int) -> None:
    got = passed_on(kind(bytes(size)))
    assert (type(got), got) == (bytes, bytes(size))


@pytest.mark.parametrize("step", [1, 2, -1])
@pytest.mark.parametrize("size", [100, LARGE])
def test_one_that_is_not_contiguous_arrives_in_order(size: int, step: int) -> None:
    array = np.arange(2 * size, dtype=np.int32).reshape(2, size).T[::step]
    assert (passed_on(array) == array).all()
    assert (passed_on(read_only(array.copy("F"))) == array).all()


def test_arrays_stand_anywhere_in_a_payload() -> None:
    large, small = np.arange(LARGE), np.arange(6.0).reshape(2, 3)
    payload = {"t": 1, "frames": [small, large, {"other": large + 1}], "none": np.zeros((0, 3))}
    parts = parts_of(encode_message(payload, {"n": 1}, LIMIT))
    assert len(parts[1]) == large.nbytes, "the first large one"
    got = received(parts)
    assert got["t"] == 1
    assert (got["frames"][0] == small).all()
    assert (got["frames"][1] == large).all()
    assert (got["frames"][2]["other"] == large + 1).all()
    assert got["none"].shape == (0, 3)
    assert np.shares_memory(got["frames"][1], np.frombuffer(parts[1], np.uint8))


@pytest.mark.parametrize(
    "payload",
    [np.arange(LARGE), {"a": np.arange(10), "b": np.arange(LARGE)}, bytes(LARGE), np.arange(3)],
)
@pytest.mark.parametrize("headers", [None, {"n": 1}])
def test_the_last_message_of_a_topic_is_repeated_whole(payload: Any, headers: Any) -> None:
    body = encode_message(payload, headers, LIMIT).last_of("a")
    frame = decode([encode(b"@x\0", Kind.LAST, body, sender=1, seq=1)])
    [[channel, got, flat]], _ = unpack_frame(frame, LIMIT)
    assert (channel, flat) == ("a", headers and ["n", 1])
    np.testing.assert_equal(got, payload)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (np.array([object()]), "an array of dtype object"),
        (np.zeros(2, [("x", "f4"), ("y", "i2")]), "an array of dtype "),
        (np.zeros(2, "V4"), "an array of dtype "),
        (np.array(["text"]), "an array of dtype <U4"),
        (np.zeros(2, np.longdouble), "an array of dtype "),
        (np.ma.masked_array([1, 2], [True, False]), "MaskedArray, of which only"),
        ([{"a": np.array([None])}], "an array of dtype object"),
        (np.int64(3), "can not serialize 'numpy.int64'|'int64'"),
        (Array("<f8", (2,), memoryview(bytes(15))), "15 bytes whose shape needs 16"),
        (Array("O", (2,), memoryview(bytes(16))), "dtype 'O' and shape"),
        (Array("<f8", (-1,), memoryview(b"")), r"shape \(-1,\)"),
        (Array("<f8", (0,), "text"), "data is str"),  # type: ignore[arg-type]
        (msgpack.ExtType(ARRAY, b""), "extension type 1, which stands for arrays"),
        ([msgpack.ExtType(ARRAY, b"|u1 1\nx")], "extension type 1"),
    ],
)
def test_what_has_no_form_is_the_senders_error(payload: Any, text: str) -> None:
    with pytest.raises(NotSerializable, match=text):
        encode_message(payload, None, LIMIT)
    assert passed_on([np.arange(3)])[0].tolist() == [0, 1, 2], "and leaves nothing behind"


def test_the_limit_counts_the_array() -> None:
    encode_message(np.zeros(LARGE, np.uint8), None, LARGE + 100)
    with pytest.raises(
        PayloadTooLarge, match=r"payload of 65,5\d\d bytes over the limit of 65,536"
    ):
        encode_message(np.zeros(LARGE, np.uint8), None, LARGE)


def test_an_array_holds_the_memory_it_was_received_in() -> None:
    with Node("sender") as sender, Node("receiver") as receiver:
        publisher, subscriber = sender.publisher("a"), receiver.subscriber("a")
        publisher.wait_for(1, timeout=5)
        array = np.arange(200_000)
        publisher.send({"frame": array})
        part = subscriber.recv(timeout=5).payload["frame"][5:]
    gc.collect()
    churn = [bytes(array.nbytes) for _ in range(20)]  # what was freed would be taken by these
    assert (part == array[5:]).all()
    assert len(churn) == 20


def test_topics_queues_and_services_carry_arrays() -> None:
    frame = np.arange(3 * LARGE, dtype=np.uint8).reshape(3, -1)
    with Node("node") as node:
        publisher, subscriber = node.publisher("t"), node.subscriber("t")
        pusher, puller = node.pusher("q"), node.puller("q")
        node.service("s")(lambda request: {"twice": request["frame"] * 2})
        publisher.wait_for(1, timeout=5)
        for payload in (frame, frame[0, :10]):
            publisher.send(payload, headers={"n": 1})
            message = subscriber.recv(timeout=5)
            assert message.headers == {"n": 1}
            assert (message.payload == payload).all()
            pusher.send([payload], timeout=5)
            assert (puller.recv(timeout=5).payload[0] == payload).all()
            answer = node.client("s").request({"frame": payload}, timeout=5)
            assert (answer["twice"] == payload * 2).all()


# -- What a peer may send ------------------------------------------------------------------------


def ext(data: bytes) -> bytes:
    packed: bytes = msgpack.packb(msgpack.ExtType(ARRAY, data))
    return packed


def frame_of(payload: bytes, detached: bytes | None = None) -> Frame:
    flags = 0 if detached is None else Flag.DETACHED
    body = codec.pack_body([payload])
    first = encode(b"/a\0", Kind.DATA, body, flags=flags, sender=1, seq=1)
    return decode([first] if detached is None else [first, detached])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"|u1 3\n",
        b"|u1 3\n12",
        b"|u1 3\n1234",
        b"|u1 -3\n123",
        b"|u1 3 \n123\n",
        b"|u1  3\n123",
        b"|u1 +3\n123",
        b"|u1 1_0\n1234567890",
        b"|u1 \xd9\xa3\n123",
        b"|u1 3123",
        b"u1 3\n123",
        b"|O 1\n12345678",
        b"|O8 1\n12345678",
        b"<V8 1\n12345678",
        b"<U2 1\n12345678",
        b"<f16 1\n1234567890123456",
        b"|S0 3\n",
        b"<f8,<f8 1\n1234567890123456",
        b"[('a','<f8')] 1\n12345678",
        b"<M8[B] 1\n12345678",
        b"<M8[0s] 1\n12345678",
        b"<M8[s]/2 1\n12345678",
        b"|b1 2\n\x01\x02",
        b"|u1" + b" 1" * 33 + b"\n1",
        b"|u1 0" + b" 999999999999999999" * 31 + b"\n",
        b"|u1 9999999999999999999 0\n",
        b" " * 1000 + b"\n",
    ],
)
def test_what_is_no_array_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        unpack_frame(frame_of(ext(data)), LIMIT)
    if data.endswith(b"\n"):
        with pytest.raises(Malformed):
            unpack_frame(frame_of(ext(data), b"12"), LIMIT)


@given(st.binary(max_size=80))
def test_no_description_raises_anything_but_malformed(data: bytes) -> None:
    for prefix in (b"", b"|u1 ", b"<f8 2", b"|S3 1"):
        try:
            [array], _ = unpack_frame(frame_of(ext(prefix + data)), LIMIT)
        except Malformed:
            continue
        assert array.nbytes <= len(data)


HOLE = ext(b"|u1 3\n")


def test_the_detached_part_fills_exactly_one_hole() -> None:
    [got], _ = unpack_frame(frame_of(HOLE, b"abc"), LIMIT)
    assert got.tobytes() == b"abc"
    two = b"\x92" + HOLE + HOLE
    for payload, detached in [
        (HOLE, b"ab"),
        (HOLE, b"abcd"),
        (two, b"abc"),
        (two, b"abcabc"),
        (b"\xc0", b"abc"),
        (ext(b"|u1 0\n"), b""),
        (ext(b"|u1 3\nabc"), b"abc"),
        (b"\x81" + HOLE + b"\xc0", b"abc"),  # nothing that a map could have for a key
    ]:
        with pytest.raises(Malformed):
            unpack_frame(frame_of(payload, detached), LIMIT)


def test_headers_hold_no_arrays() -> None:
    flat = b"\x92\xa1k" + ext(b"|u1 3\nabc")
    body = codec.pack_body([b"\xc0"], [flat])
    first = encode(b"/a\0", Kind.DATA, body, flags=Flag.HEADERS, sender=1, seq=1)
    with pytest.raises(Malformed):
        unpack_frame(decode([first]), LIMIT)


def test_without_a_detached_part_raw_bytes_are_no_frame() -> None:
    with pytest.raises(Malformed):
        decode([encode(b"/a\0", Kind.DATA, b"", codec=Codec.RAW, sender=1, seq=1)])


def test_other_extension_types_arrive_as_they_were() -> None:
    assert passed_on([msgpack.ExtType(2, b"x")]) == [msgpack.ExtType(2, b"x")]


# -- Without NumPy -------------------------------------------------------------------------------


@pytest.fixture
def no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")


WITHOUT = """
    import sys
    sys.modules["numpy"] = None  # importing it raises
    from mesh import Array, Node
    with Node("a") as a, Node("b") as b:
        publisher, subscriber = a.publisher("x"), b.subscriber("x")
        publisher.wait_for(1, timeout=10)
        for items in (3, 100_000):
            publisher.send(Array("<f8", (items,), memoryview(bytes(8 * items))))
            got = subscriber.recv(timeout=10).payload
            print(type(got).__name__, got.dtype, got.shape, sum(got.data.cast("d")))
"""


@pytest.mark.slow
def test_a_program_that_has_no_numpy_gets_what_stands_for_it(programs: Programs) -> None:
    program = programs.start(WITHOUT)
    assert program.line() == "Array <f8 (3,) 0.0"
    assert program.line() == "Array <f8 (100000,) 0.0"
    assert program.finish()[::2] == (0, "")


@pytest.mark.usefixtures("no_numpy")
@pytest.mark.parametrize("items", [3, LARGE])
def test_without_numpy_an_array_says_what_it_is(items: int) -> None:
    sent = Array(">f8", (items, 1), memoryview(bytes(8 * items)))
    got = passed_on({"a": sent})["a"]
    assert got == sent
    assert got.data.readonly
    assert got.data.cast("d", got.shape).shape == (items, 1)
    changing = bytearray(8 * items)
    message = encode_message(Array("<f8", (items,), memoryview(changing)), None, LIMIT)
    changing[0] = 1
    assert received(parts_of(message)).data[0] == 0


@pytest.mark.usefixtures("no_numpy")
def test_without_numpy_the_same_is_malformed() -> None:
    for data in (b"|u1 3\n12", b"|O8 1\n12345678", b"|b1 2\n\x01\x02"):
        with pytest.raises(Malformed):
            unpack_frame(frame_of(ext(data)), LIMIT)
    [got], _ = unpack_frame(frame_of(ext(b"|b1 2\n\x01\0")), LIMIT)
    assert got.shape == (2,)
    assert passed_on(Array("<f8", (0, 3), memoryview(b""))).shape == (0, 3)


def test_numpy_made_of_an_array_is_the_same_memory() -> None:
    array = Array("<f4", (2, 2), memoryview(np.arange(4, dtype="<f4").tobytes()))
    made: np.ndarray[Any, Any] = np.ndarray(array.shape, array.dtype, array.data)
    assert made.tolist() == [[0, 1], [2, 3]]
    assert (passed_on(array) == made).all()


def test_a_large_array_that_follows_another_closely_is_described_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A topic of which large messages follow each other has no batch for them to be tried with."""
    with Node("sender") as sender, Node("receiver") as receiver:
        publisher, subscriber = sender.publisher("a", when_full="wait"), receiver.subscriber("a")
        publisher.wait_for(1, timeout=5)
        array = read_only(np.zeros(LARGE, np.uint8))
        tried: list[object] = []
        pack = codec.pack

        def noting(value: object) -> bytes:
            tried.append(value)
            return pack(value)

        monkeypatch.setattr(codec, "pack", noting)
        for _ in range(300):
            publisher.send(array, timeout=5)
            subscriber.recv(timeout=5)
        for _ in range(300):
            publisher.send(array, timeout=5)
        for _ in range(300):
            subscriber.recv(timeout=5)
    assert not [value for value in tried if value is array]
