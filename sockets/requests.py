"""Requests a client waits for: which server has which, who gets the next, what ends one.

No I/O and no clock. Every request that a server accepted is answered exactly once, by a result or
an error, so what a server still owes is known, and the one that owes least gets the next request.
A request that its caller gave up counts until its answer comes: a server that hangs would look idle
otherwise, and attract all that follow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

from mesh import limits
from mesh.errors import Busy

R = TypeVar("R", bound="Outstanding")


class Outstanding:
    """One request, from its call until its outcome."""

    __slots__ = ("retry", "seq", "server", "tried")

    def __init__(self, retry: bool) -> None:
        self.retry = retry
        """Whether it may be sent again when the server that had it is gone."""
        self.seq = 0
        """Its id; 0 until it is admitted."""
        self.server: object | None = None
        self.tried: tuple[object, ...] = ()
        """Servers that were too busy for it."""


class ServerAccount(Generic[R]):
    """What a client keeps of one server."""

    __slots__ = ("abandoned", "key", "peer", "requests")

    def __init__(self, peer: int, key: int) -> None:
        self.peer = peer
        self.key = key
        self.requests: dict[int, R] = {}
        self.abandoned = 0
        """Requests it has not answered, but nobody waits for."""

    @property
    def owes(self) -> int:
        return len(self.requests) + self.abandoned


class RequestTable(Generic[R]):
    """All requests and servers of one client."""

    def __init__(self, channel: str, requests_max: int = limits.OUTSTANDING_MAX) -> None:
        self.waiting: dict[int, R] = {}
        """Those that no server has, in the order in which they came."""
        self._channel = channel
        self._requests_max = requests_max
        self._servers: OrderedDict[tuple[int, int], ServerAccount[R]] = OrderedDict()
        self.outstanding = 0
        """How many there are."""
        self.last_seq = 0

    def __len__(self) -> int:
        return self.outstanding

    @property
    def servers(self) -> int:
        return len(self._servers)

    # -- A request's life --------------------------------------------------------------------

    def admit(self, request: R) -> None:
        """A new request, which no server has yet. Raises `Busy` when the table is full."""
        if self.outstanding >= self._requests_max:
            raise Busy(
                f"{self.outstanding:,} requests to {self._channel!r} are outstanding, "
                "which is the limit"
            )
        self.outstanding += 1
        self.last_seq = seq = self.last_seq + 1
        request.seq = seq
        self.waiting[seq] = request

    def assign(self, request: R) -> ServerAccount[R] | None:
        """Admit a request and place it in one go: the server that has it now, if there is one, and
        nobody waits, who would be before it."""
        servers = self._servers
        if len(servers) != 1 or self.waiting or self.outstanding >= self._requests_max:
            behind = bool(self.waiting)
            self.admit(request)
            best = None if behind else self.choose(request)
            if best is not None:
                self.placed(request, best)
            return best
        self.outstanding += 1
        self.last_seq = seq = self.last_seq + 1
        for server in servers.values():
            request.seq = seq
            request.server = server
            server.requests[seq] = request
            return server
        return None

    def adopt(self, request: R, server: ServerAccount[R], seq: int) -> None:
        """A request that has that number already, and that `server` was sent."""
        self.outstanding += 1
        request.seq = seq
        request.server = server
        server.requests[seq] = request

    def put_back(self, request: R, server: ServerAccount[R]) -> None:
        """There was no room for it after all: it waits."""
        del server.requests[request.seq]
        request.server = None
        self.waiting[request.seq] = request

    def choose(self, request: R, full: Iterable[ServerAccount[R]] = ()) -> ServerAccount[R] | None:
        """Of the servers not tried and not `full` the one that owes least; of equals the one
        longest unused."""
        best: ServerAccount[R] | None = None
        least = 0
        for server in self._servers.values():
            owes = len(server.requests) + server.abandoned
            if (best is None or owes < least) and not (server in request.tried or server in full):
                best, least = server, owes
                if not owes:
                    break
        return best

    def placed(self, request: R, server: ServerAccount[R]) -> None:
        """`server` has the request now."""
        del self.waiting[request.seq]
        request.server = server
        server.requests[request.seq] = request
        self._servers.move_to_end((server.peer, server.key))

    def answered(self, server: ServerAccount[R], seq: int) -> R | None:
        """`server` answered that request: it leaves the table. None if nobody waits for it."""
        request = server.requests.pop(seq, None)
        if request is not None:
            self.outstanding -= 1
        return request

    def owed(self, server: ServerAccount[R]) -> bool:
        """An answer that nobody waits for: whether it was expected, because a caller gave up."""
        if not server.abandoned:
            return False
        server.abandoned -= 1
        return True

    def refused(self, server: ServerAccount[R], request: R, *, patient: bool = False) -> bool:
        """`server`, which just answered, was too busy: False if there is no other to try.

        Else the request waits to be placed; so does one that is `patient`, until others come.
        """
        request.tried = (*request.tried, server)
        request.server = None
        if self.choose(request) is None and not patient:
            return False
        self.outstanding += 1
        self.waiting[request.seq] = request
        if patient:
            self.waiting = dict(sorted(self.waiting.items()))
        return True

    def abandon(self, request: R) -> ServerAccount[R] | None:
        """The caller gave up: the server that has to be told, if any."""
        if self.waiting.pop(request.seq, None) is not None:
            self.outstanding -= 1
            return None
        server = request.server
        if not isinstance(server, ServerAccount) or request.seq not in server.requests:
            return None
        del server.requests[request.seq]
        self.outstanding -= 1
        server.abandoned += 1
        return server

    # -- Servers -----------------------------------------------------------------------------

    def join(self, peer: int, key: int) -> ServerAccount[R]:
        """A server comes, which is not here yet."""
        server = self._servers[peer, key] = ServerAccount(peer, key)
        self._servers.move_to_end((peer, key), last=False)
        return server

    def find(self, peer: int, key: int) -> ServerAccount[R] | None:
        return self._servers.get((peer, key))

    def leave(self, server: ServerAccount[R]) -> list[R]:
        """A server is gone: the requests that went with it. Those to be retried wait again, and of
        all that wait none is kept from a server for having been turned away there before: there may
        be no other any more."""
        del self._servers[server.peer, server.key]
        lost, again = [], {}
        for seq, request in server.requests.items():
            request.server = None
            if request.retry:
                again[seq] = request
            else:
                self.outstanding -= 1
                lost.append(request)
        server.requests.clear()
        if again:  # they go before those that came later and wait, too
            self.waiting = dict(sorted({**again, **self.waiting}.items()))
        for request in self.waiting.values():
            request.tried = ()
        return lost
