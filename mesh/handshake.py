"""How a node proves that it belongs to the realm: tags of announcements, proofs of the handshake.

HMAC-SHA256 under the realm's key. Without a key there is nothing to prove, and both sides must
agree on that too. No state, no I/O; nonces are the caller's.
"""

from __future__ import annotations

import hmac
from enum import Enum

from mesh.discovery.source import Announcement, signed
from mesh.sockets.control import Card


class Role(Enum):
    """Whose proof it is: were both alike, one side could be answered with its own."""

    DIALLER = b"mesh control 1 dialler\n"
    ACCEPTOR = b"mesh control 1 acceptor\n"


def proof(
    key: bytes | None,
    role: Role,
    *,
    realm: str,
    dialler_id: str,
    acceptor_id: str,
    dialler_nonce: bytes,
    acceptor_nonce: bytes,
) -> bytes:
    """What `role` says to prove that it knows `key`; empty without one.

    Nonces have 16 bytes and ids 16 characters, so that only the last part varies in length.
    """
    if key is None:
        return b""
    parts = (role.value, dialler_nonce, acceptor_nonce, dialler_id.encode(), acceptor_id.encode())
    return hmac.digest(key, b"".join(parts) + realm.encode(), "sha256")


def proves(said: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(said, expected)


def announce(card: Card, realm: str, key: bytes | None) -> Announcement:
    """What the node of `card` announces of itself, tagged if there is a key."""
    tag = _tag(key, card.id, realm, card.endpoints)
    return Announcement(card.id, card.name, realm, card.endpoints, tag)


def is_tagged_by(key: bytes | None, announcement: Announcement) -> bool:
    """Whether whoever made `announcement` knew `key`, or as we do had none."""
    a = announcement
    expected = _tag(key, a.id, a.realm, a.endpoints)
    return proves(a.tag.encode(errors="surrogatepass"), expected.encode())


def _tag(key: bytes | None, node_id: str, realm: str, endpoints: tuple[str, ...]) -> str:
    if key is None:
        return ""
    text = signed(node_id, realm, _port(endpoints))
    return hmac.digest(key, text, "sha256").hex()


def _port(endpoints: tuple[str, ...]) -> int:
    for endpoint in endpoints:
        if endpoint.startswith("tcp://"):
            port = endpoint.rpartition(":")[2]
            return int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
    return 0
