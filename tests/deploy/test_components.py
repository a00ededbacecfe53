"""Components: every set of them that can be used together renders, and each does what it says."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from digits.v1 import digits_pb2
from service.artifact.repository import in_serving_order
from service.config import load_config
from tests.conftest import COMMITTED

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from tests.deploy.conftest import (
    COMPONENTS,
    DEPLOY,
    OVERLAYS,
    combinations,
    combined,
    image_variables,
    kustomize,
    rendered,
)
from tests.deploy.validators import CUSTOM, ERRORS, NEWEST, OLDEST, validate

# Image volumes are on by default from here on; before, the API server drops the field.
IMAGE_VOLUMES = "1.35"


@pytest.fixture(scope="module")
def with_component(tmp_path_factory):
    """Base with one component: each rendered once."""
    cache = {}

    def render(name):
        if name not in cache:
            cache[name] = combined(tmp_path_factory.mktemp(name), [name])
        return cache[name]

    return render


def test_every_component_is_in_a_combination():
    assert {name for names in combinations() for name in names} == set(COMPONENTS)


@pytest.mark.full
def test_every_combination_renders_and_its_settings_are_accepted(tmp_path):
    def check(names):
        manifests = combined(tmp_path / ("-".join(names) or "none"), names)
        load_config([], manifests.settings)
        keys = [(d["apiVersion"], d["kind"], d["metadata"]["name"]) for d in manifests.objects]
        assert len(set(keys)) == len(keys), names
        mounts = [mount["mountPath"] for mount in manifests.container["volumeMounts"]]
        assert len(set(mounts)) == len(mounts), names
        volumes = {volume["name"] for volume in manifests.pod["volumes"]}
        assert volumes == {mount["name"] for mount in manifests.container["volumeMounts"]}, names
        return manifests

    with ThreadPoolExecutor(2) as pool:  # kubectl is a process of its own
        assert len(list(pool.map(check, combinations()))) >= 150


@pytest.mark.full
def test_another_kustomize_renders_the_same(tmp_path):
    """What ``kubectl apply -k`` makes of the manifests does not depend on whose kubectl it is."""
    beside_python = Path(sys.executable).parent
    folders = [each for each in os.get_exec_path() if Path(each) != beside_python]
    kubectl = shutil.which("kubectl", path=os.pathsep.join(folders))
    if kubectl is None:
        pytest.skip("no other kubectl is on the PATH than the one beside Python")
    command = [kubectl, "version", "--client", "--output=json"]
    said = json.loads(subprocess.run(command, capture_output=True, check=False).stdout)
    version = said.get("kustomizeVersion", "v0.0")
    if int(version.lstrip("v").partition(".")[0]) < 5:
        pytest.skip(f"{kubectl} has kustomize {version} in it, which is of before 2023")
    for name in ["base", "kserve", *(f"overlays/{overlay}" for overlay in OVERLAYS)]:
        assert kustomize(DEPLOY / name, kubectl).text == rendered(name).text, f"{name}, {version}"
    for name in COMPONENTS:
        folder = tmp_path / name
        assert combined(folder, [name]).text == kustomize(folder, kubectl).text, (
            f"{name}, {version}"
        )


@pytest.mark.full
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
@pytest.mark.parametrize("extra", ["model-pvc", "tls", "gateway", "monitoring"])
def test_overlays_take_components_too(tmp_path, overlay, extra):
    for document in combined(tmp_path, [extra], base=f"overlays/{overlay}").objects:
        validate(document, NEWEST)


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_is_valid_for_the_oldest_and_newest_kubernetes(with_component, name):
    for document in with_component(name).objects:
        validate(document, IMAGE_VOLUMES if name == "model-image" else OLDEST)
        validate(document, NEWEST)


def test_every_kind_of_object_in_a_component_has_a_schema(with_component):
    """Or kubernetes-validate would pass what it does not know with a warning."""
    builtin = {"v1", "apps/v1", "autoscaling/v2", "policy/v1", "networking.k8s.io/v1"}
    for name in COMPONENTS:
        for document in with_component(name).objects:
            version, kind = document["apiVersion"], document["kind"]
            assert version in builtin or kind in CUSTOM[version], f"{name}: {version} {kind}"


# Those of deploy/kserve have tests of their own.
KINDS = sorted(set().union(*CUSTOM.values()) - {"InferenceService", "ServingRuntime"})


@pytest.mark.parametrize("kind", KINDS)
def test_bogus_field_of_a_custom_resource_is_refused(with_component, kind):
    found = [d for name in COMPONENTS for d in with_component(name).all(kind)]
    for where in ("spec", None):
        document = copy.deepcopy(found[0])
        (document[where] if where else document)["bogus"] = 1
        with pytest.raises(ERRORS, match="bogus"):
            validate(document, NEWEST)


def test_wrong_port_in_a_route_is_refused(with_component):
    route = copy.deepcopy(with_component("gateway").one("GRPCRoute"))
    route["spec"]["rules"][0]["backendRefs"][0]["port"] = "grpc"
    with pytest.raises(ERRORS):
        validate(route, NEWEST)


@pytest.mark.parametrize("name", ["hpa-cpu", "hpa", "keda"])
def test_what_an_autoscaler_owns_is_not_set(with_component, name):
    assert "replicas" not in with_component(name).one("Deployment")["spec"]


# networkpolicy


def policy_of(manifests):
    """The policy that concerns the server's pods by their label."""
    labels = manifests.template["metadata"]["labels"]
    (policy,) = [
        policy["spec"]
        for policy in manifests.all("NetworkPolicy")
        if (selector := policy["spec"]["podSelector"].get("matchLabels"))
        and selector.items() <= labels.items()
    ]
    return policy


