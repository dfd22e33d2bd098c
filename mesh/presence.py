"""Who is there, as users see it, and how they hear of changes.

The control thread says what changed; any thread may look and wait.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from types import MappingProxyType

from mesh.message import PeerEvent, PeerInfo
from mesh.sockets.sleeping import NAP_S

logger = logging.getLogger(__name__)

Observer = Callable[[PeerEvent | None], object]


class Presence:
    """The peers of a node, and those who want to be told."""

    def __init__(self) -> None:
        self.peers: Mapping[str, PeerInfo] = MappingProxyType({})
        """By node id; replaced with every change, never changed."""
        self.observers: list[Observer] = []
        """Called in the control thread with every event, and with None when the node begins to
        close and when it has ended. They must not block."""

    def changed(self, event: PeerEvent) -> None:
        peers = dict(self.peers)
        if event.kind == "joined":
            peers[event.peer.id] = event.peer
        else:
            peers.pop(event.peer.id, None)
        self.peers = MappingProxyType(peers)
        self.tell(event)

    def observe(self, observer: Observer) -> None:
        """Tell it who is here, and from now on what changes. In the control thread, so that nobody
        comes or goes between the two."""
        for peer in self.peers.values():
            observer(PeerEvent("joined", peer, ""))
        self.observers.append(observer)

    def tell(self, event: PeerEvent | None) -> None:
        """Tell all observers, whatever one of them raises."""
        for observer in tuple(self.observers):
            try:
                observer(event)
            except Exception:  # none of them may keep the others, or the node, from going on
                logger.exception("an observer raised on %r", event)

    def wait_until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Block until `condition()`, which is looked at after every event; False if it has not come
        after `timeout` seconds (None: wait for ever)."""
        news: SimpleQueue[object] = SimpleQueue()
        observer = news.put
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        self.observers.append(observer)
        try:
            while not condition():
                if (left := deadline - time.monotonic()) <= 0:
                    return False
                with contextlib.suppress(Empty):
                    news.get(timeout=min(left, NAP_S))
            return True
        finally:
            self.observers.remove(observer)
