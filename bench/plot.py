"""Plots of a run's results: ``python -m bench.plot [RESULTS] [--into FOLDER]``.

Draws what a README can show: how many messages a second by size, and the percentiles of a round
trip, ours beside each of the others. Needs matplotlib (the extra ``bench``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
}
COLOURS = {
    "ours": "#0b6e4f",
    "many": "#5fbf95",
    "raw": "#444444",
    "zenoh": "#3a6ea5",
    "nng": "#b5651d",
    "nats": "#8e44ad",
}
PERCENTILES = ("p50", "p99", "p99.9")
Rows = Sequence[dict[str, Any]]
Series = dict[str, dict[Any, float]]


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
            found.setdefault("ours", {})[percentile] = row["ours"]
            found.setdefault(row["peer"], {})[percentile] = row["theirs"]
    return found


def in_order(series: Series) -> list[str]:
    return [side for side in NAMES if side in series]


def draw_rates(axes: Any, series: Series, transport: str) -> None:
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
    axes.set(xscale="log", yscale="log", title=f"over {transport}", xlabel="payload")
    axes.set_xticks(every, [size_text(size) for size in every])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)


def draw_latencies(axes: Any, series: Series, transport: str) -> None:
    """Points, since a bar of a logarithmic scale has no length that means anything."""
    sides = in_order(series)
    for number, side in enumerate(sides):
        found = [p for p in PERCENTILES if p in series[side]]
        places = [PERCENTILES.index(p) + (number - (len(sides) - 1) / 2) * 0.2 for p in found]
        values = [series[side][p] for p in found]
        axes.plot(places, values, "o", markersize=8, color=COLOURS[side], label=NAMES[side])
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.0f}",
                (place, value),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.set(yscale="log", title=f"over {transport}", xlim=(-0.5, len(PERCENTILES) - 0.5))
    axes.margins(y=0.12)
    axes.set_xticks(range(len(PERCENTILES)), PERCENTILES)
    axes.grid(axis="y", alpha=0.3)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    rows = results["results"]
    jobs = {
        "throughput": (
            "Messages a second, one publisher to one subscriber, a call for each",
            draw_rates,
            {t: rates(rows, t) for t in ("ipc", "tcp")},
        ),
        "latency": (
            "Round trip of a 16-byte call, microseconds",
            draw_latencies,
            {t: latencies(rows, t, 16) for t in ("ipc", "tcp")},
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (title, draw_one, data) in jobs.items():
        shown = {transport: series for transport, series in data.items() if series}
        if not shown:
            continue
        figure, plots = pyplot.subplots(
            1, len(shown), figsize=(5 * len(shown), 4), squeeze=False, sharey=True
        )
        for axes, (transport, series) in zip(plots[0], shown.items(), strict=True):
            draw_one(axes, series, transport)
        handles, labels = max((a.get_legend_handles_labels() for a in plots[0]), key=len_of_labels)
        figure.suptitle(title)
        figure.legend(
            handles,
            labels,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.05),
            ncols=len(labels),
            fontsize=8,
        )
        figure.text(0.5, 0.015, lines(results["machine"])[0], ha="center", fontsize=7)
        figure.subplots_adjust(bottom=0.26, top=0.85, wspace=0.08)
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def len_of_labels(legend: tuple[list[Any], list[str]]) -> int:
    return len(legend[1])


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
