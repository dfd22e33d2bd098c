"""Presence: who is there, who came, who left and why.

python examples/presence.py      # in several terminals; end one with Enter, another with kill -9
"""

from mesh import Node, PeerEvent

with Node("watcher") as node:

    @node.on_peer
    def tell(event: PeerEvent) -> None:
        print(event.kind, event.peer.name, event.peer.pid, event.reason, flush=True)

    print("I am", node.id, flush=True)
    input()
    print("here now:", sorted(peer.pid for peer in node.peers.values()))
