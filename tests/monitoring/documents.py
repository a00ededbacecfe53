"""What is made from a running server and rules.yaml: tables of docs/metrics.md, and a resource.

``python -m tests.monitoring.documents`` writes both.
"""

from __future__ import annotations

import textwrap
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import running_server
from benchmarks.tables import filled_in
from tests.monitoring.dashboard import MONITORING, RULES

METRICS_DOC = Path(__file__).parents[2] / "docs/metrics.md"
PROMETHEUSRULE = MONITORING / "prometheusrule.yaml"
RESOURCE = """\
# Made from rules.yaml by `python -m tests.monitoring.documents`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: digits-serving
  labels:
    app.kubernetes.io/name: digits-serving
spec:
"""
# Labels whose values are worth a reader's time.
CLOSED = ("reason", "result", "feature", "grpc_method")


def write() -> None:
    """Brings both files up to date."""
    with running_server() as server:
        text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()
    tables = {"metrics": metrics_table(text), "alerts": alerts_table()}
    METRICS_DOC.write_text(filled_in(METRICS_DOC.read_text(), tables))
    PROMETHEUSRULE.write_text(prometheusrule())


def metrics_table(exported: str) -> str:
    """Every metric in the text of /metrics."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in text_string_to_metric_families(exported):
        suffix = "_total" if family.type == "counter" else ""
        kind = "untyped" if family.type == "unknown" else family.type
        rows.append(
            f"| `{family.name}{suffix}` | {kind} | {_labels(family)} | {family.documentation} |"
        )
    return "\n".join(rows) + "\n"


def _labels(family: Metric) -> str:
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for name, value in sample.labels.items():
            if name != "le" and value not in values.setdefault(name, []):
                values[name].append(value)
    return ", ".join(
        f"{name}: {', '.join(found)}" if name in CLOSED else name
        for name, found in sorted(values.items())
    )


def read_rules() -> list[dict[str, Any]]:
    """The groups of rules.yaml."""
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return groups


def alerts_table() -> str:
    """Every alert of rules.yaml."""
    rows = ["| alert | severity | meaning | fires when | for |", "|---|---|---|---|---|"]
    for rule in (rule for group in read_rules() for rule in group["rules"] if "alert" in rule):
        link = rule["annotations"]["runbook"].removeprefix("docs/")
        expr = " ".join(rule["expr"].split()).replace("|", "\\|")
        rows.append(
            f"| [{rule['alert']}]({link}) | {rule['labels']['severity']} "
            f"| {rule['annotations']['summary']} | `{expr}` | {rule.get('for', 'at once')} |"
        )
    return "\n".join(rows) + "\n"


def prometheusrule() -> str:
    """The rules as the Prometheus operator takes them, word for word."""
    rules = RULES.read_text()
    return RESOURCE + textwrap.indent(rules[rules.index("groups:") :], "  ")


if __name__ == "__main__":
    write()
