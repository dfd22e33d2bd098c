"""What a server answers instead of a result, and what a client makes of it.

The body of an ERROR frame is the array ``[code, type, text, traceback]``, four strings. The codes::

    remote     the handler raised                          → RemoteError
    payload    the request or the result has no valid form → RemoteError
    busy       not started: no room                        → another server, else Busy
    expired    not started: the caller's time was over     → Timeout
    cancelled  not started: the caller gave up             → nobody waits for it

No I/O. Text is cut, and what UTF-8 has no form for is escaped, so that every error can be sent.
"""

from __future__ import annotations

import traceback
from typing import Any, Final

from mesh.errors import RemoteError
from mesh.sockets import codec
from mesh.sockets.frame import Malformed
from mesh.sockets.outgoing import Outgoing
from mesh.sockets.single import Message

REMOTE: Final = "remote"
PAYLOAD: Final = "payload"
BUSY: Final = "busy"
EXPIRED: Final = "expired"
CANCELLED: Final = "cancelled"

TYPE_CHARS_MAX: Final = 200
TEXT_CHARS_MAX: Final = 10_000
TRACEBACK_CHARS_MAX: Final = 50_000


def encode_failure(code: str, type: str = "", text: str = "", trace: str = "") -> Message:
    """The message of an ERROR frame. Of a long traceback the end is kept: it names the error."""
    fields = (code, type[:TYPE_CHARS_MAX], text[:TEXT_CHARS_MAX], trace[-TRACEBACK_CHARS_MAX:])
    sendable = [field.encode(errors="backslashreplace").decode() for field in fields]
    return Outgoing(codec.pack_body([codec.pack(sendable)]))


def describe(code: str, error: BaseException) -> Message:
    """The message about what was raised on this side, traceback and all."""
    trace = "".join(traceback.format_exception(error))
    return encode_failure(code, type(error).__name__, _text(error), trace)


def read_failure(fields: Any) -> tuple[str, RemoteError]:
    """The code in the payload of an ERROR frame, and what to raise if it stands for that. Raises
    `Malformed`."""
    if type(fields) is not list or [type(field) for field in fields] != [str] * 4:
        raise Malformed("malformed")
    code, kind, text, trace = fields
    return code, RemoteError(kind, text, trace)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as fault:  # noqa: BLE001  the user's __str__; it must not lose the answer
        return f"<its text cannot be had: {type(fault).__name__}>"
