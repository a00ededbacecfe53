"""The Grafana dashboard's panels, and what their queries find."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.observe.prometheus import Prometheus, Series

MONITORING = Path(__file__).parents[2] / "deploy/components/monitoring"
DASHBOARD = MONITORING / "dashboard.json"
RULES = MONITORING / "rules.yaml"
# What Grafana fills in: the chosen jobs, and four scrapes' time at least.
VARIABLES = {"$job": ".+", "$__rate_interval": "5s"}


@dataclass(frozen=True)
class Query:
    """One expression of a panel.

    Attributes:
        expr: As Prometheus takes it, variables filled in.
        legend: How its series are named; ``{{label}}`` stands for a label.
    """

    expr: str
    legend: str

    def name(self, series: Series) -> str:
        """What the legend says of a series."""
        return re.sub(r"{{(\w+)}}", lambda found: series.labels.get(found[1], ""), self.legend)


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: Over it.
        kind: ``stat``, ``timeseries`` or ``heatmap``.
        unit: As Grafana calls it.
        place: Left, top, width and height in Grafana's grid of 24 columns.
        queries: What it shows.
        bounds: Values that are marked, with their colours.
        stacked: Whether its series are drawn on top of each other.
        logarithmic: Whether its axis is.
        other_units: Of series, by name, that have an axis of their own.
    """

    title: str
    kind: str
    unit: str
    place: tuple[int, int, int, int]
    queries: tuple[Query, ...]
    bounds: tuple[tuple[float, str], ...]
    stacked: bool
    logarithmic: bool
    other_units: dict[str, str]


def read_panels() -> list[Panel]:
    """The panels of the committed dashboard, in order."""
    return [_panel(panel) for panel in json.loads(DASHBOARD.read_text())["panels"]]


def _panel(panel: dict[str, Any]) -> Panel:
    defaults = panel["fieldConfig"]["defaults"]
    custom, steps = defaults.get("custom", {}), defaults.get("thresholds", {"steps": []})["steps"]
    return Panel(
        title=panel["title"],
        kind=panel["type"],
        unit=defaults["unit"],
        place=tuple(panel["gridPos"][key] for key in "xywh"),
        queries=tuple(
            Query(_filled_in(target["expr"]), target["legendFormat"]) for target in panel["targets"]
        ),
        bounds=tuple((step["value"], step["color"]) for step in steps if step["value"] is not None),
        stacked="stacking" in custom,
        logarithmic="scaleDistribution" in custom,
        other_units={
            override["matcher"]["options"]: override["properties"][0]["value"]
            for override in panel["fieldConfig"]["overrides"]
        },
    )


def _filled_in(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def without_data(prometheus: Prometheus, start: float, end: float) -> list[str]:
    """Queries that found no number between two times, in seconds since 1970.

    Raises:
        PrometheusError: If one does not parse.
    """
    return [
        f"{panel.title}: {query.expr}"
        for panel in read_panels()
        for query in panel.queries
        if not any(
            math.isfinite(value)
            for series in prometheus.query_range(query.expr, start, end, 1)
            for _, value in series.points
        )
    ]
