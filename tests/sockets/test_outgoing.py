"""Messages on their way out: the sender is told of the limits, and what is within them arrives."""

from __future__ import annotations

import pytest

from mesh import Node, limits
from mesh.errors import PayloadTooLarge
from mesh.sockets import codec
from mesh.sockets.codec import DETACH_BYTES_MIN, unpack_frame
from mesh.sockets.compression import Compression
from mesh.sockets.frame import Flag, Frame, Kind, Malformed, decode
from mesh.sockets.outgoing import Outgoing, encode_message

LIMIT = 1 << 17


def sent(message: Outgoing, *, compressed: bool) -> Frame:
    compression = Compression() if compressed else None
    parts = message.parts(b"/a\0", Kind.REQUEST, sender=1, seq=1, compression=compression)
    return decode(parts)


def largest_headers() -> dict[str, str]:
    """Of as many bytes as may be sent, all but compressible."""
    headers = {"k": ""}
    overhead = len(codec.pack_headers({"k": "x" * 1000}) or b"") - 1000
    headers["k"] = "x" * (limits.HEADERS_BYTES_MAX - overhead)
    assert len(codec.pack_headers(headers) or b"") == limits.HEADERS_BYTES_MAX
    return headers


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "lz4"])
@pytest.mark.parametrize("headers", [None, largest_headers()], ids=["bare", "headers"])
@pytest.mark.parametrize("kind", [str, bytes])
def test_a_payload_of_exactly_the_limit_arrives(
    kind: type, headers: dict[str, str] | None, compressed: bool
) -> None:
    """Whatever its headers are, and however it travels."""
    limit = LIMIT if kind is str else DETACH_BYTES_MIN - 1
    text = "a" * (limit - (5 if kind is str else 3))
    payload, longer = (text, text + "a") if kind is str else (text.encode(), text.encode() + b"a")
    assert len(codec.pack(payload)) == limit
    frame = sent(encode_message(payload, headers, limit), compressed=compressed)
    assert bool(frame.flags & Flag.LZ4) is compressed
    got, their_headers = unpack_frame(frame, limit)
    assert list(got) == [payload]
    assert their_headers == (None if headers is None else [headers])
    with pytest.raises(PayloadTooLarge, match=f"over the limit of {limit:,} "):
        encode_message(longer, headers, limit)


def test_a_detached_payload_of_exactly_the_limit_arrives() -> None:
    frame = sent(encode_message(bytes(LIMIT), largest_headers(), LIMIT), compressed=True)
    assert frame.flags & Flag.LZ4
    assert len(frame.detached or b"") < 1000
    assert unpack_frame(frame, LIMIT) == ([bytes(LIMIT)], [largest_headers()])
    with pytest.raises(PayloadTooLarge, match="payload of 131,073 bytes over the limit of 131,072"):
        encode_message(bytes(LIMIT + 1), None, LIMIT)


def test_headers_that_a_frame_has_no_room_for_are_the_senders_error() -> None:
    headers = largest_headers()
    headers["k"] += "x"
    for payload in (1, bytes(DETACH_BYTES_MIN)):
        with pytest.raises(
            PayloadTooLarge, match=r"^headers of 32,769 bytes over the limit of 32,768$"
        ):
            encode_message(payload, headers, LIMIT)


def test_topics_queues_and_services_tell_the_sender_and_send_nothing() -> None:
    headers = largest_headers()
    headers["k"] += "x"
    with Node("sender", message_bytes_max=1024) as node:
        publisher, pusher, client = node.publisher("t"), node.pusher("q"), node.client("s")
        puller = node.puller("q")
        pusher.wait_for(1, timeout=5)
        for send in (publisher.send, pusher.send, client.request):
            with pytest.raises(PayloadTooLarge, match=r"headers of 32,769 bytes over the limit"):
                send(1, headers=headers)
            with pytest.raises(
                PayloadTooLarge, match=r"payload of 1,025 bytes over the limit of 1,024"
            ):
                send("a" * 1022)
        headers["k"] = headers["k"][:-1]
        pusher.send("a" * 1021, headers=headers, timeout=5)
        task = puller.recv(timeout=5)
        assert (task.payload, task.headers) == ("a" * 1021, headers)
        assert node.stats().sent == {"topic": 0, "queue": 1, "service": 0}


def test_a_message_is_compressed_once_however_often_it_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []
    compress = codec.compress

    def noting(body: bytes) -> bytes | None:
        tried.append(len(body))
        return compress(body)

    monkeypatch.setattr(codec, "compress", noting)
    pays, does_not = encode_message("a" * 5000, None, LIMIT), encode_message("a", None, LIMIT)
    plain = [sent(message, compressed=False).body for message in (pays, does_not)]
    assert not tried
    for _ in range(3):
        assert sent(pays, compressed=True).flags == Flag.LZ4
        assert sent(does_not, compressed=True).flags == 0
    assert tried == [5004], "and what is very small is not"
    assert [sent(message, compressed=False).body for message in (pays, does_not)] == plain


def test_of_a_detached_payload_the_second_part_is_compressed() -> None:
    message = encode_message(bytes(DETACH_BYTES_MIN), {"k": "x" * 5000}, LIMIT)
    frame = sent(message, compressed=True)
    assert frame.flags == Flag.DETACHED | Flag.HEADERS | Flag.LZ4
    assert len(frame.body) > 5000
    assert unpack_frame(frame, LIMIT) == ([bytes(DETACH_BYTES_MIN)], [{"k": "x" * 5000}])
    with pytest.raises(Malformed, match="oversize"):
        unpack_frame(frame, DETACH_BYTES_MIN - 1)
