"""What nodes say to each other over the control link: typed messages, strictly validated.

Each travels as the one payload of a frame of kind CONTROL (`mesh.sockets.frame`), as a MessagePack
map whose key ``t`` names the message. Decoding checks every type and bound; who may say what, and
when, is membership's business.

The handshake, dialler first::

    Hello ──────────────▶
          ◀────────────── Welcome   (or Refuse)
    Confirm ────────────▶           (or Refuse)
    Offers ◀────────────▶ Offers    both are peers from here on
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from mesh import limits

PROTOCOL: Final = 1

Text = Annotated[str, msgspec.Meta(max_length=255)]
NodeId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$", max_length=16)]
Endpoint = Annotated[str, msgspec.Meta(max_length=255)]
Endpoints = Annotated[tuple[Endpoint, ...], msgspec.Meta(max_length=limits.ENDPOINTS_MAX)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Proof = Annotated[bytes, msgspec.Meta(max_length=32)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]

OfferKind = Literal["publish", "pull", "push", "serve", "log", "host", "record"]


class Wire(msgspec.Struct, frozen=True, tag_field="t", omit_defaults=True):
    """The root of the messages. Unknown fields are ignored, so that later versions may add some."""


class Card(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who a node is: what HELLO and WELCOME carry."""

    id: NodeId
    name: Text
    endpoints: Endpoints
    """Of the control link, ipc first."""
    topics: Endpoints = ()
    """Of the XPUB sockets that all topics of the node share."""
    boot: Text = ""
    """Boot id of the kernel; equal on one host."""
    pid: Natural = 0
    pid_space: Text = ""
    """The pid namespace in which `pid` means something."""
    started: Natural = 0
    """Start time of the process in clock ticks since boot: tells a recycled pid."""


class Offer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing a node does on one channel."""

    key: Natural
    """Unique in the node; an offer never changes, it is withdrawn."""
    kind: OfferKind
    channel: Text
    endpoints: Endpoints = ()
    """Where its socket is bound: ``ipc:///PATH``, ``tcp://*:PORT``. For ``publish``: empty for a
    topic that drops, which is on the card's `topics`; else where topics that wait are."""
    prefetch: Natural = 0
    """For ``pull``: the credit each pusher starts with."""
    partition: Text = ""
    """For ``host`` and ``record``, of a stream: which sidecar that is. The channel of its
    ``log``."""
    direct: Text = ""
    """For ``log``: where its direct line is (`mesh.sockets.direct`)."""
    message_bytes_max: Natural = 0
    """For ``log``: of what it takes. 0: it does not say."""
    pattern: Text = ""
    """For ``record``: of the node's own topics that are recorded into that stream."""


class Hello(Wire, frozen=True, tag="hello", omit_defaults=True):
    protocol: Natural
    realm: Text
    card: Card
    nonce: Nonce
    knows: Annotated[tuple[NodeId, ...], msgspec.Meta(max_length=limits.INTRODUCTIONS_MAX)] = ()
    """Whom the dialler knows of already, and needs no introduction to."""


class Welcome(Wire, frozen=True, tag="welcome", omit_defaults=True):
    card: Card
    nonce: Nonce
    proof: Proof = b""
    """HMAC under the realm's key over both nonces and ids; empty without a secret."""
    knows: Annotated[tuple[NodeId, ...], msgspec.Meta(max_length=limits.INTRODUCTIONS_MAX)] = ()


class Confirm(Wire, frozen=True, tag="confirm", omit_defaults=True):
    proof: Proof = b""


class Refuse(Wire, frozen=True, tag="refuse", omit_defaults=True):
    """Not a peer: ``version``, ``realm``, ``secret``, ``self``, ``full`` or ``unknown``."""

    reason: Text
    detail: Text = ""


class Offers(Wire, frozen=True, tag="offers", omit_defaults=True):
    """What is offered from now on, and what no longer is."""

    add: tuple[Offer, ...] = ()
    drop: tuple[Natural, ...] = ()


class Introduction(msgspec.Struct, frozen=True, omit_defaults=True):
    id: NodeId
    name: Text
    endpoints: Endpoints


class Peers(Wire, frozen=True, tag="peers", omit_defaults=True):
    """Peers of the sender that the receiver did not say it knows."""

    peers: Annotated[tuple[Introduction, ...], msgspec.Meta(max_length=limits.INTRODUCTIONS_MAX)]


class Ping(Wire, frozen=True, tag="ping", omit_defaults=True):
    stamp: Natural
    """The sender's own monotonic clock in nanoseconds; only the sender reads it."""


class Pong(Wire, frozen=True, tag="pong", omit_defaults=True):
    stamp: Natural


class Marked(Wire, frozen=True, tag="marked", omit_defaults=True):
    """A subscriber has received the mark that answers its subscription: it misses nothing now."""

    address: Annotated[str, msgspec.Meta(max_length=limits.SUBSCRIPTION_BYTES_MAX)]
    waits: bool = False
    """Of the topics that wait, which have sockets and marks of their own."""


class Moved(Wire, frozen=True, tag="moved", omit_defaults=True):
    """The sender's endpoints changed."""

    card: Card


class Bye(Wire, frozen=True, tag="bye", omit_defaults=True):
    reason: Text = ""


ControlMessage = (
    Hello | Welcome | Confirm | Refuse | Offers | Peers | Ping | Pong | Marked | Moved | Bye
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ControlMessage)


def encode_control(message: ControlMessage) -> bytes:
    """The body of a CONTROL frame."""
    return _encoder.encode(message)


def decode_control(body: bytes | memoryview) -> ControlMessage | None:
    """The message in a CONTROL frame's body, or None if it is not one."""
    if len(body) > limits.CONTROL_BYTES_MAX:
        return None
    try:
        message: ControlMessage = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return message
