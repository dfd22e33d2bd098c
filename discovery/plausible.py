"""What an announcement must look like before it goes any further, whoever wrote it.

Says nothing about whom it is from: that takes the realm's key, which is not known here.
"""

from __future__ import annotations

import re
from typing import Final

from mesh import limits
from mesh.discovery.source import Announcement
from mesh.errors import InvalidName
from mesh.names import check_node_name

_ENDPOINT_BYTES_MAX: Final = 255
_TAG = re.compile(r"[0-9a-f]{0,128}")
_NODE_ID = re.compile(r"[0-9a-f]{16}")
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_TCP = re.compile(rf"tcp://({_OCTET}(?:\.{_OCTET}){{3}}):([1-9]\d{{0,4}})", re.ASCII)


def is_plausible(announcement: Announcement) -> bool:
    """Whether every part of `announcement` is within its bounds and has its form."""
    try:
        check_node_name(announcement.name)
        check_node_name(announcement.realm)
    except InvalidName:
        return False
    return (
        is_node_id(announcement.id)
        and _TAG.fullmatch(announcement.tag) is not None
        and len(announcement.endpoints) <= limits.ENDPOINTS_MAX
        and all(_is_endpoint(endpoint) for endpoint in announcement.endpoints)
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


def _is_endpoint(endpoint: str) -> bool:
    if len(endpoint.encode(errors="surrogatepass")) > _ENDPOINT_BYTES_MAX:
        return False
    if endpoint.startswith("ipc:///"):
        return "\0" not in endpoint
    return parse_tcp(endpoint) is not None
