"""What an announcement must look like before it goes any further, whoever wrote it.

Says nothing about whom it is from: that takes the realm's key, which is not known here.
"""

from __future__ import annotations

import re
from typing import Final

from mesh import limits
from mesh.discovery.source import Announcement
from mesh.names import is_node_name, is_printable

_IPC: Final = "ipc://"
_TAG = re.compile(r"[0-9a-f]{0,128}")
_NODE_ID = re.compile(r"[0-9a-f]{16}")
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_TCP = re.compile(rf"tcp://({_OCTET}(?:\.{_OCTET}){{3}}):([1-9]\d{{0,4}})", re.ASCII)


def is_plausible(announcement: Announcement) -> bool:
    """Whether every part of `announcement` is within its bounds and has its form."""
    return (
        is_node_id(announcement.id)
        and is_node_name(announcement.name)
        and is_node_name(announcement.realm)
        and _TAG.fullmatch(announcement.tag) is not None
        and len(announcement.endpoints) <= limits.ENDPOINTS_MAX
        and all(is_endpoint(endpoint) for endpoint in announcement.endpoints)
    )


def is_node_id(text: str) -> bool:
    """Whether `text` is 16 hexadecimal digits, in lower case."""
    return _NODE_ID.fullmatch(text) is not None


def parse_tcp(endpoint: str) -> tuple[str, int] | None:
    """The address and port of ``tcp://A.B.C.D:PORT``, or None if that is not what it is.

    An address nobody can be dialled at is none: unspecified (0.…), multicast and above (224 on).
    """
    match = _TCP.fullmatch(endpoint)
    if match is None:
        return None
    address, port = match[1], int(match[2])
    if port > 65535 or not 0 < int(address.split(".")[0]) < 224:
        return None
    return address, port


def is_socket(endpoint: str) -> bool:
    """Whether that is ``ipc:///PATH`` with a path that Linux has room for."""
    path = endpoint.removeprefix(_IPC)
    return (
        endpoint.startswith(f"{_IPC}/")
        and is_printable(path)
        and len(path.encode()) <= limits.SOCKET_PATH_BYTES_MAX
    )


def is_endpoint(endpoint: str) -> bool:
    """Whether a control link could be dialled there."""
    return is_socket(endpoint) or parse_tcp(endpoint) is not None
