"""What does LZ4 do over tcp, to payloads that it makes smaller and to some that it cannot?

Over the loopback there is no network to save, so this shows what compressing costs.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting, Shape

SIZE = 16 * 1024
SHAPES: tuple[tuple[str, Shape], ...] = (("lz4-text", "text"), ("lz4-random", "bytes"))
VARIANTS = {"ours-uncompressed": {"compress": False}}


def run(selection: Selection) -> Iterator[Result]:
    if selection.takes("tcp", SIZE):
        for name, shape in SHAPES:
            setting = Setting(transport="tcp", size=SIZE, shape=shape, compress=True)
            sides = selection.sides(("ours-uncompressed", "raw"))
            yield from throughput(name, setting, sides, selection.scale, variants=VARIANTS)


CASES = (Case("lz4", "16 KiB over tcp, compressible and not, with LZ4 and without", run),)
