"""The monitoring component, rendered on top of the base."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from tests.deploy.conftest import Manifests, Object
from tests.monitoring.dashboard import RULES
from tests.monitoring.prometheus import JOB


@pytest.fixture
def objects(with_component: Callable[[str], Manifests]) -> dict[tuple[str, str], Object]:
    rendered = with_component("monitoring").objects
    return {(each["kind"], each["metadata"]["name"]): each for each in rendered}


def test_pods_are_scraped_at_a_port_that_they_have(objects: dict[tuple[str, str], Object]) -> None:
    monitor = objects["PodMonitor", JOB]["spec"]
    template = objects["Deployment", JOB]["spec"]["template"]
    labels = monitor["selector"]["matchLabels"].items()
    assert labels <= template["metadata"]["labels"].items()
    [container] = template["spec"]["containers"]
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    assert endpoint["path"] == "/metrics"


def test_rules_arrive_unchanged(objects: dict[tuple[str, str], Object]) -> None:
    assert objects["PrometheusRule", JOB]["spec"] == yaml.safe_load(RULES.read_text())
