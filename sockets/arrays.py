"""Arrays in payloads: what describes one on the wire, and arrays to bytes and back.

NumPy is used where the program has imported it, and never imported here. On its way out an array is
its bytes in C order, not copied if nobody may write to it; on its way in it is a read-only view of
what was received. Where there is no NumPy, `mesh.message.Array` stands for it.

The wire says nothing that is believed: an array is made only of a dtype from the list below and of
exactly as many bytes as its shape needs. Knows no frames and no MessagePack.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Any, Final

from mesh.message import Array

_DIMENSIONS_MAX: Final = 32
"""What NumPy 1 allows; 64 since NumPy 2."""
_ALIGNMENT: Final = 16
"""The bytes behind a description begin at a multiple of it, as the largest dtype needs."""

_DTYPE: Final = re.compile(
    r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]c(?:8|16)|\|S[1-9]\d{0,8}"
    r"|[<>][mM]8(?:\[(?:[1-9]\d{0,8})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)
"""Numbers whose layout is the same everywhere (no ``longdouble``), bytes and times. No objects, no
records; no text, which a list says in a quarter of the bytes."""
_DESCRIPTION: Final = re.compile(rf"({_DTYPE.pattern})((?: \d{{1,18}}){{0,{_DIMENSIONS_MAX}}}) *")
_DESCRIPTION_BYTES_MAX: Final = 32 + 19 * _DIMENSIONS_MAX + _ALIGNMENT


class NotAnArray(Exception):
    """What was to be made into an array, or described as one, is none."""


def describe(value: Any) -> tuple[bytes, memoryview] | None:
    """An array's description and its bytes; None if it is no array.

    The bytes are those of the array itself if it is read-only and in C order, else a copy.
    Raises `NotAnArray`: of a dtype, or a kind, that has no form.
    """
    if type(value) is Array:
        dtype, shape, data = value.dtype, value.shape, _exported(value.data)
    elif (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.ndarray):
        if type(value) not in (numpy.ndarray, numpy.memmap):
            raise NotAnArray(f"{type(value).__name__}, of which only numpy.asarray() can be sent")
        dtype, shape = value.dtype.str, value.shape
        if value.dtype.fields is not None or not _DTYPE.fullmatch(dtype):
            raise NotAnArray(f"an array of dtype {value.dtype}")
        if value.flags.writeable or not value.flags.c_contiguous:
            data = memoryview(value.tobytes())
        else:
            data = memoryview(value.reshape(-1).view(numpy.uint8))
    else:
        return None
    text = " ".join([dtype, *map(str, shape)])
    try:
        _, _, bytes_needed = _parse(text)
    except NotAnArray:
        raise NotAnArray(f"an array of dtype {dtype!r} and shape {shape!r}") from None
    if len(data) != bytes_needed:
        raise NotAnArray(f"an Array of {len(data):,} bytes whose shape needs {bytes_needed:,}")
    length = len(text) + 1
    return text.encode() + b" " * (-length % _ALIGNMENT) + b"\n", data


def lacks_bytes(packed: bytes) -> bool:
    """Whether that is a description alone, of an array that has bytes: they travel elsewhere."""
    if packed.find(b"\n", 0, _DESCRIPTION_BYTES_MAX) != len(packed) - 1:
        return False
    try:
        return _parse(packed[:-1].decode("latin-1"))[2] > 0
    except NotAnArray:
        return False


def restore(packed: bytes, elsewhere: memoryview | None = None) -> Any:
    """The array that was described, over the bytes behind its description, or those `elsewhere`.
    Raises `NotAnArray`."""
    end = packed.find(b"\n", 0, _DESCRIPTION_BYTES_MAX) + 1
    dtype, shape, bytes_needed = _parse(packed[: max(end - 1, 0)].decode("latin-1"))
    data = memoryview(packed)[end:] if elsewhere is None else elsewhere
    if len(data) != bytes_needed:
        raise NotAnArray("not as many bytes as its shape needs")
    make = getattr(sys.modules.get("numpy"), "ndarray", None)  # another thread may just import it
    if make is None:
        array, odd = Array(dtype, shape, data), dtype == "|b1" and _has_odd_truth(data)
    else:
        try:
            array = make(shape, dtype, data)
        except (ValueError, TypeError, OverflowError) as error:  # such as 0 by 10**30 items
            raise NotAnArray(str(error)) from error
        odd = dtype == "|b1" and array.size and array.view("u1").max() > 1
    if odd:
        # Code that counts true items by adding them up writes past the end of what it reserved.
        raise NotAnArray("a truth value other than 0 and 1")
    return array


def _has_odd_truth(data: memoryview) -> bool:
    return bool(bytes(data).translate(None, b"\0\1"))


def _exported(buffer: Any) -> memoryview:
    """Its bytes; a copy if somebody may write to them."""
    try:
        view = memoryview(buffer)
        if view.readonly and view.c_contiguous and view.nbytes:
            return view.cast("B")
        return memoryview(bytes(view))
    except TypeError as error:
        raise NotAnArray(f"an Array whose data is {type(buffer).__name__}") from error


def _parse(text: str) -> tuple[str, tuple[int, ...], int]:
    """The dtype, the shape, and how many bytes that is."""
    match = _DESCRIPTION.fullmatch(text)
    if match is None:
        raise NotAnArray("no description of an array")
    dtype, shape = match[1], tuple(map(int, match[2].split()))
    return dtype, shape, math.prod(shape) * _item_bytes(dtype)


def _item_bytes(dtype: str) -> int:
    return 8 if dtype[1] in "mM" else int(dtype[2:])
