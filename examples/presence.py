"""Presence: who is there, who came, who left and why.

    python examples/presence.py              # in several terminals; end some with Ctrl-C or kill -9
"""

import sys
import time

from mesh import Node

seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0

with Node("watcher") as node:

    @node.on_peer
    def tell(event):
        print(event.kind, event.peer.name, event.peer.pid, event.reason, flush=True)

    print("I am", node.id, flush=True)
    time.sleep(seconds)
    print("here now:", sorted(peer.pid for peer in node.peers.values()))
