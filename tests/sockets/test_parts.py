"""Messages of ZeroMQ, part by part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mesh import limits
from mesh.sockets.lending import lending
from mesh.sockets.parts import NO_COPY_BYTES_MIN, read_parts, send_parts
from tests.support.sockets import Pair, pipe


@pytest.fixture
def queue() -> Iterator[Pair]:
    with pipe(hwm=10) as pair:
        yield pair


@pytest.mark.parametrize("size", [10, NO_COPY_BYTES_MIN])
def test_room_that_libzmq_has_not_noticed_yet_is_found(queue: Pair, size: int) -> None:
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
