"""A real Prometheus on a loaded server, the rules' own tests, and the documents made from both."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.tables import filled_in
from tests.conftest import ROOT, RunningServer, wait_until
from tests.monitoring import documents
from tests.monitoring.check import problems, promtool
from tests.monitoring.dashboard import (
    DASHBOARD,
    MONITORING,
    RULES,
    VARIABLES,
    read_panels,
    without_data,
)
from tests.monitoring.load import FLAGS, run_load
from tests.monitoring.prometheus import JOB, PrometheusError, running_prometheus

REGENERATE = "run: python -m tests.monitoring.documents"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)
RUNBOOK = ROOT / "docs/runbook.md"
LOAD_S = 16


@pytest.fixture(scope="module")
def rules() -> list[Any]:
    return [rule for group in documents.read_rules() for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts(rules: list[Any]) -> dict[Any, Any]:
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


@pytest.mark.full
@needs_prometheus
def test_prometheus_finds_every_panel_and_rule_of_a_loaded_server(
    start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray]
) -> None:
    server = start_server(*FLAGS)
    with running_prometheus(server.http.removeprefix("http://"), RULES) as prometheus:
        start = time.time()
        answered = run_load(server.address, sample["images"], LOAD_S)
        end = time.time()
        # What is counted and scraped last: the drift of the inverted digits.
        wait_until(lambda: value(prometheus, 'max(digits_drift_psi{feature="ink"})') > 0.25)
        ok = 'sum(grpc_server_handled_total{grpc_method="Classify",grpc_code="OK"})'
        wait_until(lambda: value(prometheus, ok) == answered)
        assert problems(prometheus, f"{server.http}/metrics", start, end + 2) == []
        assert value(prometheus, "sum(digits_requests_dropped_total)") > 0
        assert {target["health"] for target in prometheus.targets()} == {"up"}
        with pytest.raises(PrometheusError, match="parse error"):
            prometheus.query("sum(")
        # Before the load there was nothing to see, so a panel without data is noticed.
        assert len(without_data(prometheus, start - 100, start - 50)) > 10
        # The server goes: its alert is on the way.
        assert server.stop() == 0
        wait_until(lambda: state(prometheus, "DigitsDown") == "pending")


def value(prometheus: Any, expr: Any) -> Any:
    found = prometheus.query(expr)
    return found[0].points[0][1] if found else math.nan


def state(prometheus: Any, alert: Any) -> Any:
    return next(rule["state"] for rule in prometheus.rules() if rule["name"] == alert)


@pytest.mark.full
@needs_prometheus
def test_rules_pass_every_lint() -> None:
    assert promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES)) == []


@pytest.mark.full
@needs_prometheus
def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert promtool("test", "rules", str(MONITORING / "rules_test.yaml")) == []


@pytest.mark.full
@needs_prometheus
@pytest.mark.parametrize("expr", ["vector(1) > 1", "vector(1)"], ids=["never", "always"])
def test_alerts_that_never_or_always_fire_fail_their_tests(
    expr: str, tmp_path: Path, alerts: dict[Any, Any]
) -> None:
    groups = yaml.safe_load(RULES.read_text())
    for group in groups["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expr if "alert" in rule else rule["expr"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))
    shutil.copy(MONITORING / "rules_test.yaml", tmp_path)
    complaints = "\n".join(promtool("test", "rules", str(tmp_path / "rules_test.yaml")))
    failed = set(re.findall(r"alertname: *(\w+)", complaints))
    assert failed == set(alerts)


def test_every_alert_says_how_bad_it_is_and_what_to_do(alerts: dict[Any, Any]) -> None:
    headings = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert headings == list(alerts)
    for name, alert in alerts.items():
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"].keys() == {"summary", "description", "runbook"}
        assert alert["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"


def exported(server: RunningServer) -> tuple[str, set[Any]]:
    text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()
    return text, set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def asked_for(text: str) -> set[Any]:
    """Our metrics' names in any text, without the endings of a histogram's series."""
    names = re.findall(r"(?<![:\w])(?:digits|grpc_server|process)_[a-z_]+[a-z]\b", text)
    return {
        re.sub(r"(_seconds|_size|_ratio|_confidence|_is_digit)_(bucket|sum|count)$", r"\1", n)
        for n in names
    }


def test_tables_are_what_the_server_exports(start_server: Callable[..., RunningServer]) -> None:
    text, _ = exported(start_server())
    written = {"metrics": documents.metrics_table(text), "alerts": documents.alerts_table()}
    document = (ROOT / "docs/metrics.md").read_text()
    assert document == filled_in(document, written), REGENERATE


def test_everything_asks_for_metrics_that_exist(
    start_server: Callable[..., RunningServer], rules: list[Any]
) -> None:
    _, names = exported(start_server())
    texts = {
        "rules": " ".join(rule["expr"] for rule in rules),
        "dashboard": " ".join(query for panel in read_panels() for query in panel.queries),
        "runbook": RUNBOOK.read_text(),
        "metrics.md": (ROOT / "docs/metrics.md").read_text(),
    }
    for where, text in texts.items():
        assert asked_for(text) - names == set(), where


def test_calls_are_those_of_every_method_that_classifies(rules: list[Any]) -> None:
    calls = "Classify|ModelInfer"

    def asked_of(expressions: Any) -> set[Any]:
        return set(re.findall(r'grpc_method=~?"([^"]*)"', " ".join(expressions)))

    assert asked_of(rule["expr"] for rule in rules) == {calls}
    queries = [query for panel in read_panels() for query in panel.queries]
    assert asked_of(queries) == {calls, f"{calls}|ClassifyStream"}
    assert asked_of([RUNBOOK.read_text()]) == {calls}


def test_rule_of_the_operator_is_the_plain_one() -> None:
    written = (MONITORING / "prometheusrule.yaml").read_text()
    assert written == documents.prometheusrule(), REGENERATE
    assert yaml.safe_load(written)["spec"] == yaml.safe_load(RULES.read_text())


def test_dashboard_asks_the_data_source_and_jobs_that_were_chosen() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert {v["name"] for v in dashboard["templating"]["list"]} == {"datasource", "job"}
    for panel in dashboard["panels"]:
        assert panel["description"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert "$job" in target["expr"]
            used = re.findall(r"\$\w+", target["expr"])
            assert set(used) <= VARIABLES.keys()


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for left, top, width, height in (panel.place for panel in read_panels())
        for x in range(left, left + width)
        for y in range(top, top + height)
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


def test_job_is_one_that_the_rules_look_for() -> None:
    assert re.fullmatch(".*digits-serving", JOB)
