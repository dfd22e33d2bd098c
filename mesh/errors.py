"""Every error this package raises, in one tree.

::

    MeshError
    ├── InvalidName        (ValueError)    a channel, pattern or node name is malformed
    ├── InvalidOption      (ValueError)    an option has a value that cannot work
    ├── OptionsDiffer      (ValueError)    a channel, stream or group has other options already
    ├── NotSerializable    (TypeError)     a payload MessagePack has no form for
    ├── PayloadTooLarge    (ValueError)    a message over ``message_bytes_max``
    ├── Timeout            (TimeoutError)  a wait reached its deadline
    │   └── NoSidecar                      of waiting for a log to append to, or to read
    ├── Closed                             the node or the handle was closed
    │   └── Forked                         it belongs to the parent of this process
    ├── PeerLost                           the server of a request, or the way to it, is gone
    ├── Busy                               no room for the request or append, here or there
    ├── RemoteError                        the handler on the other side raised
    ├── LogFull                            an append was refused for want of room
    ├── OutcomeUnknown                     whether a record is in the log cannot be found out
    ├── ProducerFenced                     a later run of the same producer has begun
    ├── SequenceGap                        a producer's own numbers leave out some, or go back
    ├── LogDamaged                         what had been on disk does not read any more
    ├── LogFormat                          a log of another version
    ├── LogLocked                          another process, or this one, has that log open
    ├── StorageFailed                      a log could not be written or read; nothing was appended
    └── UnsafeRuntimeDir   (PermissionError)  others could reach this node's sockets

Misuse by the caller is an error; a fault of a peer is never one: it is dropped and counted
(``node.stats().dropped``).
"""

from __future__ import annotations


class MeshError(Exception):
    """The root of the tree: ``except MeshError`` catches all that this package raises."""


class InvalidName(MeshError, ValueError):
    """A channel name, pattern or node name is malformed; the text says which rule it breaks."""


class InvalidOption(MeshError, ValueError):
    """An option has a value that cannot work; the text names the option and its range."""


class OptionsDiffer(MeshError, ValueError):
    """A channel is open in this node already, or a stream or group was created, with other options;
    of a stream or group the text says which."""


class NotSerializable(MeshError, TypeError):
    """The payload holds something MessagePack has no form for; nothing was sent."""


class PayloadTooLarge(MeshError, ValueError):
    """The message is over ``message_bytes_max``; nothing was sent. Or a record that is there has no
    room within this node's, and does not come."""


class Timeout(MeshError, TimeoutError):
    """A wait reached its deadline; the text says what was waited for."""


class Closed(MeshError):
    """The node or the handle was closed, before the call or during it."""


class Forked(Closed):
    """The node belongs to the parent of this process; make a new one after ``fork``."""


class PeerLost(MeshError):
    """The server that had the request is gone, or the connection to it was lost; whether the
    request ran is not known."""


class Busy(MeshError):
    """A request was not started: every server's backlog is full, or this client's table is. Or an
    append was not: as much as may be is under way to the log."""


class RemoteError(MeshError):
    """A service handler raised, or its payload or result had no valid form.

    ``type`` is the remote exception's class name, ``text`` its ``str()``, and ``traceback`` the
    remote traceback as text.
    """

    def __init__(self, type: str, text: str, traceback: str) -> None:
        super().__init__(f"{type}: {text}")
        self.type = type
        self.text = text
        self.traceback = traceback

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, str]]:
        return RemoteError, (self.type, self.text, self.traceback)


class NoSidecar(Timeout):
    """No sidecar came within the timeout; the text says how to have one."""


class LogFull(MeshError):
    """The log has no room for the record, which was not written; the text says which limit."""


class OutcomeUnknown(MeshError):
    """The log no longer knows whether the record is there: who appends it again may have it
    twice."""


class ProducerFenced(MeshError):
    """A later run of this producer has begun, and this one may not write any more."""


class SequenceGap(MeshError):
    """A record's number does not follow its producer's last; the text says both. Not written."""


class LogDamaged(MeshError):
    """Something in a log that had been on disk does not read any more. Nothing was changed, and
    nothing that comes after it is delivered in its place."""

    def __init__(self, file: str, position: int, offset: int, reason: str) -> None:
        super().__init__(
            f"{file} is damaged at byte {position:,}, where offset {offset:,} should be: {reason}"
        )
        self.file = file
        self.position = position
        """Byte of the file."""
        self.offset = offset
        """Of the first record that is missing."""
        self.reason = reason

    def __reduce__(self) -> tuple[type[LogDamaged], tuple[str, int, int, str]]:
        return LogDamaged, (self.file, self.position, self.offset, self.reason)


class LogFormat(MeshError):
    """A log that another version of this package has written; the text names both."""


class LogLocked(MeshError):
    """The directory of a log is in use; the text names the process that has it."""


class StorageFailed(MeshError):
    """A log could not be written or read, here or at its sidecar, or its sidecar is closing: the
    text says which. Nothing was appended. A file of which a write or sync has failed is not written
    again: what is on the disk is known once it has been opened anew."""


class UnsafeRuntimeDir(MeshError, PermissionError):
    """The runtime directory could be entered by another user; the text says what to change."""
