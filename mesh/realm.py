"""The realm, as one node knows it: its name and, on a network, its key; and how both are proven.

HMAC-SHA256 under the realm's key. Without a key there is nothing to prove, and both sides must
agree on that too. No state, no I/O; nonces are the caller's.
"""

from __future__ import annotations

import hmac
from enum import Enum

import msgspec

from mesh.discovery.source import Announcement, signed
from mesh.sockets.control import Card


class Role(Enum):
    """Whose proof it is: were both alike, one side could be answered with its own."""

    DIALLER = b"mesh control 1 dialler\n"
    ACCEPTOR = b"mesh control 1 acceptor\n"


class Encounter(msgspec.Struct, frozen=True):
    """One handshake: who dialled whom, and the luck that each side put in."""

    dialler_id: str
    acceptor_id: str
    dialler_nonce: bytes
    acceptor_nonce: bytes


class Realm(msgspec.Struct, frozen=True):
    """`key` is None without a secret."""

    name: str
    key: bytes | None

    def proof(self, role: Role, encounter: Encounter) -> bytes:
        """What `role` says to prove that it knows the key; empty without one.

        Nonces have 16 bytes and ids 16 characters, so that only the last part varies in length.
        """
        if self.key is None:
            return b""
        e = encounter
        nonces = e.dialler_nonce + e.acceptor_nonce
        text = f"{e.dialler_id}{e.acceptor_id}{self.name}".encode()
        return hmac.digest(self.key, role.value + nonces + text, "sha256")

    def announce(self, card: Card) -> Announcement:
        """What the node of `card` announces of itself, tagged if there is a key."""
        tag = self._tag(card.id, card.endpoints)
        return Announcement(card.id, card.name, self.name, card.endpoints, tag)

    def trusts(self, announcement: Announcement) -> bool:
        """Whether whoever made `announcement` knew the key, or like us had none."""
        expected = self._tag(announcement.id, announcement.endpoints)
        return proves(announcement.tag.encode(errors="replace"), expected.encode())

    def _tag(self, node_id: str, endpoints: tuple[str, ...]) -> str:
        if self.key is None:
            return ""
        text = signed(node_id, self.name, _port(endpoints))
        return hmac.digest(self.key, text, "sha256").hex()


def proves(said: bytes, expected: bytes) -> bool:
    """Whether they are equal, in a time that does not tell how far."""
    return hmac.compare_digest(said, expected)


def _port(endpoints: tuple[str, ...]) -> int:
    for endpoint in endpoints:
        if endpoint.startswith("tcp://"):
            port = endpoint.rpartition(":")[2]
            return int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
    return 0
