"""What membership deals in: control links, peers, and the effects it asks its shell for.

Values, and the few questions a peer answers about itself. What happens to them is decided in
`mesh.membership`; nothing here knows sockets, clocks or discovery.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import msgspec

from mesh import limits
from mesh.discovery.plausible import is_endpoint, is_socket, parse_tcp
from mesh.message import PeerInfo, Untrusted
from mesh.names import is_name, is_node_name
from mesh.sockets.control import Card, ControlMessage, Introduction, Offer

_encoder = msgspec.msgpack.Encoder()
_ENVELOPE_BYTES = 64
"""What a control message has around its list."""

Link = int | bytes
"""A control link: a number that membership chose when it dialled, or the routing id, as the shell
has it, of one that was accepted. A connection that broke and came back is another link."""


class Peer(msgspec.Struct, eq=False):
    """Another node that is up, as membership sees it. Only membership changes it."""

    card: Card
    link: Link
    dialled: bool
    """Whether this node dialled the link."""
    address: str
    """The endpoint of its control link by which it is reached."""
    transport: Literal["ipc", "tcp"]
    same_host: bool
    remote_host: str
    """The IP from which an accepted link came; empty over ipc, or if dialled."""
    heard: float
    """When it last said anything, in seconds of the shell's clock."""
    ping_at: float = 0.0
    proven: bool = False
    """Whether anything came over the link since it is up: only then it is up at both ends."""
    expects: frozenset[str] = frozenset()
    """Whom it is about to meet anyway, of those that are no peers of this node yet."""
    offers: dict[int, Offer] = msgspec.field(default_factory=dict)
    ping_stamp: int = -1
    round_trip_s: float | None = None

    @property
    def id(self) -> str:
        return self.card.id

    @property
    def info(self) -> PeerInfo:
        """What users see of it."""
        return PeerInfo(
            self.card.id,
            self.card.name,
            self.transport,
            self.address,
            self.card.pid,
            self.same_host,
        )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where its control link may be found: what worked comes first."""
        return tuple(dict.fromkeys((self.address, *self.card.endpoints)))[: limits.ENDPOINTS_MAX]

    def introduction(self) -> Introduction:
        return Introduction(self.card.id, self.card.name, self.endpoints)

    def data_endpoint(self, endpoints: Iterable[str]) -> str | None:
        """Which one of an offer's (or the card's `topics`) endpoints data links connect to.

        Exactly one, since a SUB that connected twice receives everything twice. With tcp it is
        at the host where the control link reaches the peer, whatever addresses that has.
        """
        for endpoint in endpoints:
            if endpoint.startswith(f"{self.transport}://"):
                if self.transport == "ipc":
                    return endpoint
                return f"tcp://{host_of(self.address)}:{endpoint.rpartition(':')[2]}"
        return None


# Effects: what the shell is to do, in this order


class Dial(msgspec.Struct, frozen=True):
    """Connect a new link; what is sent on it may wait for the connection."""

    link: int
    endpoint: str


class HangUp(msgspec.Struct, frozen=True):
    """This link is done with: close it if it was dialled, forget it if it was accepted."""

    link: Link


class Send(msgspec.Struct, frozen=True):
    link: Link
    message: ControlMessage


class PeerUp(msgspec.Struct, frozen=True):
    peer: Peer


class PeerDown(msgspec.Struct, frozen=True):
    peer: Peer
    reason: str
    """``bye``, ``died``, ``silent``, ``reset`` (one end lost the link), or why it refused."""


class PeerOffers(msgspec.Struct, frozen=True):
    peer_id: str
    add: tuple[Offer, ...]
    drop: tuple[int, ...]


class PeerMoved(msgspec.Struct, frozen=True):
    """The address by which it is reached changed, and where its channels are with it."""

    peer: Peer


class Acknowledged(msgspec.Struct, frozen=True):
    """The peer's subscriber at `address` has received its baseline mark."""

    peer_id: str
    address: str
    waits: bool
    """Of this node's topics that wait, or of those that drop."""


class UntrustedSeen(msgspec.Struct, frozen=True):
    untrusted: Untrusted


Effect = (
    Dial | HangUp | Send | PeerUp | PeerDown | PeerOffers | PeerMoved | Acknowledged | UntrustedSeen
)


# Endpoints


def host_of(endpoint: str) -> str:
    """``tcp://HOST:PORT`` → ``HOST``."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0]


def reachable(endpoints: Iterable[str], *, ipc: bool) -> tuple[str, ...]:
    """Those that can be dialled, without repeats; sockets of this machine only with `ipc`."""
    fits = is_endpoint if ipc else parse_tcp
    return tuple(dict.fromkeys(e for e in endpoints if fits(e)))[: limits.ENDPOINTS_MAX]


def is_sound_card(card: Card) -> bool:
    """Whether a node may say that of itself: a name for people, and addresses of its own."""
    return (
        is_node_name(card.name)
        and all(_is_own_socket(e, card.id) or parse_tcp(e) for e in card.endpoints)
        and all(_is_bound(e, card.id) for e in card.topics)
    )


def is_sound_offer(offer: Offer, node_id: str) -> bool:
    """Whether the node of that id may offer that."""
    return (
        is_name(offer.channel)
        and offer.prefetch <= limits.PREFETCH_MAX
        and all(_is_bound(e, node_id) for e in offer.endpoints)
    )


def _is_bound(endpoint: str, node_id: str) -> bool:
    """Whether data links may be told to go there. With tcp a peer says no host: it is reached where
    its control link is."""
    any_host = "tcp://*:"
    if endpoint.startswith(any_host):
        return parse_tcp(endpoint.replace(any_host, "tcp://127.0.0.1:", 1)) is not None
    return _is_own_socket(endpoint, node_id)


def _is_own_socket(endpoint: str, node_id: str) -> bool:
    """All sockets of a node bear its id: nobody is sent to those of another program."""
    return is_socket(endpoint) and endpoint.rpartition("/")[2].startswith(f"{node_id}.")


T = TypeVar("T")


def in_messages(items: Iterable[T]) -> Iterator[tuple[T, ...]]:
    """Split `items` so that each part fits in one control message; at least one, perhaps empty."""
    part: list[T] = []
    size = 0
    for item in items:
        item_bytes = len(_encoder.encode(item))
        if part and size + item_bytes > limits.CONTROL_BYTES_MAX - _ENVELOPE_BYTES:
            yield tuple(part)
            part, size = [], 0
        part.append(item)
        size += item_bytes
    yield tuple(part)


def address_of(card: Card, same_host: bool, remote_host: str) -> str:
    """The endpoint by which the node of `card`, which dialled us from `remote_host`, is reached.

    `remote_host` is empty for a link over ipc.
    """
    tcp = [e for e in card.endpoints if e.startswith("tcp://")]
    ipc = [e for e in card.endpoints if e.startswith("ipc://")]
    if ipc and (same_host or not remote_host):
        return ipc[0]
    same = [e for e in tcp if host_of(e) == remote_host]
    return (same or tcp or ipc or [""])[0]
