"""Something that happens at any place of some code: before the nth opcode of it that is run."""

from __future__ import annotations

import opcode
from collections.abc import Callable, Collection
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import TraceFunction

_LOOKED_BEHIND = ("CALL", "RESUME", "JUMP_BACKWARD")


def before_opcode(
    nth: int,
    files: Collection[str | None],
    action: Callable[[], object],
    *,
    where_signals_come: bool = False,
) -> TraceFunction:
    """For `sys.settrace`. What `action` raises, is raised there. `where_signals_come`: only those
    count before which CPython looks for a Ctrl-C."""
    left = nth

    def count_down() -> None:
        nonlocal left
        left -= 1
        if not left:
            action()

    return before_each_opcode(files, count_down, where_signals_come=where_signals_come)


def before_each_opcode(
    files: Collection[str | None], action: Callable[[], object], *, where_signals_come: bool = False
) -> TraceFunction:
    """Likewise, before all of them."""
    before: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            last = before.get(frame, "")
            if where_signals_come:
                before[frame] = opcode.opname[frame.f_code.co_code[frame.f_lasti]]
            if not where_signals_come or last.startswith(_LOOKED_BEHIND):
                action()
        elif event == "return":
            before.pop(frame, None)
        return trace

    return trace
