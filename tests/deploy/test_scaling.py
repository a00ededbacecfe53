"""Autoscalers go by metrics that the server really exports, and reach new pods with calls."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import urllib.request

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from digits.client import DigitClient
from tests.conftest import wait_until
from tests.deploy.conftest import DEPLOY, combined, rendered
from tests.monitoring.dashboard import RULES
from tests.monitoring.prometheus import running_prometheus

(RULE,) = yaml.safe_load((DEPLOY / "components/hpa/adapter-rule.yaml").read_text())


@pytest.fixture(scope="module")
def autoscaler(tmp_path_factory):
    return combined(tmp_path_factory.mktemp("hpa"), ["hpa"]).one("HorizontalPodAutoscaler")["spec"]


@pytest.fixture(scope="module")
def scaled_object(tmp_path_factory):
    return combined(tmp_path_factory.mktemp("keda"), ["keda"]).one("ScaledObject")["spec"]


def queries(scaled_object):
    adapter = RULE["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="digits",pod="a"')
    triggers = (t["metadata"].get("query") for t in scaled_object["triggers"])
    return [adapter.replace("<<.GroupBy>>", "pod"), *filter(None, triggers)]


def test_autoscaler_asks_for_the_metric_that_the_adapter_makes(autoscaler):
    (pods,) = (metric["pods"] for metric in autoscaler["metrics"] if metric["type"] == "Pods")
    assert pods["metric"]["name"] == RULE["name"]["as"]


def test_every_metric_of_a_query_is_in_a_live_scrape(start_server, scaled_object):
    server = start_server()
    text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()
    exported = {s.name for family in text_string_to_metric_families(text) for s in family.samples}
    asked = [re.findall(r"\b(digits_\w+)", query) for query in queries(scaled_object)]
    asked.append(re.findall(r"^\w+", RULE["seriesQuery"]))
    assert all(asked)
    assert set(itertools.chain(*asked)) <= exported


@pytest.mark.full
def test_queries_are_promql(tmp_path, scaled_object):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    for query, right in [*((q, True) for q in queries(scaled_object)), ("sum by (", False)]:
        rule = {"record": "digits:test", "expr": query}
        file = tmp_path / "rules.yaml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "test", "rules": [rule]}]}))
        command = ["promtool", "check", "rules", file]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is right, done.stderr


@pytest.mark.full
def test_queries_tell_a_real_prometheus_how_long_requests_wait(start_server, sample, scaled_object):
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    server = start_server()
    with (
        running_prometheus(server.http.removeprefix("http://"), RULES) as prometheus,
        DigitClient(server.address) as client,
    ):

        def waits(query):
            client.classify(sample["images"])
            return [series.points[0][1] for series in prometheus.query(query)]

        for query in queries(scaled_object):
            # Kubernetes' labels come with Kubernetes.
            plain = re.sub(r"\{.*?\}", "", query)
            wait_until(lambda plain=plain: waits(plain) not in ([], [0.0]))
            (wait_s,) = waits(plain)
            assert 0 < wait_s < 1


def test_keda_scales_as_the_autoscaler_does(autoscaler, scaled_object):
    by_type = {trigger["type"]: trigger["metadata"] for trigger in scaled_object["triggers"]}
    cpu, pods = autoscaler["metrics"]
    assert by_type["cpu"]["value"] == str(cpu["resource"]["target"]["averageUtilization"])
    milliseconds = int(pods["pods"]["target"]["averageValue"].removesuffix("m"))
    assert float(by_type["prometheus"]["threshold"]) == milliseconds / 1000
    own = scaled_object["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert own == autoscaler["behavior"]
    for end in ("min", "max"):
        assert scaled_object[f"{end}ReplicaCount"] == autoscaler[f"{end}Replicas"]


def test_keda_asks_for_the_namespace_of_the_overlay(scaled_object):
    (namespace,) = {
        document["metadata"]["namespace"] for document in rendered("overlays/cpu").all("Deployment")
    }
    (query,) = queries(scaled_object)[1:]
    assert re.findall(r'namespace="(.*?)"', query) == [namespace] * 2


def test_rate_has_three_scrapes_in_its_window(tmp_path, scaled_object):
    monitor = combined(tmp_path, ["monitoring"]).one("PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    interval = int(endpoint["interval"].removesuffix("s"))
    for query in queries(scaled_object):
        for window in re.findall(r"\[(\d+)s\]", query):
            assert int(window) >= 3 * interval


def test_scaled_target_is_the_deployment_and_never_less_than_two(autoscaler):
    target = autoscaler["scaleTargetRef"]
    deployment = rendered("base").one("Deployment")
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert autoscaler["minReplicas"] >= 2
    assert autoscaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300


@pytest.mark.parametrize("name", ["base", "overlays/cpu"])
def test_connections_age(name):
    assert 0 < rendered(name).config.max_connection_age_s <= 300
