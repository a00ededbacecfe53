"""The dashboard without Grafana: the same queries, drawn where Grafana would put them."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter
from PIL import Image

from benchmarks.observe.dashboard import Panel, read_panels
from benchmarks.observe.prometheus import Prometheus, Series

mpl.use("agg")

COLUMNS = 24
# Inches of a cell of the grid, and what a panel leaves free for its title, legend and ticks.
CELL = (0.6, 0.36)
SUFFIXES = {"bytes": "B", "s": "s", "reqps": "/s", "percentunit": "%", "short": ""}


def draw(prometheus: Prometheus, start: float, end: float) -> bytes:
    """A PNG of every panel between two times, in seconds since 1970."""
    panels = read_panels()
    rows = max(top + height for _, top, _, height in (panel.place for panel in panels))
    size = (COLUMNS * CELL[0], rows * CELL[1])
    with plt.rc_context({"font.size": 7, "axes.titlesize": 8, "axes.titleweight": "bold"}):
        figure = plt.figure(figsize=size, dpi=80)
        for panel in panels:
            axes = figure.add_axes(_box(panel.place, rows))
            axes.set_title(panel.title, loc="left")
            found = [
                (query.name(series), series)
                for query in panel.queries
                for series in prometheus.query_range(query.expr, start, end, 1)
            ]
            DRAW[panel.kind](axes, panel, found, start)
        buffer = io.BytesIO()
        figure.savefig(buffer)
        plt.close(figure)
    few_colours, small = Image.open(buffer).convert("RGB").quantize(64), io.BytesIO()
    few_colours.save(small, "png", optimize=True)
    return small.getvalue()


def _box(place: tuple[int, int, int, int], rows: int) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the axes, in shares of the figure."""
    left, top, width, height = place
    return (
        (left + 1.0) / COLUMNS,
        1 - (top + height - 0.9) / rows,
        (width - 1.7) / COLUMNS,
        (height - 1.8) / rows,
    )


def _text(value: float, unit: str) -> str:
    """A number with its unit, as short as Grafana writes it."""
    if not math.isfinite(value):
        return "none"
    if unit == "percentunit":
        value *= 100
    power = 0
    if unit not in ("percentunit", "short") or abs(value) >= 1e3:
        power = 0 if value == 0 else max(-2, min(3, math.floor(math.log10(abs(value)) / 3)))
    prefix = {-2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G"}[power]
    return f"{value / 1000**power:.3g} {prefix}{SUFFIXES[unit]}".rstrip()


def _stat(axes: Any, panel: Panel, found: list[tuple[str, Series]], start: float) -> None:
    """The last value that was a number."""
    del start
    axes.set_axis_off()
    lines = []
    for name, series in found:
        values = [value for _, value in series.points if math.isfinite(value)]
        lines.append(name or (_text(values[-1], panel.unit) if values else "none"))
    size = 16 if all(len(line) < 12 for line in lines) else 9
    axes.text(0, 0.5, "\n".join(lines), fontsize=size, va="center", color="tab:green")


def _timeseries(axes: Any, panel: Panel, found: list[tuple[str, Series]], start: float) -> None:
    """A line for each series, or their sum in layers; what has another unit has its own axis."""
    if panel.stacked:
        _layers(axes, found, start)
    for name, series in [] if panel.stacked else found:
        unit = panel.other_units.get(name)
        target = axes if unit is None else axes.twinx()
        times, values = zip(*series.points, strict=True)
        [line] = target.plot([when - start for when in times], values, label=name, lw=1)
        if unit is not None:
            line.set_color("tab:purple")
            _name_ticks(target, unit)
            target.legend(loc="lower right", fontsize=6)
    if panel.logarithmic:
        axes.set_yscale("log")
    for bound, colour in panel.bounds:
        axes.axhline(bound, color=colour, lw=0.7, ls="--")
    _name_ticks(axes, panel.unit)
    axes.legend(loc="upper left", fontsize=6, ncols=2)
    axes.grid(alpha=0.3)


def _layers(axes: Any, found: list[tuple[str, Series]], start: float) -> None:
    times = sorted({when for _, series in found for when, _ in series.points})
    rows = [[dict(series.points).get(when, math.nan) for when in times] for _, series in found]
    names = [name for name, _ in found]
    axes.stackplot([when - start for when in times], np.nan_to_num(rows), labels=names)


def _name_ticks(axes: Any, unit: str) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value, unit)))


def _heatmap(axes: Any, panel: Panel, found: list[tuple[str, Series]], start: float) -> None:
    """Observations a second in each bucket, brighter where there are more."""
    bounded = {float(name): dict(series.points) for name, series in found}
    bounds = sorted(bounded)
    times = sorted({when for points in bounded.values() for when in points})
    cumulative = np.array([[bounded[b].get(when, 0.0) for when in times] for b in bounds])
    cells = np.maximum(np.diff(cumulative, axis=0, prepend=0), 0)
    used = np.flatnonzero(cells.sum(axis=1) > 0)
    low, high = (used[0], used[-1] + 1) if len(used) else (0, len(bounds))
    shown = np.ma.masked_less_equal(cells[low:high], 0)
    axes.pcolormesh(np.array(times) - start, range(high - low), shown, cmap="turbo", norm="log")
    axes.set_yticks(range(high - low), [_text(b, panel.unit) for b in bounds[low:high]])


DRAW = {"stat": _stat, "timeseries": _timeseries, "heatmap": _heatmap}
