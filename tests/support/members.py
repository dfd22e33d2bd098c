"""Nodes of a simulated network in tests of membership, and one that speaks the protocol by hand."""

from __future__ import annotations

from mesh.peering import Effect, Send
from mesh.sockets.control import (
    PROTOCOL,
    Card,
    Confirm,
    Hello,
    Offer,
)
from tests.support.network import Network, SimNode

KEY = b"k" * 32
ELSEWHERE = "10.0.0.2"


def are_peers(*nodes: SimNode) -> bool:
    return all(n.peers == {other.id for other in nodes if other is not n} for n in nodes)


def met(network: Network, *nodes: SimNode, source: str = "mdns") -> None:
    """All of `nodes` see each other and become peers."""
    for seer in nodes:
        for seen in nodes:
            if seer is not seen:
                network.see(seer, seen, source)
    network.run_until(lambda: are_peers(*nodes), 1.0)


def offer(key: int, channel: str = "jobs", endpoint: str = "tcp://*:9") -> Offer:
    return Offer(key, "pull", channel, (endpoint,), prefetch=4)


def replies(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


class Raw:
    """Somebody who speaks the protocol by hand, over accepted links of `node`."""

    def __init__(self, node: SimNode, node_id: str = "f" * 16, name: str = "raw") -> None:
        self.node = node
        self.card = Card(node_id, name, ("tcp://10.9.9.9:1",))
        self.links = 0

    def connect(self) -> bytes:
        self.links += 1
        return f"{self.card.id} {self.links}".encode()

    def say(self, link: bytes, message: object) -> list[object]:
        now = self.node.network.now
        effects = self.node.membership.received(link, message, now, address="10.9.9.9")  # type: ignore[arg-type]
        self.node._apply(effects)
        return replies(effects)

    def hello(self, link: bytes, **changes: object) -> list[object]:
        fields: dict[str, object] = {
            "protocol": PROTOCOL,
            "realm": "default",
            "card": self.card,
            "nonce": b"r" * 16,
        }
        return self.say(link, Hello(**(fields | changes)))  # type: ignore[arg-type]

    def join(self) -> bytes:
        link = self.connect()
        self.hello(link)
        self.say(link, Confirm())
        assert self.card.id in self.node.peers
        return link
