"""The nodes of our side, one in each process.

Over tcp the workers are two hosts to each other: each has a runtime directory that the other cannot
see, since the path of it goes through ``/proc/self/cwd``, and one is the other's seed. That it is
tcp in plain text is checked.
"""

from __future__ import annotations

import os
import warnings

from bench.roles import Role
from mesh import InsecureWarning, Node

CONNECT_S = 20.0


def node_of(role: Role, *, first: bool = False, durable: str | None = None) -> Node:
    """A node; over tcp it dials the `first`."""
    setting, address = role.setting, role.address
    for variable in ("MESH_SECRET", "MESH_SEEDS"):
        os.environ.pop(variable, None)
    os.environ["MESH_REALM"] = "bench"
    options = {"compress": setting.compress} | dict(setting.options)
    if setting.transport == "ipc":
        os.environ["MESH_RUNTIME_DIR"] = f"{address.directory}/run"
    else:
        os.environ["MESH_RUNTIME_DIR"] = "/proc/self/cwd/run"
        warnings.simplefilter("ignore", InsecureWarning)
        options |= {"insecure_lan": True, "interfaces": ("127.0.0.1",), "discovery": ()}
        options |= {"port": address.port} if first else {"seeds": (f"127.0.0.1:{address.port}",)}
    return Node(type(role).__name__.lower(), durable=durable, **options)


def check_transport(node: Node, transport: str) -> None:
    found = {peer.transport for peer in node.peers.values()}
    if found != {transport}:
        raise RuntimeError(f"peers are reached over {found or 'nothing'}, not {transport}")
