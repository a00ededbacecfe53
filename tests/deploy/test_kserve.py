"""deploy/kserve: valid for KServe's schemas, and at one with the server."""

from __future__ import annotations

import copy

import kubernetes_validate
import pytest

from digits.oip import inference_pb2
from service.config import load_config
from service.rpc.classify import SERVICE
from tests.conftest import REPOSITORY
from tests.deploy.conftest import image_variables, rendered
from tests.deploy.validators import ERRORS, OLDEST, validate

# Where KServe's storage initializer puts a model.
MOUNT = "/mnt/models"


@pytest.fixture
def kserve():
    return rendered("kserve")


@pytest.fixture
def runtime(kserve):
    return kserve.one("ServingRuntime")


@pytest.fixture
def predictor(kserve):
    return kserve.one("InferenceService")["spec"]["predictor"]


def container_of(runtime):
    (only,) = runtime["spec"]["containers"]
    return only


def config_of(runtime):
    given = {each["name"]: each["value"] for each in container_of(runtime)["env"]}
    return load_config([], image_variables() | given)


@pytest.mark.parametrize("kind", ["ServingRuntime", "InferenceService"])
def test_object_is_valid_and_a_misspelt_field_is_not(kserve, kind):
    document = kserve.one(kind)
    validate(document, OLDEST)
    wrong = copy.deepcopy(document)
    wrong["spec"]["predicter"] = wrong["spec"].pop("predictor", None)
    with pytest.raises(ERRORS, match="predicter"):
        validate(wrong, OLDEST)


def test_runtimes_container_is_one_that_kubernetes_takes(runtime):
    """KServe makes a pod of it; its own schema may know older fields."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x"},
        "spec": {key: runtime["spec"][key] for key in ("containers", "volumes")},
    }
    assert kubernetes_validate.validate(pod, OLDEST, strict=True) == OLDEST


def test_service_asks_for_what_the_runtime_has(runtime, predictor):
    model, spec = predictor["model"], runtime["spec"]
    assert model["runtime"] == runtime["metadata"]["name"]
    (form,) = spec["supportedModelFormats"]
    assert model["modelFormat"] == {"name": form["name"], "version": form["version"]}
    assert model["protocolVersion"] in spec["protocolVersions"]
    assert inference_pb2.DESCRIPTOR.package == "inference"


def test_runtime_is_at_one_with_the_server(runtime, predictor):
    config, container = config_of(runtime), container_of(runtime)
    # The folder's name is the model's on the wire.
    assert config.model_repository == f"{MOUNT}/{REPOSITORY.name}"
    assert [port["containerPort"] for port in container["ports"]] == [config.grpc_port]
    annotations = runtime["spec"]["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(config.http_port)
    probes = {name: container[name]["grpc"] for name in container if name.endswith("Probe")}
    assert {probe["port"] for probe in probes.values()} == {config.grpc_port}
    assert probes["livenessProbe"]["service"] == ""
    assert probes["readinessProbe"]["service"] == probes["startupProbe"]["service"] == SERVICE
    assert predictor["terminationGracePeriodSeconds"] > config.drain_delay_s + config.grace_s


def test_container_has_no_rights_and_is_that_of_the_base(runtime):
    base = rendered("base").container
    container = container_of(runtime)
    assert container["image"] == base["image"]
    pod_wide = rendered("base").pod["securityContext"]
    assert container["securityContext"] == {**base["securityContext"], **pod_wide}
