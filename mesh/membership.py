"""Who is a peer: the state machine behind discovery, control links and liveness.

Takes events and `now` (monotonic seconds), returns effects (`mesh.peering`) for the shell to carry
out in order. No sockets, files, clock or threads; luck comes from the injected `nonce`.

Promises: discovery is a hint, and changes nothing about a live peer. A node is a peer once both
sides proved to be of the realm over the control link, and until that link, or the kernel, says
otherwise. Each peer has one link, the same at both ends, however many were dialled; its arrival is
told once. Nothing that a peer sends raises, and every table it can fill is bounded.

A link's states, and what moves it (everything else is counted and, on an accepted link, refused)::

    dialled     ── Dial ─▶ DIALLING ── Welcome ─▶ UP
    accepted    ── Hello ▶ WELCOMED ── Confirm ─▶ UP, or SPARE where another link is up

When two nodes dial each other at once, the one with the smaller id decides: it takes the link whose
handshake ends first. If that is its own, the other may think for a moment that its own was taken;
nothing came over that one (it is not `proven`), so it changes over without anybody noticing. A
Confirm from a peer whose link *was* proven when the new one was dialled says that the peer has
lost it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, count, islice

from mesh import limits
from mesh.contacts import PEERS, Contact, Contacts
from mesh.deadlines import Deadlines
from mesh.discovery.source import Announcement, Sighting
from mesh.handshake import Role, announce, is_tagged_by, proof, proves
from mesh.message import Untrusted
from mesh.names import is_name, is_node_name
from mesh.peering import (
    Acknowledged,
    ControlLink,
    Dial,
    Effect,
    HangUp,
    Link,
    LinkState,
    Peer,
    PeerDown,
    PeerMoved,
    PeerOffers,
    PeerUp,
    Send,
    UntrustedSeen,
    address_of,
    in_messages,
    reachable,
)
