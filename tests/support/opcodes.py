"""Something that happens at any place of some code: before the nth opcode of it that is run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import TraceFunction


def before_opcode(
    nth: int, files: Collection[str | None], action: Callable[[], object]
) -> TraceFunction:
    """For `sys.settrace`. What `action` raises, is raised there."""
    left = nth

    def count_down() -> None:
        nonlocal left
        left -= 1
        if not left:
            action()

    return before_each_opcode(files, count_down)


def before_each_opcode(
    files: Collection[str | None], action: Callable[[], object]
) -> TraceFunction:
    """Likewise, before all of them."""

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            action()
        return trace

    return trace
