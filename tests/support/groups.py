"""Groups (`mesh.durable.group`), as tests ask them."""

from __future__ import annotations

from mesh.durable.group import DeadRecord, Group


def newly_dead(group: Group) -> list[DeadRecord]:
    """Those that died since the last call."""
    return list(iter(group.next_dead, None))
