"""Messages of ZeroMQ, part by part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from mesh import limits
from mesh.sockets.lending import lending
from mesh.sockets.parts import NO_COPY_BYTES_MIN, read_parts, send_parts


@pytest.fixture
def queue() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """One that pushes, and one that pulls."""
    context = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    for socket in (push, pull):
        socket.set_hwm(10)
    pull.bind("inproc://queue")
    push.connect("inproc://queue")
    yield push, pull
    push.close(linger=0)
    pull.close(linger=0)
    context.term()


@pytest.mark.parametrize("size", [10, NO_COPY_BYTES_MIN])
def test_room_that_libzmq_has_not_noticed_yet_is_found(
    queue: tuple[zmq.Socket[bytes], zmq.Socket[bytes]], size: int
) -> None:
    """It looks for that about once in a millisecond."""
    payload = bytes(size)
    push, pull = queue
    lending.allow(limits.BUFFER_BYTES)
    for _ in range(50):
        sent = 0
        while send_parts(push, [payload]):
            sent += 1
        assert sent > 9
        while read_parts(pull) is not None:
            sent -= 1
        assert sent == 0
        assert send_parts(push, [payload]), "all that was sent is read"
        assert read_parts(pull) is not None
