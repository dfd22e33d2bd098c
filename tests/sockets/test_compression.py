"""LZ4 where it pays: what shrinks is compressed, what does not is tried ever more rarely."""

from __future__ import annotations

import random

import numpy as np
import pytest
from msgspec.structs import replace

from mesh import Node, limits
from mesh.sockets import codec
from mesh.sockets.codec import decompress, unpack_frame
from mesh.sockets.compression import PAUSE_BODIES_MAX, Compression
from mesh.sockets.frame import Flag, Kind, decode
from mesh.sockets.outgoing import encode_message
from tests.support.homes import Homes
from tests.support.topics import NETWORKED, Net

PAYS = b"as easy as can be " * 200
DOES_NOT = random.Random(1).randbytes(4000)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What it was attempted to compress."""
    bodies: list[bytes] = []
    compress = codec.compress

    def noting(body: bytes) -> bytes | None:
        bodies.append(bytes(body))
        return compress(body)

    monkeypatch.setattr(codec, "compress", noting)
    return bodies


def test_what_shrinks_is_compressed_each_time() -> None:
    compression = Compression()
    for _ in range(100):
        packed = compression.compress(PAYS)
        assert packed is not None
        assert decompress(packed, len(PAYS)) == PAYS


def test_what_does_not_shrink_is_given_up_for_ever_longer(tried: list[bytes]) -> None:
    compression = Compression()
    gaps: list[int] = []
    for _ in range(20_000):
        before = len(tried)
        assert compression.compress(DOES_NOT) is None
        if len(tried) > before:
            gaps.append(0)
        else:
            gaps[-1] += 1
    assert gaps[:12] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024]
    assert max(gaps) == PAUSE_BODIES_MAX


def test_one_that_shrinks_ends_the_pause(tried: list[bytes]) -> None:
    compression = Compression()
    for _ in range(1 + 1 + 1 + 2):
        compression.compress(DOES_NOT)
    assert len(tried) == 2
    assert [compression.compress(PAYS) is None for _ in range(3)] == [False, False, False]
    compression.compress(DOES_NOT)
    assert compression.compress(PAYS) is None, "but the next time it pauses again, for one"
    assert compression.compress(PAYS) is not None


def test_what_is_small_neither_is_tried_nor_counts(tried: list[bytes]) -> None:
    compression = Compression()
    assert compression.compress(bytes(limits.COMPRESS_BYTES_MIN - 1)) is None
    assert not tried
    assert compression.compress(PAYS) is not None


def test_of_a_large_one_the_beginning_tells() -> None:
    large = random.Random(1).randbytes(1 << 16)
    assert codec.compress(large + bytes(1 << 20)) is None
    packed = codec.compress(bytes(1 << 20) + large)
    assert packed is not None
    assert decompress(packed, 2 << 20) == bytes(1 << 20) + large


def test_arrays_are_compressed_too() -> None:
    array = np.zeros(1 << 17)
    message = encode_message({"a": array, "n": 1}, None, 1 << 24)
    parts = message.parts(b"/a\0", Kind.DATA, sender=1, seq=1, compression=Compression())
    assert sum(map(len, parts)) < 10_000
    frame = decode(parts)
    assert frame.flags == Flag.DETACHED | Flag.LZ4
    [payload], _ = unpack_frame(frame, 1 << 24)
    assert (payload["a"] == array).all()
    assert not payload["a"].flags.writeable


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_topics_compress_only_for_subscribers_that_are_there(
    homes: Homes, tried: list[bytes], scheme: str
) -> None:
    net = Net(homes, **NETWORKED)
    publisher, subscriber = net.publisher("a"), net.subscriber("a", scheme=scheme)
    publisher.send(PAYS)
    assert subscriber.recv(timeout=5).payload == PAYS
    assert bool(tried) is (scheme == "tcp")
    if scheme == "tcp":
        net.cores[0].close(0)
        net.until(lambda: not publisher.subscribers)
        publisher.send(PAYS)
        assert len(tried) == 1
    net.close()


def test_switched_off_nothing_is_compressed(homes: Homes, tried: list[bytes]) -> None:
    net = Net(homes, **NETWORKED)
    net.topics["drop"]._home = replace(net.publishing, compress=False)
    publisher, subscriber = net.publisher("a"), net.subscriber("a", scheme="tcp")
    publisher.send(PAYS)
    assert subscriber.recv(timeout=5).payload == PAYS
    assert not tried
    net.close()


@pytest.mark.parametrize("compress", [True, False])
def test_a_node_hands_the_switch_to_its_channels(compress: bool) -> None:
    with Node("node", compress=compress) as node, node.pusher("a") as pusher:
        assert (pusher._core._compression is not None) is compress