def test_policy_lets_named_callers_in_and_nothing_out(with_component):
    manifests = with_component("networkpolicy")
    policy = policy_of(manifests)
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert not policy.get("egress")
    callers, monitoring = policy["ingress"]
    assert [port["port"] for port in callers["ports"]] == ["grpc"]
    assert [port["port"] for port in monitoring["ports"]] == ["http"]
    assert {"grpc", "http"} == manifests.ports.keys()
    for peer in callers["from"]:
        assert peer["podSelector"]["matchLabels"], "a peer without labels is everybody"


def test_rest_of_the_namespace_is_denied_by_default(with_component):
    policies = [policy["spec"] for policy in with_component("networkpolicy").all("NetworkPolicy")]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies


# gateway


@pytest.mark.parametrize("folder", ["component", "canary"])
def test_route_leads_to_services_and_methods_that_exist(with_component, tmp_path, folder):
    stable = with_component("gateway")
    manifests = stable if folder == "component" else combined(tmp_path, [], base="overlays/canary")
    services = {
        service["metadata"]["name"]: service["spec"]["ports"][0]["port"]
        for service in [*stable.all("Service"), *manifests.all("Service")]
    }
    for rule in manifests.one("GRPCRoute")["spec"]["rules"]:
        for match in rule["matches"]:
            known = {s.full_name for s in digits_pb2.DESCRIPTOR.services_by_name.values()}
            assert match["method"]["service"] in known
        assert sum(backend["weight"] for backend in rule["backendRefs"]) == 100
        for backend in rule["backendRefs"]:
            assert services[backend["name"]] == backend["port"]


def test_canary_route_takes_the_stable_routes_place(with_component, tmp_path):
    canary = combined(tmp_path, [], base="overlays/canary")
    for manifests in (with_component("gateway"), canary):
        assert manifests.one("GRPCRoute")["metadata"]["name"] == "digits-serving"
    stable = with_component("gateway").one("Deployment")["spec"]["selector"]["matchLabels"]
    labels = canary.template["metadata"]["labels"]
    assert not stable.items() <= labels.items(), "stable's selector would take in the canary"


def test_policy_and_monitor_take_in_the_canary(with_component, tmp_path):
    labels = combined(tmp_path, [], base="overlays/canary").template["metadata"]["labels"]
    (policy,) = [
        p["spec"]["podSelector"]["matchLabels"]
        for p in with_component("networkpolicy").all("NetworkPolicy")
        if p["spec"]["podSelector"]
    ]
    monitor = with_component("monitoring").one("PodMonitor")["spec"]["selector"]["matchLabels"]
    assert policy.items() <= labels.items()
    assert monitor.items() <= labels.items()


# monitoring


def test_monitor_names_the_pods_port_and_path(with_component):
    manifests = with_component("monitoring")
    monitor = manifests.one("PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= (
        manifests.template["metadata"]["labels"].items()
    )
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in manifests.ports
    assert endpoint["path"] == "/metrics"


# tls


