"""How every socket of a node is made: options, security, and where it is bound.

An ipc socket lies in the runtime directory, which only this user (or a group, `share_path`) can
enter, and speaks plain text.
A tcp socket exists only on a network, and speaks CURVE, checked by ZAP, unless the user asked for
plain text. Linger is 0 until a socket is closed, which says how long.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import msgspec
import zmq

from mesh import limits
from mesh.errors import Closed
from mesh.sockets.curve import ZAP_DOMAIN, Keys
from mesh.sockets.lending import lending

logger = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]

_ZAP_ENFORCE_DOMAIN: Final = 93
_RECONNECT_STOP: Final = 109
_RECONNECT_STOP_HANDSHAKE_FAILED: Final = 2
_RECONNECT_MS: Final = 100
_RECONNECT_MS_MAX: Final = 5000
_KEEPALIVE_S: Final = 10
_KEEPALIVE_PROBES: Final = 3
_HANDSHAKE_MS: Final = 3000
_SOCKETS_MAX: Final = 4096
_DESCRIPTORS_FREE: Final = 16
"""What there must be before a socket is made. The first needs most, eight, for libzmq's threads;
and others may open some meanwhile."""


class Bound(msgspec.Struct, eq=False):
    """A socket that others connect to."""

    socket: Socket
    scheme: str
    path: str = ""
    """Of an ipc socket."""
    port: int = 0
    """Of a tcp socket: the same on all addresses."""
    hosts: set[str] = msgspec.field(default_factory=set)
    """The addresses a tcp socket is bound to; empty: all there are and will be."""

    @property
    def endpoint(self) -> str:
        """Where it is reached. ``*`` stands for whichever address of this host reaches it."""
        return f"ipc://{self.path}" if self.scheme == "ipc" else f"tcp://*:{self.port}"


class Transport:
    """Makes the sockets of one node, in a ZeroMQ context of its own (ZAP is per context)."""

    def __init__(
        self,
        *,
        socket_path: Callable[[str], str],
        share_path: Callable[[str], object] = lambda path: None,
        remove_path: Callable[[str], object] = lambda path: None,
        networked: bool = False,
        addresses: tuple[str, ...] = (),
        interfaces_named: bool = False,
        keys: Keys | None = None,
        buffer_messages: int = limits.BUFFER_MESSAGES,
        buffer_bytes: int = limits.BUFFER_BYTES,
        message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
    ) -> None:
        _check_descriptors()
        self.context: zmq.Context[Socket] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, _SOCKETS_MAX)
        self.keys = keys
        self.message_bytes_max = message_bytes_max
        self.addresses = addresses
        """IPv4 addresses under which tcp sockets are reached; they may change."""
        self._networked = networked
        self._interfaces_named = interfaces_named
        self._socket_path = socket_path
        self._share_path = share_path
        self._remove_path = remove_path
        self._hwm = max(1, min(buffer_messages, buffer_bytes // limits.SLOT_BYTES_MIN))
        self.buffer_bytes = buffer_bytes
        lending.allow(buffer_bytes)
        self.slot_bytes = buffer_bytes // self._hwm
        """What one frame takes of a buffer at most: a larger one is followed by pads."""
        self._closed = False
        self._label = 0
        self._paths: set[str] = set()

    def bind(
        self,
        kind: int,
        label: str,
        *,
        port: int = 0,
        hwm: int | None = None,
        bytes_max: int | None = None,
    ) -> list[Bound]:
        """Bind one ipc socket, and on a network one tcp socket. `port` 0: any free one. Whoever
        sends a part of over `bytes_max` bytes (None: what messages may have) is disconnected.

        Raises `OSError` where that is not possible, `Closed` after `close`.
        """
        try:
            return self._bind(kind, label, port=port, hwm=hwm, bytes_max=bytes_max)
        except zmq.ZMQError as error:  # users do not know ZeroMQ
            raise OSError(error.errno, f"cannot bind a socket: {error}") from error

    def _bind(
        self, kind: int, label: str, *, port: int, hwm: int | None, bytes_max: int | None
    ) -> list[Bound]:
        self._label += 1
        path = self._socket_path(f"{label}{self._label}")
        make = partial(self._make, kind, hwm=hwm, bytes_max=bytes_max, server=True)
        ipc = make("ipc")
        bound = [Bound(ipc, "ipc", path=path)]
        try:
            self._paths.add(path)
            ipc.bind(bound[0].endpoint)
            self._share_path(path)
            if self._networked:
                bound.append(self._bind_tcp(partial(make, "tcp"), port))
        except BaseException:
            ipc.close(linger=0)
            self.release(bound)
            raise
        return bound

    def path_of(self, label: str) -> str:
        """Where a socket of that name may lie, which no other has; removed in the end. Raises
        `InvalidOption` if Linux has no room for the path."""
        self._label += 1
        path = self._socket_path(f"{label}{self._label}")
        self._paths.add(path)
        return path

    def share(self, path: str) -> None:
        """Let those connect to the socket there that may connect to this node's others."""
        self._share_path(path)

    def is_of(self, path: str, node: str) -> bool:
        """Whether a socket of the node with that id may lie there: where this node's do, under its
        name. No peer is to have others connect to anything else."""
        directory, name = os.path.split(path)
        return directory == os.path.dirname(self._socket_path("")) and name.startswith(f"{node}.")

    def release(self, bound: Iterable[Bound]) -> None:
        """These sockets are closed: libzmq leaves the files of ipc sockets behind."""
        for each in bound:
            if each.path in self._paths:
                self._paths.remove(each.path)
                self._remove_path(each.path)

    def follow(self, bound: Iterable[Bound]) -> None:
        """Bind also to addresses that named interfaces got since: under the lock of these sockets.

        One that was lost meanwhile stays bound: it is of use again if it comes back.
        """
        for each in bound:
            for address in self.addresses if each.hosts else ():
                if address not in each.hosts:
                    self._bind_also(each, address)

    def connecting(
        self, kind: int, scheme: str, *, hwm: int | None = None, stop_if_refused: bool = False
    ) -> Socket:
        """A socket to connect by `scheme`. With `stop_if_refused` a failed CURVE handshake is not
        tried again; nor is one that took too long, so that is not for links to peers, who may have
        been stopped for a moment and come back.
        """
        socket = self._make(kind, scheme, hwm=hwm, server=False)
        if stop_if_refused:
            socket.setsockopt(_RECONNECT_STOP, _RECONNECT_STOP_HANDSHAKE_FAILED)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS_MAX)
        return socket

    def connect(self, kind: int, endpoint: str, *, hwm: int | None = None) -> Socket:
        """A socket connected to `endpoint` alone. Raises `zmq.ZMQError`; nothing is left then."""
        socket = self.connecting(kind, scheme_of(endpoint), hwm=hwm)
        try:
            socket.connect(endpoint)
        except BaseException:
            socket.close(linger=0)
            raise
        return socket

    def close(self) -> None:
        """End the context. Every socket was closed before; waits for the linger they were given."""
        self._closed = True
        self.context.term()
        self._remove_paths()

    def discard(self) -> None:
        """End at once, with all sockets: for a node that nobody has got to use."""
        self._closed = True
        self.context.destroy(linger=0)
        self._remove_paths()

    def _remove_paths(self) -> None:
        for path in list(self._paths):
            self._remove_path(path)

    def _bind_tcp(self, make: Callable[[], Socket], port: int) -> Bound:
        """On named interfaces only there, all with one port; else on every one.

        Where none of them has an address yet, the loopback reserves the port until one has.
        """
        for last_try in (False, False, False, True):
            bound = Bound(make(), "tcp", port=port)
            hosts = (self.addresses or ("127.0.0.1",)) if self._interfaces_named else ()
            try:
                for host in hosts or ("0.0.0.0",):  # noqa: S104
                    bound.socket.bind(f"tcp://{host}:{bound.port or '*'}")
                    taken = bound.socket.getsockopt_string(zmq.LAST_ENDPOINT)
                    bound.port = int(taken.rpartition(":")[2])
                bound.hosts.update(hosts)
            except zmq.ZMQError as error:
                bound.socket.close(linger=0)
                if port or last_try or error.errno != zmq.EADDRINUSE:
                    text = f"tcp port {port or '*'} cannot be had on {host}: {error}"
                    raise OSError(error.errno, text) from error
            else:
                return bound
        raise AssertionError("the last try either returns or raises")

    def _bind_also(self, bound: Bound, address: str) -> None:
        try:
            bound.socket.bind(f"tcp://{address}:{bound.port}")
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return  # it is gone again; should it come back, so do we
            logger.warning("port %d cannot be had on %s: %s", bound.port, address, error)
        bound.hosts.add(address)

    def _make(
        self,
        kind: int,
        scheme: str,
        *,
        hwm: int | None,
        bytes_max: int | None = None,
        server: bool,
    ) -> Socket:
        _check_descriptors()
        try:
            socket: Socket = self.context.socket(kind)
        except zmq.ZMQError:
            if self._closed:
                raise Closed("the node is closed") from None
            raise
        options: dict[int, Any] = {
            zmq.LINGER: 0,
            zmq.MAXMSGSIZE: bytes_max or self.message_bytes_max + limits.FRAME_OVERHEAD_BYTES_MAX,
            zmq.SNDHWM: self._hwm if hwm is None else hwm,
            zmq.RCVHWM: self._hwm if hwm is None else hwm,
            zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
            zmq.BACKLOG: 1024,
        }
        if scheme == "tcp":
            # No ZMTP heartbeats: docs/decisions/006. The kernel ends what is idle and dead.
            options |= {
                zmq.TCP_KEEPALIVE: 1,
                zmq.TCP_KEEPALIVE_IDLE: _KEEPALIVE_S,
                zmq.TCP_KEEPALIVE_INTVL: _KEEPALIVE_S,
                zmq.TCP_KEEPALIVE_CNT: _KEEPALIVE_PROBES,
            }
        if scheme == "tcp" and self.keys is not None:
            options |= {
                zmq.CURVE_PUBLICKEY: self.keys.public,
                zmq.CURVE_SECRETKEY: self.keys.private,
            }
            if server:
                options |= {zmq.CURVE_SERVER: 1, zmq.ZAP_DOMAIN: ZAP_DOMAIN, _ZAP_ENFORCE_DOMAIN: 1}
            else:
                options[zmq.CURVE_SERVERKEY] = self.keys.public
        if kind == zmq.ROUTER:
            options[zmq.ROUTER_MANDATORY] = 1
        for option, value in options.items():
            socket.setsockopt(option, value)
        return socket


def _check_descriptors() -> None:
    """Raise `OSError` where libzmq would find none: it aborts the process then."""
    descriptors: list[int] = []
    try:
        while len(descriptors) < _DESCRIPTORS_FREE:
            descriptors.append(os.eventfd(0, os.EFD_CLOEXEC))
    finally:
        for each in descriptors:
            os.close(each)


def endpoints_of(bound: Iterable[Bound]) -> tuple[str, ...]:
    """What an offer says of where these sockets are: ipc first."""
    return tuple(each.endpoint for each in bound)


def scheme_of(endpoint: str) -> str:
    return endpoint.partition("://")[0]
