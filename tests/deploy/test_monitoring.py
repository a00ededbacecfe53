"""The monitoring component, rendered on top of the base."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import yaml

from tests.conftest import ROOT
from tests.deploy.conftest import tool
from tests.monitoring.dashboard import DASHBOARD, RULES
from tests.monitoring.prometheus import JOB


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    overlay = tmp_path_factory.mktemp("overlay")
    deploy = os.path.relpath(ROOT / "deploy", overlay)
    kustomization = {
        "resources": [f"{deploy}/base"],
        "components": [f"{deploy}/components/monitoring"],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    command = [tool("kubectl"), "kustomize", overlay]
    rendered = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rendered.returncode == 0, rendered.stderr
    return {
        (each["kind"], each["metadata"]["name"]): each
        for each in yaml.safe_load_all(rendered.stdout)
    }


def test_pods_are_scraped_at_a_port_that_they_have(objects):
    monitor = objects["PodMonitor", JOB]["spec"]
    template = objects["Deployment", JOB]["spec"]["template"]
    labels = monitor["selector"]["matchLabels"].items()
    assert labels <= template["metadata"]["labels"].items()
    [container] = template["spec"]["containers"]
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    assert endpoint["path"] == "/metrics"


def test_rules_arrive_unchanged(objects):
    assert objects["PrometheusRule", JOB]["spec"] == yaml.safe_load(RULES.read_text())


def test_dashboard_arrives_unchanged(objects):
    [board] = [
        each
        for (kind, _), each in objects.items()
        if kind == "ConfigMap" and "grafana_dashboard" in each["metadata"].get("labels", {})
    ]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    [content] = board["data"].values()
    assert json.loads(content) == json.loads(DASHBOARD.read_text())
