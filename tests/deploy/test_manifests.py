"""Manifests, held to Kubernetes' schemas and to the server; tests/cluster applies them."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from digits.v1 import digits_pb2
from service.config import load_config
from service.host.addresses import is_loopback
from service.rpc.classify import SERVICE
from service.settings import FOREIGN_VARIABLES
from service.watchdog import STALL_TIMEOUT_S
from tests.conftest import ROOT, RunningServer

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from tests.deploy.conftest import (
    ADDED_EXAMPLES,
    COMPONENTS,
    DEPLOY,
    EXAMPLES,
    Manifests,
    checkov,
    combinations,
    combined,
    image,
    kustomize,
    rendered,
    tool,
)
from tests.deploy.validators import ERRORS, KUBERNETES, NEWEST, OLDEST, validate

PROBES = ("startup", "readiness", "liveness")
ROOTS = ["base", "overlays/cpu", *(f"examples/{e}" for e in EXAMPLES if e not in ADDED_EXAMPLES)]


# Kubernetes


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", [*ROOTS, *COMPONENTS, *ADDED_EXAMPLES])
def test_every_object_is_valid_for_kubernetes(
    with_component: Callable[[str], Manifests], name: str, version: str
) -> None:
    for document in (rendered(name) if name in ROOTS else with_component(name)).objects:
        validate(document, version)


@pytest.mark.parametrize("version", KUBERNETES)
def test_misspelt_field_is_refused(version: str) -> None:
    deployment = copy.deepcopy(rendered("base").one("Deployment"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(ERRORS, match="readynessProbe"):
        validate(deployment, version)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("gateway", "GRPCRoute"), ("monitoring", "PodMonitor"), ("monitoring", "PrometheusRule")),
        *(("tls", "Certificate"), ("tls", "Issuer"), ("keda", "ScaledObject")),
    ],
)
def test_unknown_field_of_a_custom_resource_is_refused(
    with_component: Callable[[str], Manifests], name: str, kind: str
) -> None:
    document = copy.deepcopy(with_component(name).all(kind)[0])
    document["spec"]["bogus"] = 1
    with pytest.raises(ERRORS, match="bogus"):
        validate(document, NEWEST)


@pytest.mark.full
def test_every_combination_renders_and_its_settings_are_accepted(tmp_path: Path) -> None:
    for names in combinations():
        manifests = combined(tmp_path / ("-".join(names) or "none"), names)
        load_config([], manifests.settings)
        mounts = [mount["mountPath"] for mount in manifests.container["volumeMounts"]]
        assert len(set(mounts)) == len(mounts), names


@pytest.mark.full
def test_another_kustomize_renders_the_same() -> None:
    """Every kubectl renders the manifests alike."""
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
    for name in ROOTS:
        assert kustomize(DEPLOY / name, kubectl).text == rendered(name).text, f"{name}, {version}"


@pytest.mark.parametrize("name", [*COMPONENTS, *ADDED_EXAMPLES])
def test_component_lands_in_the_namespace_whatever_a_users_overlay_says(
    name: str, tmp_path: Path
) -> None:
    """An overlay that forgets ``namespace`` would leave objects where nothing looks for them."""
    for namespace, more in (("digits", {}), ("elsewhere", {"namespace": "elsewhere"})):
        for each in combined(tmp_path / namespace, [name], **more).objects:
            if each["kind"] != "Namespace":
                assert each["metadata"].get("namespace") == namespace, each["metadata"]["name"]


def test_every_selector_selects_the_pods(manifests: Manifests) -> None:
    """Services, the budget and the spreading go by labels, and a wrong one selects nothing."""
    labels = manifests.template["metadata"]["labels"].items()
    selectors = [each["spec"]["selector"] for each in manifests.all("Service")]
    spread = [each["labelSelector"] for each in manifests.pod["topologySpreadConstraints"]]
    objects = [*manifests.all("PodDisruptionBudget"), *manifests.all("Deployment")]
    selectors += [s["matchLabels"] for s in [*spread, *(o["spec"]["selector"] for o in objects)]]
    assert len(selectors) == 6
    assert all(selector and selector.items() <= labels for selector in selectors)


def test_overlay_passes_checkov(tmp_path: Path) -> None:
    file = tmp_path / "rendered.yaml"
    file.write_text(rendered("overlays/cpu").text)
    command = [checkov(), "-f", str(file), "--config-file", str(DEPLOY / "checkov.yaml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_files_pass_yamllint() -> None:
    command = [tool("yamllint"), "--strict", "-c", str(DEPLOY / ".yamllint"), str(DEPLOY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_oldest_and_newest_kubernetes_are_those_of_the_readme() -> None:
    assert f"Kubernetes {OLDEST} to {NEWEST}" in (DEPLOY / "README.md").read_text()


# The server


def test_every_setting_is_known_to_the_server(manifests: Manifests) -> None:
    assert not manifests.settings.keys() & FOREIGN_VARIABLES
    load_config([], manifests.settings)


def test_ports_are_the_servers(manifests: Manifests) -> None:
    config = manifests.config
    assert manifests.ports == {"grpc": config.grpc_port, "http": config.http_port}
    assert image()["EXPOSE"] == [f"{config.grpc_port} {config.http_port}"]
    for service in manifests.all("Service"):
        (port,) = service["spec"]["ports"]
        assert (port["port"], port["targetPort"]) == (config.grpc_port, "grpc")


def test_probes_ask_for_services_that_the_server_knows(manifests: Manifests) -> None:
    startup, ready, live = (manifests.container[f"{name}Probe"] for name in PROBES)
    assert {p["grpc"]["port"] for p in (startup, ready, live)} == {manifests.config.grpc_port}
    assert startup["grpc"]["service"] == ready["grpc"]["service"] == SERVICE
    assert live["grpc"]["service"] == ""
    assert live["periodSeconds"] * live["failureThreshold"] > STALL_TIMEOUT_S


def test_server_listens_for_callers_from_elsewhere(manifests: Manifests) -> None:
    assert not is_loopback(manifests.config.host)


def test_pod_is_given_longer_than_the_drain_takes(manifests: Manifests) -> None:
    grace = manifests.pod["terminationGracePeriodSeconds"]
    assert grace > manifests.config.drain_delay_s + manifests.config.grace_s


def test_image_is_the_projects_version_and_runs_as_the_pods_user(manifests: Manifests) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(rf"digits-serving:{version}(-cuda)?", manifests.container["image"])
    identity = manifests.pod["securityContext"]
    assert image()["USER"] == [f"{identity['runAsUser']}:{identity['runAsGroup']}"]


# Components


def test_policy_names_this_servers_pods_and_ports(
    with_component: Callable[[str], Manifests],
) -> None:
    manifests = with_component("networkpolicy")
    policy = manifests.one("NetworkPolicy")["spec"]
    labels = manifests.template["metadata"]["labels"].items()
    assert policy["podSelector"]["matchLabels"].items() <= labels
    ports = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
    assert ports == manifests.ports.keys()


def test_route_leads_to_a_service_and_to_methods_that_exist(
    with_component: Callable[[str], Manifests],
) -> None:
    manifests = with_component("gateway")
    ports = {s["metadata"]["name"]: s["spec"]["ports"][0]["port"] for s in manifests.all("Service")}
    known = {service.full_name for service in digits_pb2.DESCRIPTOR.services_by_name.values()}
    (rule,) = manifests.one("GRPCRoute")["spec"]["rules"]
    assert {match["method"]["service"] for match in rule["matches"]} <= known
    (backend,) = rule["backendRefs"]
    assert ports[backend["name"]] == backend["port"]


def test_tls_files_are_those_of_the_certificates_secret(
    with_component: Callable[[str], Manifests],
) -> None:
    manifests = with_component("tls")
    (mount,) = [m for m in manifests.container["volumeMounts"] if m["name"] == "tls"]
    # The names that cert-manager gives the keys of the secret.
    assert manifests.config.tls_cert == f"{mount['mountPath']}/tls.crt"
    assert manifests.config.tls_key == f"{mount['mountPath']}/tls.key"
    (volume,) = [v for v in manifests.pod["volumes"] if v["name"] == "tls"]
    certificates = {c["metadata"]["name"]: c["spec"] for c in manifests.all("Certificate")}
    served = certificates["digits-serving"]
    assert volume["secret"]["secretName"] == served["secretName"]
    for service in manifests.all("Service"):
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        assert {name, f"{name}.{namespace}.svc"} <= set(served["dnsNames"])


def test_probes_of_a_pod_with_tls_ask_pages_that_the_server_has(
    with_component: Callable[[str], Manifests], start_server: Callable[..., RunningServer]
) -> None:
    """Readiness asks another page than liveness, which does not depend on the model."""
    container, server = with_component("tls").container, start_server()
    paths = [container[f"{name}Probe"]["httpGet"]["path"] for name in PROBES]
    assert paths == ["/healthz", "/healthz", "/livez"]
    for path in paths:
        assert urllib.request.urlopen(server.http + path).status == 200
