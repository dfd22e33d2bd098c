"""The table of control links: which there are, how far each has got, and until when it may take.

Part of `mesh.membership`, which decides what becomes of them. What the shell is to do is appended
to one list of effects, in order. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto
from itertools import count

import msgspec

from mesh import limits
from mesh.contacts import Contact
from mesh.deadlines import Deadlines
from mesh.peering import Dial, Effect, HangUp, Link, Peer, address_of
from mesh.sockets.control import Card


class State(Enum):
    """How far a link has got."""

    DIALLING = auto()
    """Dialled by us, HELLO sent."""
    WELCOMED = auto()
    """Accepted, WELCOME sent."""
    UP = auto()
    """Both sides proved themselves, and this is the link they use."""
    SPARE = auto()
    """The same peer is up over another link: what still arrives over this one is not read."""


class KnownLink(msgspec.Struct, eq=False):
    """One link, and what its handshake needs to remember."""

    key: Link
    state: State
    nonce: bytes
    """Ours."""
    told: Card
    """Ours, as the other side has it from the handshake."""
    contact: Contact | None = None
    """Whom we dialled; None for an accepted link."""
    endpoint: str = ""
    """What we dialled, or the host that dialled us (empty over ipc)."""
    card: Card | None = None
    """Of the other side, once it told."""
    knows: frozenset[str] = frozenset()
    """Whom the other side needs no introduction to."""
    expected: bytes = b""
    """For an accepted link: the proof that makes a peer of the dialler."""
    instead_of: Link | None = None
    """For an accepted link: the link that was up, at both ends, when the same peer dialled."""

    @property
    def node_id(self) -> str:
        """Whom it leads to; empty while that is not known."""
        return "" if self.card is None else self.card.id

    def peer(self, *, same_host: bool, now: float) -> Peer:
        """The node at the other end, now that it is known. Data goes over ipc where that works."""
        assert self.card is not None
        dialled = self.contact is not None
        host = "" if dialled else self.endpoint
        address = self.endpoint if dialled else address_of(self.card, same_host, host)
        return Peer(
            self.card,
            self.key,
            dialled,
            address,
            "ipc" if same_host or address.startswith("ipc://") else "tcp",
            same_host,
            host,
            heard=now,
        )


class Links:
    """Links by key. Each that is not up has a deadline."""

    def __init__(self, effects: list[Effect]) -> None:
        self.table: dict[Link, KnownLink] = {}
        self.deadlines: Deadlines[Link] = Deadlines()
        self._effects = effects
        self._numbers = count(1)
        self._in_state: dict[State, dict[Link, KnownLink]] = {state: {} for state in State}

    def count(self, state: State) -> int:
        return len(self._in_state[state])

    def in_state(self, state: State) -> Collection[KnownLink]:
        return self._in_state[state].values()

    def dial(
        self, contact: Contact, endpoint: str, own: Card, nonce: bytes, now: float
    ) -> KnownLink:
        key = next(self._numbers)
        contact.links[key] = endpoint
        self._effects.append(Dial(key, endpoint))
        return self._add(KnownLink(key, State.DIALLING, nonce, own, contact, endpoint), now)

    def accept(
        self, key: bytes, card: Card, host: str, own: Card, nonce: bytes, now: float
    ) -> KnownLink:
        return self._add(KnownLink(key, State.WELCOMED, nonce, own, None, host, card), now)

    def up(self, link: KnownLink) -> None:
        self._move(link, State.UP)
        self.deadlines.clear(link.key)
        self._no_longer_dialled(link)

    def spare(self, link: KnownLink, now: float) -> None:
        self._move(link, State.SPARE)
        self.deadlines.set(link.key, now + limits.HANDSHAKE_S)

    def hang_up(self, key: Link) -> None:
        """Forget it, and have the shell do so."""
        link = self.table.pop(key)
        del self._in_state[link.state][key]
        self.deadlines.clear(key)
        self._no_longer_dialled(link)
        self._effects.append(HangUp(key))

    def _add(self, link: KnownLink, now: float) -> KnownLink:
        self.table[link.key] = link
        self._in_state[link.state][link.key] = link
        self.deadlines.set(link.key, now + limits.HANDSHAKE_S)
        return link

    def _no_longer_dialled(self, link: KnownLink) -> None:
        if link.contact is not None and isinstance(link.key, int):
            link.contact.links.pop(link.key, None)

    def _move(self, link: KnownLink, state: State) -> None:
        del self._in_state[link.state][link.key]
        self._in_state[state][link.key] = link
        link.state = state
