"""The interface of every discovery source, and what it tells.

Discovery is a hint: a source says where somebody *might* be, and only the control link makes a
peer of it. A source never blocks its caller and never calls back: the control thread polls
`fileno`, and then takes what is there with `sightings`. Which nodes are trusted is not known here.
"""

from __future__ import annotations

from typing import Protocol

import msgspec


class Announcement(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """What a node says of itself where others may look."""

    id: str
    """Node id, 16 hexadecimal digits; empty where only an address is known (seeds)."""
    name: str
    """The label, for people."""
    realm: str
    endpoints: tuple[str, ...]
    """Addresses of its control link: ``ipc://…`` or ``tcp://A.B.C.D:PORT``."""
    tag: str = ""
    """HMAC under the realm's key over `signed`, hexadecimal; empty without a secret."""


class Sighting(msgspec.Struct, frozen=True):
    """A source saw an announcement, or saw it withdrawn."""

    source: str
    """``local``, ``mdns`` or ``seeds``."""
    announcement: Announcement
    """What was announced; of what was withdrawn, perhaps nothing but the id."""
    present: bool


def signed(node_id: str, realm: str, port: int) -> bytes:
    """The bytes that an announcement's tag is over (`port` 0: no network).

    Not over the addresses: a node has several, and they change while it lives.
    """
    return f"mesh announcement 1\n{realm}\n{node_id}\n{port}".encode()


class Source(Protocol):
    """One way to be found and to find. Every method may be called from the control thread only."""

    name: str

    def start(self, own: Announcement) -> None:
        """Announce `own` and begin to look. Does not wait for anything to be found.

        Raises `UnsafeRuntimeDir` or `OSError` where the source cannot work at all.
        """

    def fileno(self) -> int:
        """A descriptor, readable while `sightings` has something; -1: poll by `interval_s`."""

    @property
    def interval_s(self) -> float:
        """`sightings` wants to be called at least this often, in seconds."""

    def sightings(self) -> list[Sighting]:
        """What was seen since the last call, own announcements left out. May repeat."""

    def update(self, own: Announcement) -> None:
        """Announce `own` in place of what was announced: its endpoints changed."""

    def close(self) -> None:
        """Withdraw the announcement and stop looking, within a second. May be called twice."""
