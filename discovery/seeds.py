"""Addresses given by the user, for networks that multicast does not cross.

Each seed tells an address and nothing of who is there. Host names are resolved in threads of their
own, and again from time to time; one that does not resolve delays nobody and is no error.

Must not know: whether anybody answers. That is the control link's business.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from mesh import limits
from mesh.discovery.outbox import WATCHED_INTERVAL_S, Outbox
from mesh.discovery.plausible import parse_tcp
from mesh.discovery.source import Announcement, Sighting
from mesh.errors import InvalidOption

RESOLVE_INTERVAL_S: Final = 30.0
"""Between two looks at a host name: what many resolvers keep an answer for anyway."""

_CLOSE_S: Final = 0.2
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?", re.ASCII)

_log = logging.getLogger(__name__)


class Seed(NamedTuple):
    """A host name or IPv4 address, and a port."""

    host: str
    port: int


def parse_seed(text: str) -> Seed:
    """Read ``HOST:PORT``, with or without ``tcp://``; raise `InvalidOption` for anything else."""
    host, colon, digits = text.removeprefix("tcp://").rpartition(":")
    is_port = digits.isascii() and digits.isdigit() and 0 < int(digits[:6]) < 65536
    # A name whose last level is a number is no name (RFC 1123, 2.1), but a mistyped address.
    if host.rstrip(".").rpartition(".")[2].isdecimal():
        is_host = parse_tcp(f"tcp://{host}:1") is not None
    else:
        is_host = _HOST_NAME.fullmatch(host) is not None
    if not (colon and is_port and is_host and len(digits) <= 5):
        raise InvalidOption(f"seed {text!r} is not HOST:PORT (a name or IPv4 address, 1 to 65535)")
    return Seed(host, int(digits))


def resolve_ipv4(host: str) -> list[str]:
    """The IPv4 addresses of `host`. Blocks; raises `OSError` if there is none."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{host!r} cannot be put as a question to DNS: {error}") from error
    return sorted({str(address[0]) for *_, address in found})


class SeedsSource:
    """The source ``seeds``: one sighting for each address, since each may be another node."""

    name = "seeds"

    def __init__(
        self,
        seeds: Iterable[str],
        *,
        resolve: Callable[[str], list[str]] = resolve_ipv4,
        resolve_interval_s: float = RESOLVE_INTERVAL_S,
    ) -> None:
        """`seeds` are as `parse_seed` reads them. Raises `InvalidOption`."""
        self.unresolved = 0
        """How often a host name had no address."""
        self._seeds = tuple(dict.fromkeys(parse_seed(seed) for seed in seeds))
        if len(self._seeds) > limits.SEEDS_MAX:
            raise InvalidOption(f"{len(self._seeds):,} seeds over the limit of {limits.SEEDS_MAX}")
        self._resolve = resolve
        self._resolve_interval_s = resolve_interval_s
        self._outbox: Outbox | None = None
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        """Guards what follows, and the order in which changes are told."""
        self._own: frozenset[str] = frozenset()
        self._found: dict[Seed, frozenset[str]] = {}
        self._told: frozenset[str] = frozenset()

    def start(self, own: Announcement) -> None:
        """Tell the addresses, and begin to resolve the names. Does not block."""
        self._outbox = Outbox()
        self._own = frozenset(own.endpoints)
        for seed in self._seeds:
            if parse_tcp(_endpoint(seed.host, seed.port)):
                self._found_at(seed, [seed.host])
            else:
                thread = threading.Thread(
                    target=self._watch, args=(seed,), name=f"mesh-seed-{seed.host}", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def fileno(self) -> int:
        """A descriptor that is readable while there is something new."""
        return self._outbox.fileno() if self._outbox else -1

    @property
    def interval_s(self) -> float:
        """Seconds; the descriptor tells sooner."""
        return WATCHED_INTERVAL_S

    def sightings(self) -> list[Sighting]:
        """Addresses that were found, or that no name has any longer. One's own are left out."""
        return self._outbox.take() if self._outbox else []

    def update(self, own: Announcement) -> None:
        """Leave out the addresses of `own` from now on, in place of those it had before."""
        with self._lock:
            self._own = frozenset(own.endpoints)
            self._tell_changes()

    def close(self) -> None:
        """Stop looking. A question that DNS has not answered ends by itself, unheard."""
        self._closing.set()
        if self._outbox:
            self._outbox.close()
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _watch(self, seed: Seed) -> None:
        """Resolve one name until the source is closed."""
        failing = False
        while not self._closing.is_set():
            try:
                addresses = self._resolve(seed.host)[: limits.ENDPOINTS_MAX]
            except OSError as error:
                with self._lock:
                    self.unresolved += 1
                if not failing:
                    _log.warning("seed %s:%d does not resolve: %s", seed.host, seed.port, error)
                failing = True
            else:
                failing = False
                self._found_at(seed, addresses)
            self._closing.wait(self._resolve_interval_s)

    def _found_at(self, seed: Seed, addresses: list[str]) -> None:
        with self._lock:
            self._found[seed] = frozenset(_endpoint(address, seed.port) for address in addresses)
            self._tell_changes()

    def _tell_changes(self) -> None:
        """Put out what all seeds together have more, or less, than was told. The lock is held."""
        wanted = frozenset[str]().union(*self._found.values()) - self._own
        for endpoint in sorted(wanted ^ self._told):
            announcement = Announcement(id="", name="", realm="", endpoints=(endpoint,))
            if self._outbox:
                present = endpoint in wanted
                self._outbox.put(endpoint, Sighting(self.name, announcement, present))
        self._told = wanted


def _endpoint(host: str, port: int) -> str:
    return f"tcp://{host}:{port}"
