"""deploy/examples, which nobody has run: rendered, and held to the server and to the base."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.config import load_config
from service.rpc.classify import SERVICE
from tests.conftest import REPOSITORY, RunningServer

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from tests.deploy.conftest import DEPLOY, Manifests, image_variables, rendered
from tests.deploy.validators import NEWEST, validate


def test_metrics_of_kedas_query_are_in_a_live_scrape_and_have_its_namespace(
    with_component: Callable[[str], Manifests], start_server: Callable[..., RunningServer]
) -> None:
    manifests = with_component("keda")
    triggers = manifests.one("ScaledObject")["spec"]["triggers"]
    (query,) = [t["metadata"]["query"] for t in triggers if "query" in t["metadata"]]
    text = urllib.request.urlopen(f"{start_server().http}/metrics").read().decode()
    exported = {s.name for family in text_string_to_metric_families(text) for s in family.samples}
    asked = re.findall(r"\b(digits_\w+)", query)
    assert asked
    assert set(asked) <= exported
    namespace = manifests.one("Deployment")["metadata"]["namespace"]
    assert set(re.findall(r'namespace="(.*?)"', query)) == {namespace}


def test_canary_is_beside_the_stable_pods_and_has_a_part_of_the_route(
    with_component: Callable[[str], Manifests],
) -> None:
    canary, stable = rendered("examples/canary"), with_component("gateway")
    labels = canary.template["metadata"]["labels"].items()
    selector = stable.one("Deployment")["spec"]["selector"]["matchLabels"]
    assert not selector.items() <= labels, "stable's selector would take in the canary"
    policy = with_component("networkpolicy").one("NetworkPolicy")["spec"]["podSelector"]
    monitor = with_component("monitoring").one("PodMonitor")["spec"]["selector"]
    assert policy["matchLabels"].items() <= labels
    assert monitor["matchLabels"].items() <= labels
    services = {s["metadata"]["name"] for m in (stable, canary) for s in m.all("Service")}
    (rule,) = canary.one("GRPCRoute")["spec"]["rules"]
    assert {backend["name"] for backend in rule["backendRefs"]} <= services
    assert not canary.all("Namespace"), "deleting the canary would delete the stable pods"


def test_model_volume_is_where_the_server_looks_and_the_loader_writes_to_it(
    with_component: Callable[[str], Manifests],
) -> None:
    manifests = with_component("model-volume")
    (mount,) = [m for m in manifests.container["volumeMounts"] if m["name"] == "models"]
    assert mount["mountPath"] == image_variables()["DIGITS_MODEL_REPOSITORY"]
    assert mount["readOnly"] is True
    loader = yaml.safe_load((DEPLOY / "examples/model-volume/loader.yaml").read_text())
    validate(loader, NEWEST)
    (volume,) = loader["spec"]["volumes"]
    claim = manifests.one("PersistentVolumeClaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"] == {"claimName": claim}
    (container,) = loader["spec"]["containers"]
    assert container["image"] == manifests.container["image"]


def test_kserves_runtime_is_at_one_with_the_server() -> None:
    kserve = rendered("examples/kserve")
    (container,) = kserve.one("ServingRuntime")["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    config = load_config([], image_variables() | given)
    # The folder's name is the model's on the wire.
    assert config.model_repository == f"/mnt/models/{REPOSITORY.name}"
    assert [port["containerPort"] for port in container["ports"]] == [config.grpc_port]
    probes = {name: container[name]["grpc"] for name in container if name.endswith("Probe")}
    assert {probe["port"] for probe in probes.values()} == {config.grpc_port}
    assert probes["readinessProbe"]["service"] == probes["startupProbe"]["service"] == SERVICE
    base = rendered("base")
    assert container["image"] == base.container["image"]
    rights = base.container["securityContext"] | base.pod["securityContext"]
    assert container["securityContext"] == rights
    predictor = kserve.one("InferenceService")["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] > config.drain_delay_s + config.grace_s
