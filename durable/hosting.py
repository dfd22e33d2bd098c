"""A sidecar as part of a node: its server, and what the node offers of it."""

from __future__ import annotations

from collections.abc import Callable

from mesh.durable.sidecar import Sidecar
from mesh.durable.storage import directory_of
from mesh.errors import LogLocked, StorageFailed
from mesh.message import PeerEvent
from mesh.sockets.control import Offer
from mesh.sockets.direct import DirectListener
from mesh.sockets.home import Core, Counters, Home, node_text
from mesh.sockets.server import Server
from mesh.sockets.server_relay import OPTIONS, Relay


class Hosting:
    """See above. Until `close`."""

    def __init__(
        self,
        directory: str,
        home: Home,
        *,
        add: Callable[..., object],
        offer: Callable[[Offer], object],
        next_key: Callable[[], int],
    ) -> None:
        """Open the sidecar in `directory`, which is made if need be, and serve it. `add` has the
        node look after a core, `offer` has it offer more. Raises `LogLocked`, `LogDamaged`,
        `StorageFailed`, `OSError`."""
        self._present = {node_text(home.node_id)}
        """Ids of nodes: this one, and its peers."""
        try:
            self.sidecar = Sidecar(
                directory_of(directory),
                hosts=self._host,
                is_present=self._present.__contains__,
                message_bytes_max=home.transport.message_bytes_max,
            )
        except FileExistsError as error:
            text = f"no log can be kept in {directory}, which is no directory"
            raise StorageFailed(text) from error
        except LogLocked as error:
            text = f"{error}: nodes without `durable` find it, and use its streams"
            raise LogLocked(text) from error
        except OSError as error:
            raise StorageFailed(f"no log can be kept in {directory}: {error}") from error
        self._offer = offer
        self._next_key = next_key
        self._direct: DirectListener | None = None
        try:
            partition = f"{self.sidecar.number:016x}"
            server = Server(
                home, partition, self.sidecar.handle, OPTIONS, kind="stream", runner=Relay
            )
            self._core: Core = server
            self._partition = partition
            self._endpoints = server.endpoints()
            path = home.transport.path_of("direct")
            self._direct = DirectListener(path, self.sidecar.handle, partition)
            home.transport.share(path)
            log = Offer(
                next_key(),
                "log",
                partition,
                self._endpoints,
                direct=path,
                message_bytes_max=home.transport.message_bytes_max,
            )
            add(server, log, *(self._host_offer(name) for name in sorted(self.sidecar.streams)))
        except BaseException:
            self._hang_up()
            self.sidecar.close(0)
            raise

    def observe(self, event: PeerEvent | None) -> None:
        """A peer came or went: who consumed here and is gone, holds nothing any more."""
        if event is None:
            return
        if event.kind == "joined":
            self._present.add(event.peer.id)
        else:
            self._present.discard(event.peer.id)
            self.sidecar.node_gone(event.peer.id)

    def count(self, total: Counters) -> None:
        """Add what its server has not counted: what came and went by direct lines."""
        if self._direct is not None:
            self._direct.count(total)

    def leave(self) -> None:
        """The node is about to close: nobody is to wait for records any more, and who appends asks
        another way, and waits for the log to come back. Does not block."""
        self._hang_up()
        self.sidecar.dismiss()

    def close(self) -> None:
        """Write what was accepted, and give up the directory."""
        self._hang_up()
        self.sidecar.close()

    def _hang_up(self) -> None:
        if self._direct is not None:
            self._direct.close()

    def _host(self, stream: str) -> None:
        self._offer(self._host_offer(stream))

    def _host_offer(self, stream: str) -> Offer:
        return Offer(self._next_key(), "host", stream, self._endpoints, partition=self._partition)
