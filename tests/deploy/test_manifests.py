"""The base and every overlay, held to Kubernetes' schemas, to Pod Security, and to the server."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tomllib

import pytest

from service.config import ServerConfig, load_config
from service.host.addresses import is_loopback
from service.rpc.classify import SERVICE
from service.settings import FOREIGN_VARIABLES, ConfigError
from service.watchdog import STALL_TIMEOUT_S
from tests.conftest import ROOT

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from tests.deploy.conftest import DEPLOY, OVERLAYS, combined, image, rendered, tool
from tests.deploy.validators import ERRORS, KUBERNETES, NEWEST, OLDEST, validate

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# Pod Security "restricted" allows these kinds of volume and no others.
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image"),
    *("persistentVolumeClaim", "projected", "secret"),
}


# Kubernetes


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_valid_for_kubernetes(manifests, version):
    for document in manifests.objects:
        validate(document, version)


@pytest.mark.parametrize("version", KUBERNETES)
def test_misspelt_field_is_refused(version):
    deployment = copy.deepcopy(rendered("base").one("Deployment"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(ERRORS, match="readynessProbe"):
        validate(deployment, version)


def test_overlays_are_those_that_the_readme_names():
    assert OVERLAYS == ["canary", "cpu", "dev", "gpu"]


def test_services_select_the_pods_and_name_their_port(manifests):
    labels = manifests.template["metadata"]["labels"]
    by_address, headless = sorted(
        manifests.all("Service"), key=lambda service: "clusterIP" in service["spec"]
    )
    assert "clusterIP" not in by_address["spec"]
    assert headless["spec"]["clusterIP"] == "None"
    for service in (by_address, headless):
        assert service["spec"]["selector"].items() <= labels.items()
        (port,) = service["spec"]["ports"]
        assert port["targetPort"] in manifests.ports
        # Tells gateways and meshes that this is HTTP/2 without TLS.
        assert port["appProtocol"] == "kubernetes.io/h2c"


def test_every_selector_selects_the_pods(manifests):
    labels = manifests.template["metadata"]["labels"]
    spec = manifests.one("Deployment")["spec"]
    selectors = [spec["selector"], manifests.one("PodDisruptionBudget")["spec"]["selector"]]
    selectors += [spread["labelSelector"] for spread in manifests.pod["topologySpreadConstraints"]]
    for selector in selectors:
        assert selector["matchLabels"].items() <= labels.items()
        assert selector["matchLabels"]


def test_pods_spread_over_zones_and_nodes_but_are_never_held_back(manifests):
    spread = manifests.pod["topologySpreadConstraints"]
    assert [s["topologyKey"] for s in spread] == [
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    ]
    for each in spread:
        assert each["whenUnsatisfiable"] == "ScheduleAnyway"
        assert each["matchLabelKeys"] == ["pod-template-hash"]


def test_nodes_can_always_be_drained_one_pod_at_a_time(manifests):
    budget = manifests.one("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize("name", ["base", "overlays/cpu", "overlays/dev", "overlays/canary"])
def test_rollout_never_removes_a_ready_pod_first(name):
    strategy = rendered(name).one("Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}


def test_changed_setting_changes_the_config_maps_name(manifests):
    name = manifests.config_map["metadata"]["name"]
    assert re.fullmatch(r"digits-serving(-canary)?-[a-z0-9]{10}", name)


def test_every_object_is_in_the_overlays_namespace(manifests):
    spaced = [document for document in manifests.objects if document["kind"] != "Namespace"]
    (namespace,) = {document["metadata"]["namespace"] for document in spaced}
    for document in manifests.all("Namespace"):
        assert document["metadata"]["name"] == namespace


# Security


def test_namespace_enforces_restricted(manifests):
    for namespace in manifests.all("Namespace"):
        labels = namespace["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_deleting_the_canary_does_not_delete_the_namespace():
    assert not rendered("overlays/canary").all("Namespace")


def test_pod_meets_pod_security_restricted(manifests):
    pod, container = manifests.pod, manifests.container
    identity, rights = pod["securityContext"], container["securityContext"]
    assert identity["runAsNonRoot"] is True
    assert identity["runAsUser"] > 0
    assert identity["seccompProfile"] == {"type": "RuntimeDefault"}
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert not rights.keys() & {"privileged", "procMount", "runAsUser", "runAsNonRoot"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
    assert not any("hostPort" in port for port in container["ports"])
    for volume in pod["volumes"]:
        assert volume.keys() - {"name"} <= RESTRICTED_VOLUMES


def test_pod_writes_to_a_bounded_tmp_only(manifests):
    assert manifests.container["securityContext"]["readOnlyRootFilesystem"] is True
    (mount,) = manifests.container["volumeMounts"]
    (volume,) = manifests.pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/tmp"}
    assert volume["emptyDir"]["sizeLimit"]


def test_pod_gets_no_token_and_no_service_links(manifests):
    # A Service named digits-* would bring a DIGITS_* variable, which the server refuses.
    assert manifests.pod["enableServiceLinks"] is False
    assert manifests.pod["automountServiceAccountToken"] is False
    account = manifests.one("ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert manifests.pod["serviceAccountName"] == account["metadata"]["name"]


def test_resources_are_requested_and_limited(manifests):
    for kind in ("requests", "limits"):
        assert {"cpu", "memory", "ephemeral-storage"} <= set(manifests.container["resources"][kind])


def checkov(tmp_path, texts, *flags):
    # An environment of its own: checkov pins versions that others need newer (make manifests).
    program = ROOT / ".venv-checkov/bin/checkov"
    if not program.exists():
        pytest.skip(f"{program} is not there: make manifests installs it")
    folder = tmp_path / "rendered"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.yaml").write_text(text)
    command = [program, "-d", folder, "--quiet", "--compact", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_overlays_pass_checkov(tmp_path):
    texts = [rendered(f"overlays/{overlay}").text for overlay in OVERLAYS]
    checked = checkov(tmp_path, texts, "--config-file", DEPLOY / "checkov.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_overlay_with_a_digest_passes_checkov_without_exceptions(tmp_path):
    digest = {"name": "digits-serving", "digest": f"sha256:{'0' * 64}"}
    path = "/spec/template/spec/containers/0/imagePullPolicy"
    always = json.dumps([{"op": "replace", "path": path, "value": "Always"}])
    manifests = combined(
        tmp_path / "overlay", [], base="overlays/cpu", images=[digest],
        patches=[{"target": {"kind": "Deployment"}, "patch": always}],
    )  # fmt: skip
    checked = checkov(tmp_path, [manifests.text], "--framework", "kubernetes", "--skip-download")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_checkov_finds_a_privileged_container(tmp_path):
    text = rendered("overlays/cpu").text.replace(
        "allowPrivilegeEscalation: false", "privileged: true"
    )
    checked = checkov(tmp_path, [text], "--config-file", DEPLOY / "checkov.yaml")
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert "CKV_K8S_16" in checked.stdout


# The server


def test_every_setting_is_known_to_the_server(manifests):
    assert all(name.startswith("DIGITS_") for name in manifests.settings)
    assert not manifests.settings.keys() & FOREIGN_VARIABLES
    load_config([], manifests.settings)


def test_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match="DIGITS_GRACE"):
        load_config([], rendered("base").settings | {"DIGITS_GRACE": "20"})


def test_ports_are_the_servers(manifests):
    config = manifests.config
    assert manifests.ports == {"grpc": config.grpc_port, "http": config.http_port}
    assert (config.grpc_port, config.http_port) == (ServerConfig.grpc_port, ServerConfig.http_port)
    assert image()["EXPOSE"] == [f"{config.grpc_port} {config.http_port}"]
    for service in manifests.all("Service"):
        assert service["spec"]["ports"][0]["port"] == config.grpc_port


def test_probes_ask_the_grpc_port_for_the_right_service(manifests):
    asked = {name: manifests.container[name]["grpc"] for name in PROBES}
    assert {probe["port"] for probe in asked.values()} == {manifests.config.grpc_port}
    assert asked["startupProbe"]["service"] == asked["readinessProbe"]["service"] == SERVICE
    assert asked["livenessProbe"]["service"] == ""


def test_startup_is_given_five_minutes_and_liveness_outlasts_a_stall(manifests):
    startup, liveness = manifests.container["startupProbe"], manifests.container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > STALL_TIMEOUT_S


def test_server_listens_for_callers_from_elsewhere(manifests):
    assert not is_loopback(manifests.config.host)


def test_transport_is_the_one_that_bounds_its_callers(manifests):
    assert manifests.config.transport == "http2"


@pytest.mark.parametrize("name", ["base", "overlays/cpu", "overlays/gpu", "overlays/canary"])
def test_pod_goes_on_serving_until_balancers_have_noticed(name):
    assert rendered(name).config.drain_delay_s >= 5


def test_pod_is_given_longer_than_the_drain_takes(manifests):
    grace = manifests.pod["terminationGracePeriodSeconds"]
    assert grace > manifests.config.drain_delay_s + manifests.config.grace_s


def test_image_tag_is_the_projects_version(manifests):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tags = {f"digits-serving:{version}", f"digits-serving:{version}-cuda"}
    assert manifests.container["image"] in tags


# The GPU


def test_gpu_pod_asks_for_a_gpu_and_never_serves_on_the_cpu():
    gpu, cpu = rendered("overlays/gpu"), rendered("overlays/cpu")
    assert gpu.config.device == "cuda"
    assert cpu.config.device == "auto"
    assert gpu.container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in cpu.text
    assert gpu.pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert gpu.container["image"].endswith("-cuda")


def test_gpu_rollout_needs_no_spare_gpu():
    strategy = rendered("overlays/gpu").one("Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 1}


# Tools


def test_files_pass_yamllint():
    command = [tool("yamllint"), "--strict", "-c", DEPLOY / ".yamllint", DEPLOY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_oldest_and_newest_kubernetes_are_those_of_the_readme():
    assert f"Kubernetes {OLDEST} to {NEWEST}" in (DEPLOY / "README.md").read_text()
