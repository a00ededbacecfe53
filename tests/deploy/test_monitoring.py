"""The monitoring component, rendered on top of the base."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.monitoring.dashboard import DASHBOARD, RULES
from tests.monitoring.prometheus import JOB


@pytest.fixture
def objects(with_component: Any) -> dict[tuple[Any, Any], Any]:
    rendered = with_component("monitoring").objects
    return {(each["kind"], each["metadata"]["name"]): each for each in rendered}


def test_pods_are_scraped_at_a_port_that_they_have(objects: dict[tuple[Any, Any], Any]) -> None:
    monitor = objects["PodMonitor", JOB]["spec"]
    template = objects["Deployment", JOB]["spec"]["template"]
    labels = monitor["selector"]["matchLabels"].items()
    assert labels <= template["metadata"]["labels"].items()
    [container] = template["spec"]["containers"]
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    assert endpoint["path"] == "/metrics"


def test_rules_arrive_unchanged(objects: dict[tuple[Any, Any], Any]) -> None:
    assert objects["PrometheusRule", JOB]["spec"] == yaml.safe_load(RULES.read_text())


def test_dashboard_arrives_unchanged(objects: dict[tuple[Any, Any], Any]) -> None:
    [board] = [
        each
        for (kind, _), each in objects.items()
        if kind == "ConfigMap" and "grafana_dashboard" in each["metadata"].get("labels", {})
    ]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    [content] = board["data"].values()
    assert json.loads(content) == json.loads(DASHBOARD.read_text())
