"""What a publisher and a subscriber that does not read keep between them is bounded in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from mesh import limits
from mesh.errors import Timeout
from mesh.options import WhenFull
from tests.support.topics import Net, all_there

BUFFER_BYTES = 2 << 20
KERNEL_BYTES = 3 << 20
"""What the kernel's own buffers, and libzmq's between them, hold at most: what each connection on
this host may have there (2 MiB, `mesh.sockets.connections`), and what libzmq has in hand."""
SIZES = [100, 5_000, 70_000, 200_000, 1 << 20, 3 << 20]


@pytest.fixture(params=[0, 0.0005], ids=["single", "batched"])
def net(nets: Callable[..., Net], request: pytest.FixtureRequest) -> Net:
    return nets(buffer_bytes=BUFFER_BYTES, window_s=request.param)


def accepted_bytes(net: Net, when_full: WhenFull, sizes: list[int]) -> int:
    """Publish payloads of those sizes, in turn, to one that does not read: more than may be kept.
    Returns how many bytes of them it finds when it does, having accounted for all others."""
    publisher, subscriber = net.publisher("a", when_full=when_full), net.subscriber("a")
    count, sent = 0, 0
    with contextlib.suppress(Timeout):
        while sent < 8 * BUFFER_BYTES:
            size = sizes[count % len(sizes)]
            publisher.send(bytes(size), timeout=0.05)
            count, sent = count + 1, sent + size
    kept = 0

    def complete() -> bool:
        nonlocal kept, count
        for message in all_there(subscriber):
            kept, count = kept + len(message.payload), count - 1
        return count == sum(subscriber.lost.values())

    net.until(complete)
    return kept


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("when_full", ["drop", "wait"])
def test_whatever_the_size_of_messages_no_more_is_kept_than_the_buffers_of_both_ends(
    net: Net, when_full: WhenFull, size: int
) -> None:
    kept = accepted_bytes(net, when_full, [size])
    assert kept <= 2 * BUFFER_BYTES + KERNEL_BYTES + size
    if size >= limits.SLOT_BYTES_MIN:
        assert kept >= BUFFER_BYTES // 2, "and what was configured is made use of"
