"""Channel names, patterns and node names: what is allowed, and what matches what.

A name is levels joined by ``/``: ``sensors/kitchen/temp``. In a pattern a whole level may be ``*``
(exactly one level) or ``**`` (any number, none included). No I/O, no state.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mesh.errors import InvalidName
from mesh.limits import NAME_BYTES_MAX, NAME_LEVELS_MAX, NODE_NAME_BYTES_MAX

_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal obeys (C0, DEL, C1), what ends a line or turns the order of what is read (UAX #9,
embeddings, overrides and isolates), and what UTF-8 cannot say."""


def check_name(name: str, what: str = "channel name") -> str:
    """Return `name` if it is a channel name; raise `InvalidName` otherwise."""
    _check(name, what)
    if "*" in name:
        raise InvalidName(f"{what} {name!r} has a wildcard; only patterns may")
    return name


def check_pattern(pattern: str) -> str:
    """Return `pattern` if it is one (every channel name is); raise `InvalidName` otherwise."""
    _check(pattern, "pattern")
    for level in pattern.split("/"):
        if "*" in level and level not in ("*", "**"):
            raise InvalidName(
                f"pattern {pattern!r} has {level!r}; '*' and '**' stand for whole levels"
            )
    return pattern


def check_node_name(name: str, what: str = "name") -> str:
    """Return `name` if it can label a node or a realm; raise `InvalidName` otherwise."""
    if not isinstance(name, str):
        raise InvalidName(f"{what} must be str, not {name!r}")
    if not name or not is_printable(name):
        raise InvalidName(f"{what} {name!r} is empty or has control characters")
    if (size := len(name.encode())) > NODE_NAME_BYTES_MAX:
        raise InvalidName(f"{what} of {size:,} bytes over the limit of {NODE_NAME_BYTES_MAX}")
    return name


def is_printable(text: str) -> bool:
    """Whether `text` may be shown to people as it is."""
    return _UNPRINTABLE.search(text) is None


def printable(text: str) -> str:
    """`text`, whoever wrote it, so that it may be shown to people: escaped as ``repr`` does."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def is_node_name(name: object) -> bool:
    """Whether `name`, as some peer sent it, can label a node."""
    return _accepts(check_node_name, name)


def is_name(name: object) -> bool:
    """Whether `name`, as some peer sent it, is a channel name."""
    return _accepts(check_name, name)


def is_pattern(pattern: object) -> bool:
    """Whether `pattern`, as some peer sent it, is a pattern."""
    return _accepts(check_pattern, pattern)


def matches(pattern: str, name: str) -> bool:
    """Whether channel `name` is one that `pattern` stands for; both must be valid.

    Greedy with one point of return (the last ``**``), so the time is bounded by the product of the
    two lengths, whatever pattern a peer made up.
    """
    if "*" not in pattern:
        return pattern == name
    want, have = pattern.split("/"), name.split("/")
    w = h = 0
    last_any, resume = -1, 0
    while h < len(have):
        if w < len(want) and want[w] == "**":
            last_any, resume = w, h
            w += 1
        elif w < len(want) and want[w] in ("*", have[h]):
            w += 1
            h += 1
        elif last_any >= 0:
            resume += 1
            w, h = last_any + 1, resume
        else:
            return False
    return all(level == "**" for level in want[w:])


def literal_prefix(pattern: str) -> tuple[str, bool]:
    """Split off what a pattern has before its first wildcard: (levels, may more follow?).

    ``a/b`` → (``a/b``, False); ``a/*/c`` → (``a``, True); ``**`` → (````, True).
    """
    levels = pattern.split("/")
    for i, level in enumerate(levels):
        if "*" in level:
            return "/".join(levels[:i]), True
    return pattern, False


def _check(name: str, what: str) -> None:
    if not isinstance(name, str):
        raise InvalidName(f"a {what} must be str, not {type(name).__name__}")
    if not name:
        raise InvalidName(f"a {what} must not be empty")
    if not is_printable(name):
        raise InvalidName(f"{what} {name!r} has control characters")
    if (size := len(name.encode())) > NAME_BYTES_MAX:
        raise InvalidName(f"{what} of {size:,} bytes over the limit of {NAME_BYTES_MAX}")
    levels = name.split("/")
    if "" in levels:
        raise InvalidName(f"{what} {name!r} has an empty level (a leading, trailing or double '/')")
    if len(levels) > NAME_LEVELS_MAX:
        raise InvalidName(f"{what} of {len(levels):,} levels over the limit of {NAME_LEVELS_MAX}")


def _accepts(check: Callable[[str], str], name: object) -> bool:
    if not isinstance(name, str):
        return False
    try:
        check(name)
    except InvalidName:
        return False
    return True
