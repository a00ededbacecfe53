"""The Grafana dashboard's panels, and what their queries find."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from tests.monitoring.prometheus import Prometheus

MONITORING = Path(__file__).parents[2] / "deploy/components/monitoring"
DASHBOARD = MONITORING / "dashboard.json"
RULES = MONITORING / "rules.yaml"
# What Grafana fills in: the chosen jobs, and four scrapes' time at least.
VARIABLES = {"$job": ".+", "$__rate_interval": "5s"}


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: Over it.
        place: Left, top, width and height in Grafana's grid of 24 columns.
        queries: What it shows, as Prometheus takes it, variables filled in.
    """

    title: str
    place: tuple[int, int, int, int]
    queries: tuple[str, ...]


def read_panels() -> list[Panel]:
    """The panels of the committed dashboard, in order."""
    return [
        Panel(
            title=panel["title"],
            place=tuple(panel["gridPos"][key] for key in "xywh"),
            queries=tuple(_filled_in(target["expr"]) for target in panel["targets"]),
        )
        for panel in json.loads(DASHBOARD.read_text())["panels"]
    ]


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
        f"{panel.title}: {query}"
        for panel in read_panels()
        for query in panel.queries
        if not any(
            math.isfinite(value)
            for series in prometheus.query_range(query, start, end, 1)
            for _, value in series.points
        )
    ]
