"""``python -m bench``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from types import FrameType

from bench import case as scales
from bench.cases import CASES
from bench.rows import HEADER, line, text


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--only", action="append", choices=list(CASES), metavar="CASE")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--transport", action="append")
    parser.add_argument("--size", action="append", type=int)
    parser.add_argument("--peer", action="append")
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    if given.list:
        for case in CASES.values():
            print(f"{case.name:20} {case.question}")
        return 0
    signal.signal(signal.SIGTERM, _end)
    scale = scales.TINY if given.tiny else scales.QUICK if given.quick else scales.FULL
    selection = scales.Selection(
        scale,
        frozenset(given.transport) if given.transport else None,
        frozenset(given.size) if given.size else None,
        frozenset(given.peer) if given.peer else None,
    )
    if not given.json:
        print(line(HEADER))
    failed = False
    for name in given.only or CASES:
        for result in CASES[name].run(selection):
            failed |= getattr(result, "failed", False)
            print(json.dumps(result.as_json()) if given.json else text(result), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
