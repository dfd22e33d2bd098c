"""ZeroMQ messages, part by part: looked for, read and sent without waiting.

Of a socket's own methods these take the shortest way that pyzmq has. Used under a link's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import zmq
from zmq.backend import Socket as _Socket
from zmq.backend import zmq_poll

from mesh.sockets import memory
from mesh.sockets.frame import CUT_OFF, Part, announces_more, is_array
from mesh.sockets.lending import lending

# As plain integers: an enum member costs more than the call it is for.
EVENTS = int(zmq.EVENTS)
RCVMORE = int(zmq.RCVMORE)
POLLIN = int(zmq.POLLIN)
POLLOUT = int(zmq.POLLOUT)
NOBLOCK = int(zmq.NOBLOCK)
"""For sockets' own `recv` and for `send`: passing an integer costs less than passing a flag."""
NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
recv: Callable[[zmq.Socket[bytes], int], bytes] = _Socket.recv
"""As a method it is looked up the slow way: `zmq.Socket` has a ``__getattr__``."""
recv_frame: Callable[[zmq.Socket[bytes], int, bool], zmq.Frame]
recv_frame = _Socket.recv  # type: ignore[assignment]
send: Callable[..., object] = _Socket.send
"""What `zmq.Socket.send` calls after looking for options of draft sockets: a third of its time."""
getsockopt: Callable[[zmq.Socket[bytes], int], int] = _Socket.get  # type: ignore[assignment]
"""What `zmq.Socket.getsockopt` calls after looking the option up in an enum: half of its time."""

NO_COPY_BYTES_MIN: Final = 128 * 1024
"""A part from here on is sent without a copy. It costs a wake-up of pyzmq's own thread, which at
64 KiB is as dear as the copy; at 128 KiB it made 1.1 times as much, at 1 MiB 1.4 times."""

look: Callable[[list[tuple[zmq.Socket[bytes], int]], int], list[tuple[zmq.Socket[bytes], int]]]
look = zmq_poll  # type: ignore[assignment]
"""``look(link.looks, 0)`` are the sockets that have something to read, looked at in one call. Under
the lock."""


def has_input(socket: zmq.Socket[bytes]) -> bool:
    """Whether `socket` has something to read. Looking re-arms its descriptor."""
    return bool(getsockopt(socket, EVENTS) & POLLIN)


def read_parts(socket: zmq.Socket[bytes]) -> list[Part] | None:
    """One frame without waiting, or None."""
    first = read_first(socket)
    return None if first is None else parts_of(socket, first)


def read_first(socket: zmq.Socket[bytes], *, sure: bool = False) -> bytes | None:
    """The first part of a frame without waiting, or None. `sure`: there is most likely one, so do
    not look before: that takes six times as long as to read, but half as long as to fail."""
    if not sure and not has_input(socket):
        return None
    try:
        return recv(socket, NOBLOCK)
    except zmq.Again:
        return None


def read_announced(socket: zmq.Socket[bytes], *, view: bool = False) -> Part | None:
    """The part that was announced by the one just read; None if there is none.

    `view`: as a view of what libzmq received. Only arrays are, and with the option `views` others:
    while the main thread frees a `zmq.Frame`, pyzmq loses a Ctrl-C that comes just then.
    """
    if not getsockopt(socket, RCVMORE):
        return None
    part: Part = _view(socket) if view else recv(socket, NOBLOCK)
    memory.expect(len(part))
    return part


def _view(socket: zmq.Socket[bytes]) -> memoryview:
    """The next part, in the memory that it was received in."""
    return recv_frame(socket, NOBLOCK, False).buffer.toreadonly()


def parts_of(socket: zmq.Socket[bytes], first: bytes, *, views: bool = False) -> list[Part]:
    """`first`, which was just read, and a second part if it announces one. Only then is it asked
    whether there is one, which takes four times as long as to read. Who sends others all the same
    has sent frames of their own."""
    if announces_more(first):
        second = read_announced(socket, view=views or is_array(first))
        if second is not None:
            return [first, second]
    return [first]


def read_rest(socket: zmq.Socket[bytes], parts: list[Part], parts_max: int) -> None:
    """Append to `parts` those that belong to what was just read, if any. Those beyond `parts_max`
    are thrown away, all but one, so that the caller sees that there were too many."""
    while True:
        view = len(parts) == parts_max - 1 and is_array(parts[-1])
        part = read_announced(socket, view=view)
        if part is None:
            return
        if len(parts) <= parts_max:
            parts.append(part)


def send_parts(socket: zmq.Socket[bytes], parts: Sequence[Part]) -> bool:
    """Send one message without waiting; False if there is no room for it (nothing was sent). A
    large part is not copied: it must not change before it has left, whenever that is. Interrupted
    by a Ctrl-C, it may have left or not; nothing of it is taken for a part of the next."""
    attempt = _send_large if len(parts[-1]) >= NO_COPY_BYTES_MIN else _send
    return attempt(socket, parts) or (_has_room(socket) and attempt(socket, parts))


def _has_room(socket: zmq.Socket[bytes]) -> bool:
    """Whether it may take one more after all. A send takes notice of what became of earlier ones
    about once in a millisecond (libzmq 4.3.5, `process_commands`), and refuses meanwhile what there
    is room for; looking at its events does that at once. Who waited for room then waited in vain:
    nothing more came to tell of it. Looking swallows the edge of the descriptor, as sending does.
    An XPUB says that it has room always, and a ROUTER if any of its peers has."""
    return bool(getsockopt(socket, EVENTS) & POLLOUT)


def _send(socket: zmq.Socket[bytes], parts: Sequence[Part], copy: bool = True) -> bool:
    """`copy`: the last part."""
    try:
        for part in parts[:-1]:
            send(socket, part, NOBLOCK_MORE)
        send(socket, parts[-1], NOBLOCK, copy)
    except zmq.Again:
        return False
    except BaseException:
        if len(parts) > 1:
            _cut_off(socket)
        raise
    return True


def _send_large(socket: zmq.Socket[bytes], parts: Sequence[Part]) -> bool:
    lend = lending.may()
    sent = _send(socket, parts, not lend)
    if lend and sent:
        lending.lent(len(parts[-1]))
    return sent


def _cut_off(socket: zmq.Socket[bytes]) -> None:
    """Something came in the midst of a message: end it there. It may have come when all of that had
    left: then this is a message by itself. Receivers count either, and take it for nothing."""
    while True:
        try:
            send(socket, CUT_OFF, NOBLOCK)
        except zmq.ZMQError:
            return  # no message had begun
        except BaseException:  # noqa: BLE001, S112  the first of them is being raised
            continue
        else:
            return
