"""Which IPv4 addresses this host has, as of now.

A snapshot, cheap enough to be taken several times a second: addresses come and go while a node
lives. Straight from the kernel (netdevice(7)): ifaddr, which zeroconf uses, takes 40 ms to import
and ten times as long for a look.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

_SIOCGIFCONF: Final = 0x8912
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 0x1
_IFF_LOOPBACK: Final = 0x8

_IFCONF = struct.Struct("iP")
_IFREQ_BYTES: Final = struct.calcsize("16sLLHBBB0L")
_IFREQ_ADDRESS: Final = 20
"""Offset of the IPv4 address: behind the name, and the family and port of a sockaddr_in."""
_ADDRESSES_MAX: Final = 1024


def addresses_of(interfaces: Iterable[str] | None) -> tuple[str, ...]:
    """IPv4 addresses of the interfaces that are up, sorted by their text.

    `interfaces` holds names (``eth0``) or addresses; what this host does not have right now is left
    out, since it may come. ``None``: all interfaces but the loopback. Raises `OSError` where the
    system does not tell.
    """
    wanted = None if interfaces is None else frozenset(interfaces)
    found = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name, address in _configured(probe):
            flags = _flags(probe, name)
            if wanted is None:
                chosen = not flags & _IFF_LOOPBACK
            else:
                chosen = address in wanted or name in wanted
            if chosen and flags & _IFF_UP:
                found.add(address)
    return tuple(sorted(found))


def _configured(probe: socket.socket) -> Iterator[tuple[str, str]]:
    """(interface, address) of each IPv4 address; an alias ``eth0:1`` is part of ``eth0``."""
    room = array.array("B", bytes(_ADDRESSES_MAX * _IFREQ_BYTES))
    request = _IFCONF.pack(len(room), room.buffer_info()[0])
    used: int = _IFCONF.unpack(fcntl.ioctl(probe, _SIOCGIFCONF, request))[0]
    for start in range(0, used, _IFREQ_BYTES):
        entry = room[start : start + _IFREQ_BYTES].tobytes()
        name = entry[:16].partition(b"\0")[0].decode(errors="replace")
        address = socket.inet_ntoa(entry[_IFREQ_ADDRESS : _IFREQ_ADDRESS + 4])
        yield name.partition(":")[0], address


def _flags(probe: socket.socket, interface: str) -> int:
    """The interface's flags; 0 where it has just gone."""
    try:
        answer = fcntl.ioctl(probe, _SIOCGIFFLAGS, struct.pack("16sH22x", interface.encode(), 0))
    except OSError:
        return 0
    return int(struct.unpack_from("H", answer, 16)[0])
