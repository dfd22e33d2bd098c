"""What the C library does with the memory of large payloads.

glibc gives freed memory at a heap's end back to the system from 128 KiB on, and takes it again,
zeroed and page by page, for the next payload: 20 to 50 page faults for each message of 1 MiB, and a
quarter of the throughput. It raises that bound by itself to twice the size of the largest block
that it mapped and that was freed. So such a block is allocated, not touched, and freed once; other
C libraries take no notice. What a process keeps by that is at most 16 times its largest payload,
and 64 MiB, for each of its threads that received one.
"""

from __future__ import annotations

from typing import Final

_TIMES: Final = 8
_LEARNED_BYTES_MAX: Final = 32 * 1024 * 1024 - 64 * 1024
"""glibc learns from no larger block."""

_known = 0


def expect(size: int) -> None:
    """Payloads of `size` bytes come and go."""
    global _known
    if size > _known:
        _known = size
        bytes(min(_TIMES * size, _LEARNED_BYTES_MAX))
