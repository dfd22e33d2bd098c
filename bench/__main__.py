"""How fast is it, beside what else there is? ``python -m bench`` measures, and prints a table.

    python -m bench                     everything: 10 minutes
    python -m bench --quick             everything, less of it: 2 minutes
    python -m bench --list              what there is
    python -m bench --only topic --size 100 --transport ipc --peer raw --rounds 30
    python -m bench --floors            the budgets of the design: held or missed; exit status 1
    python -m bench --json              one object a line
    python -m bench --out bench/results/published.json && python -m bench.plot

The last line makes the plots in docs/images and the results they are drawn from, which are kept
together; every other run leaves its results in bench/results/latest.json, which is not.

``make bench`` installs what it is compared with (the extra ``bench``) and runs it. What is not
installed is named as skipped.

How it measures. Each side is a program in processes of its own (`bench.worker`; `bench.sides` has
one module for each), as many for one side as for the other, with the same payloads over the same
transport. All sides of a comparison are started together and kept; then they take turns in short
blocks, in an order that changes from round to round, so that what else the machine does hits all
alike. A throughput is timed from before the first send to after the last receipt, and every payload
is looked into. Each side is used as its own documentation says is fast, but so that it loses
nothing; what was lost all the same is in the table, and a ratio beside it says nothing.

A log is on a disk, and the table names its filesystem: where temporary files are kept in memory,
name another place in TMPDIR. An append counts when it has been synced, whoever's log it is. Where
ours was not measured, the figures of the others stand alone.

A ratio above 1 always means that the mesh is better: of rates ours over theirs, of times theirs
over ours. It is the median over the rounds of each round's own ratio; of a percentile it is that of
all the round trips together. The spread is that of the middle half. Absolute figures belong to the
machine they were taken on, and are printed beside its description.

A new case is a file in `bench/cases`; a new side is a module in `bench/sides`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from bench import case as scales
from bench import floors, machine
from bench.cases import CASES
from bench.rows import HEADER, Result, line, text
from bench.setting import TRANSPORTS
from bench.sides import SIDES

RESULTS = Path(__file__).parent / "results"
LATEST = RESULTS / "latest.json"
SCALES = {"full": scales.FULL, "quick": scales.QUICK, "tiny": scales.TINY}


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--list", action="store_true", help="name the cases")
    add("--only", action="append", choices=list(CASES), metavar="CASE", help="may be repeated")
    add("--transport", action="append", choices=list(TRANSPORTS), help="may be repeated")
    add("--size", action="append", type=int, metavar="BYTES", help="may be repeated")
    add("--peer", action="append", metavar="SIDE", help="compare with this; may be repeated")
    add("--quick", dest="scale", action="store_const", const="quick", help="less of everything")
    add("--tiny", dest="scale", action="store_const", const="tiny", help="no figures: for tests")
    add("--rounds", type=int, help="blocks of each side of a throughput")
    add("--floors", action="store_true", help="only what the design has budgets for; judge them")
    add("--json", action="store_true", help="one object a line")
    add("--out", type=Path, default=LATEST, metavar="FILE", help="the results (%(default)s)")
    parser.set_defaults(scale="full")
    return parser.parse_args(given)


def selection_of(given: argparse.Namespace) -> scales.Selection:
    from dataclasses import replace

    scale = SCALES[given.scale]
    if given.rounds is not None:
        scale = replace(scale, rounds=given.rounds)
    peers = given.peer
    if given.floors:
        scale = replace(scale, sizes_max=None)
        peers = peers or ["raw", "zenoh", "fdatasync", "jetstream", "sqlite"]
    sizes = given.size or (floors.sizes() if given.floors else None)
    return scales.Selection(
        scale,
        transports=frozenset(given.transport) if given.transport else None,
        sizes=frozenset(sizes) if sizes else None,
        peers=frozenset(peers) if peers else None,
    )


def measured(given: argparse.Namespace) -> list[Result]:
    """Run what was asked for, printing each result as soon as it is there."""
    selection = selection_of(given)
    names = given.only or (floors.CASES if given.floors else CASES)
    results = []
    for name in names:
        for result in CASES[name].run(selection):
            results.append(result)
            print(json.dumps(result.as_json()) if given.json else text(result), flush=True)
    return results


def save(path: Path, given: argparse.Namespace, here: dict[str, Any], results: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": here, "scale": given.scale, "results": [r.as_json() for r in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(given: Sequence[str] | None = None) -> int:
    """The exit status: 1 if anything failed, or with ``--floors`` was missed."""
    wanted = arguments(given)
    if wanted.list:
        for case in CASES.values():
            print(f"{case.name:20} {case.question}")
        print(f"\nsides: {', '.join(SIDES)}")
        return 0
    here, began = machine.describe(), time.monotonic()
    if not wanted.json:
        print("\n".join((*machine.lines(here), "", line(HEADER))))
    results = measured(wanted)
    save(wanted.out, wanted, here, results)
    verdicts = floors.judge(results)
    if not wanted.json:
        print(f"\n{time.monotonic() - began:.0f} s\n")
        print("\n".join(floors.lines(verdicts if wanted.floors else floors.measured(verdicts))))
    failed = any(getattr(result, "failed", False) for result in results)
    unmet = wanted.floors and floors.unmet(verdicts, all_of_them=not wanted.only)
    return 1 if failed or unmet else 0


def run(given: Sequence[str] | None = None) -> int:
    """`main` as a program: whoever ends it, nobody is left."""
    signal.signal(signal.SIGTERM, _end)
    try:
        return main(given)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(run())