def test_tls_files_are_those_of_the_certificates_secret(with_component):
    manifests = with_component("tls")
    config = manifests.config
    (mount,) = [m for m in manifests.container["volumeMounts"] if m["name"] == "tls"]
    assert mount["readOnly"] is True
    assert "subPath" not in mount  # a renewed certificate would not arrive
    # The names that cert-manager gives the keys of the secret.
    assert config.tls_cert == f"{mount['mountPath']}/tls.crt"
    assert config.tls_key == f"{mount['mountPath']}/tls.key"
    (volume,) = [v for v in manifests.pod["volumes"] if v["name"] == "tls"]
    certificates = {c["metadata"]["name"]: c["spec"] for c in manifests.all("Certificate")}
    assert volume["secret"]["secretName"] == certificates["digits-serving"]["secretName"]
    issuers = {issuer["metadata"]["name"]: issuer["spec"] for issuer in manifests.all("Issuer")}
    for certificate in certificates.values():
        assert certificate["issuerRef"]["name"] in issuers
    assert issuers["digits-ca"]["ca"]["secretName"] == certificates["digits-ca"]["secretName"]


def test_certificate_names_both_services(with_component):
    manifests = with_component("tls")
    names = {c["metadata"]["name"]: c["spec"] for c in manifests.all("Certificate")}
    covered = names["digits-serving"]["dnsNames"]
    for service in manifests.all("Service"):
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        assert {name, f"{name}.{namespace}.svc"} <= set(covered)


def test_probes_of_a_pod_with_tls_do_without_it(with_component):
    manifests = with_component("tls")
    paths = {"startupProbe": "/healthz", "readinessProbe": "/healthz", "livenessProbe": "/livez"}
    for probe, path in paths.items():
        asked = manifests.container[probe]
        assert asked["httpGet"] == {"path": path, "port": "http"}
        assert "grpc" not in asked
    for service in manifests.all("Service"):
        assert service["spec"]["ports"][0]["appProtocol"] == "https"


def test_key_can_be_read_by_the_servers_group_and_nobody_else(with_component):
    pod = with_component("tls").pod
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert secret["defaultMode"] == 0o440
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


# model-pvc, model-image


@pytest.mark.parametrize("name", ["model-pvc", "model-image"])
def test_model_is_mounted_read_only_where_the_server_looks(with_component, name):
    (mount,) = [m for m in with_component(name).container["volumeMounts"] if m["name"] == "models"]
    repository = image_variables()["DIGITS_MODEL_REPOSITORY"]
    assert mount == {"name": "models", "mountPath": repository, "readOnly": True}


def test_loader_writes_to_the_claim_and_is_restricted_too(with_component):
    loader = yaml.safe_load((DEPLOY / "components/model-pvc/loader.yaml").read_text())
    validate(loader, OLDEST)
    validate(loader, NEWEST)
    manifests = with_component("model-pvc")
    (claim,) = manifests.all("PersistentVolumeClaim")
    (volume,) = loader["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    (container,) = loader["spec"]["containers"]
    assert container["image"] == manifests.container["image"]
    assert container["securityContext"] == manifests.container["securityContext"]
    same = manifests.pod["securityContext"]
    assert same.items() <= loader["spec"]["securityContext"].items()


def test_model_images_tag_is_the_release_that_serves(with_component):
    (volume,) = [v for v in with_component("model-image").pod["volumes"] if v["name"] == "models"]
    release = in_serving_order(COMMITTED)[0].name
    assert volume["image"]["reference"] == f"digits-models:{release}"
    text = (DEPLOY / "Dockerfile.model").read_text()
    assert "\nARG MODELS=models/digits\nCOPY ${MODELS} /\n" in text


COMPONENTS = sorted(path.name for path in (DEPLOY / "components").iterdir())


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_lands_in_the_namespace_whatever_a_users_overlay_says(name, tmp_path):
    """An overlay that forgets ``namespace`` would leave objects where nothing looks for them."""
    manifests = combined(tmp_path / "overlay", [name])
    for each in manifests.objects:
        if each["kind"] != "Namespace":
            assert each["metadata"].get("namespace") == "digits", each["metadata"]["name"]
    other = combined(tmp_path / "other", [name], namespace="elsewhere")
    assert {each["metadata"].get("namespace") for each in other.objects} <= {"elsewhere", None}


def test_dashboard_keeps_its_name_when_it_changes(with_component):
    names = [
        each["metadata"]["name"]
        for each in with_component("monitoring").objects
        if "dashboard" in each["metadata"]["name"]
    ]
    assert names == ["digits-serving-dashboard"]
