"""Plots of a run's results: ``python -m bench.plot [RESULTS] [--into FOLDER]``.

Draws what a README can show: how many messages a second by size, the percentiles of a round trip,
and what is durable, ours beside each of the others. Needs matplotlib (the extra ``bench``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import lines
from bench.rows import size_text

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
PUBLISHED = ROOT / "bench" / "results" / "published.json"

NAMES = {
    "ours": "mesh",
    "many": "mesh, send_many",
    "raw": "raw pyzmq",
    "zenoh": "zenoh",
    "nng": "nng (pynng)",
    "nats": "NATS (nats-py)",
    "fdatasync": "write + fdatasync",
    "sqlite": "SQLite",
    "jetstream": "JetStream (nats-py)",
    "jetstream_push": "JetStream, pushed",
}
COLOURS = {
    "ours": "#0b6e4f",
    "many": "#5fbf95",
    "raw": "#444444",
    "zenoh": "#3a6ea5",
    "nng": "#b5651d",
    "nats": "#8e44ad",
    "fdatasync": "#444444",
    "sqlite": "#3a6ea5",
    "jetstream": "#8e44ad",
    "jetstream_push": "#c39bd3",
}
PERCENTILES = ("p50", "p99", "p99.9")
PLACES = {"disk": "in process", "ipc": "over ipc", "tcp": "over tcp"}
MANY = {"append-many": "append", "consume": "consume,\nacknowledge each", "replay": "replay"}
Rows = Sequence[dict[str, Any]]
Series = dict[str, dict[Any, float]]


class Panel(NamedTuple):
    title: str
    draw: Callable[[Any, Series], None]
    """On axes."""
    series: Series


def rates(rows: Rows, transport: str) -> Series:
    """Messages per second by size, of each side."""
    found: Series = {}
    for row in rows:
        if "ours" not in row or row["transport"] != transport:
            continue
        if row["case"] == "topic":
            found.setdefault("ours", {})[row["size"]] = row["ours"]
            if not row["lost"]:
                found.setdefault(row["peer"], {})[row["size"]] = row["theirs"]
        elif row["case"] == "topic-many":
            found.setdefault("many", {})[row["size"]] = row["ours"]
    return found


def latencies(rows: Rows, transport: str, size: int) -> Series:
    """Microseconds by percentile, of each side."""
    found: Series = {}
    for row in rows:
        if "ours" not in row or (row["transport"], row["size"]) != (transport, size):
            continue
        case, _, percentile = row["case"].rpartition("-")
        if case == "service" and percentile in PERCENTILES:
            _put(found, row, percentile)
    return found


def waits(rows: Rows) -> Series:
    """Median of a waiting append, microseconds by where the log is, of each side."""
    found: Series = {}
    for row in rows:
        if "ours" in row and row["case"] == "append-p50":
            place = PLACES[row["transport"]]
            found.setdefault("ours", {})[place] = row["ours"]
            if row["peer"] != "fdatasync" or row["transport"] == "disk":  # that is in process
                found.setdefault(row["peer"], {})[place] = row["theirs"]
    return found


def records(rows: Rows) -> Series:
    """Records a second by what is done with them over tcp, of each side."""
    found: Series = {}
    for row in rows:
        if "ours" in row and row["transport"] == "tcp" and row["case"] in MANY:
            _put(found, row, MANY[row["case"]])
    return found


def _put(found: Series, row: dict[str, Any], column: str) -> None:
    """Both sides of that row."""
    found.setdefault("ours", {})[column] = row["ours"]
    found.setdefault(row["peer"], {})[column] = row["theirs"]


def in_order(series: Series) -> list[str]:
    return [side for side in NAMES if side in series]


def draw_rates(axes: Any, series: Series) -> None:
    for side in in_order(series):
        sizes = sorted(series[side])
        style = {"linewidth": 2.5} if side in ("ours", "many") else {"linewidth": 1.5}
        axes.plot(
            sizes,
            [series[side][size] for size in sizes],
            marker="o",
            color=COLOURS[side],
            label=NAMES[side],
            **style,
        )
    every = sorted({size for values in series.values() for size in values})
    axes.set(xscale="log", yscale="log", xlabel="payload")
    axes.set_xticks(every, [size_text(size) for size in every])
    axes.minorticks_off()


def draw_points(axes: Any, series: Series, columns: Sequence[str]) -> None:
    """Points, since a bar of a logarithmic scale has no length that means anything."""
    from matplotlib.ticker import EngFormatter, LogLocator

    sides = in_order(series)
    for number, side in enumerate(sides):
        found = [column for column in columns if column in series[side]]
        places = [columns.index(each) + (number - (len(sides) - 1) / 2) * 0.2 for each in found]
        values = [series[side][each] for each in found]
        axes.plot(places, values, "o", markersize=8, color=COLOURS[side], label=NAMES[side])
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f} k",
                (place, value),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.set(yscale="log", xlim=(-0.5, len(columns) - 0.5))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.set_xticks(range(len(columns)), columns)


def panels(rows: Rows) -> dict[str, tuple[str, bool, list[Panel]]]:
    """What there is to draw, by the name of its file: a title, whether all have one scale, and
    what is side by side."""
    transports = ("ipc", "tcp")
    rates_of = {t: rates(rows, t) for t in transports}
    latencies_of = {t: latencies(rows, t, 16) for t in transports}
    points = partial(draw_points, columns=PERCENTILES)
    return {
        "throughput": (
            "Messages a second, one publisher to one subscriber, a call for each",
            True,
            [Panel(f"over {t}", draw_rates, rates_of[t]) for t in transports],
        ),
        "latency": (
            "Round trip of a 16-byte call, microseconds",
            True,
            [Panel(f"over {t}", points, latencies_of[t]) for t in transports],
        ),
        "streams": (
            "Records of 100 bytes, each on the disk before it is acknowledged",
            False,
            [
                Panel(
                    "median of an append that waits, microseconds",
                    partial(draw_points, columns=list(PLACES.values())),
                    waits(rows),
                ),
                Panel(
                    "many records a second, over tcp",
                    partial(draw_points, columns=list(MANY.values())),
                    records(rows),
                ),
            ],
        ),
    }


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (title, one_scale, every) in panels(results["results"]).items():
        shown = [panel for panel in every if panel.series]
        if not shown:
            continue
        figure, plots = pyplot.subplots(
            1, len(shown), figsize=(5 * len(shown), 4), squeeze=False, sharey=one_scale
        )
        legend: dict[str, Any] = {}
        for axes, panel in zip(plots[0], shown, strict=True):
            panel.draw(axes, panel.series)
            axes.set_title(panel.title)
            axes.grid(axis="y", alpha=0.3)
            handles, labels = axes.get_legend_handles_labels()
            legend |= dict(zip(labels, handles, strict=True))
        figure.suptitle(title)
        labels = [label for label in NAMES.values() if label in legend]
        figure.legend(
            [legend[label] for label in labels],
            labels,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.05),
            ncols=len(labels),
            fontsize=8,
        )
        figure.text(0.5, 0.015, lines(results["machine"])[0], ha="center", fontsize=7)
        figure.subplots_adjust(bottom=0.26, top=0.85, wspace=0.08 if one_scale else 0.2)
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=PUBLISHED)
    parser.add_argument("--into", type=Path, default=IMAGES)
    wanted = parser.parse_args(given)
    for path in draw(json.loads(wanted.results.read_text()), wanted.into):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
