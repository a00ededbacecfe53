"""The image, run as a pod would run it. `make image-test` builds it and names it in TEST_IMAGE.

Needs podman, docker will not do: its kube play runs the rendered Deployment itself. Containers
share the host's network, so that no bridge is needed; ports are free ones.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2
from PIL import Image

from digits.client import DigitClient
from service.artifact.format import load_artifact
from service.artifact.repository import in_serving_order
from service.rpc.classify import SERVICE
from service.serving.loader import ON_CPU
from tests.conftest import COMMITTED, free_ports, wait_until
from tests.releases import FP32

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from tests.deploy.conftest import combined
from tests.deploy.containers import IMAGE, NEEDS_IMAGE, Container, Containers, load, podman

pytestmark = NEEDS_IMAGE


@pytest.fixture
def served(start: Containers) -> Container:
    return start.serving()


def test_container_runs_without_rights_and_with_one_inference_for_one_cpu(
    served: Container,
) -> None:
    status = podman("exec", served.name, "cat", "/proc/1/status")
    fields = dict(re.findall(r"^(\w+):\s*(.+)$", status, flags=re.MULTILINE))
    assert int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert fields["Uid"].split()[0] == "65532"
    refused = "import sys; open(sys.argv[1], 'w')"
    for path in ("/probe", "/models/digits/probe", "/opt/digits/probe"):
        command = ["podman", "exec", served.name, "/opt/digits/bin/python", "-c", refused, path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Read-only file system" in done.stderr
    assert served.announced()["inference"].startswith("1 x 1 thread")
    assert served.health("") == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(("service", "code"), [(SERVICE, 0), ("", 0), ("digits.v1.Other", 3)])
def test_probe_client_of_kubernetes_gets_its_answer(
    served: Container, service: str, code: int
) -> None:
    """grpc_health_probe, in Go as the kubelet: 3 is an error's code, here NOT_FOUND."""
    probe = Path(os.environ.get("CLUSTER_PROGRAMS", "/nowhere"), "grpc-health-probe")
    if not probe.exists():
        pytest.skip("CLUSTER_PROGRAMS names no folder with grpc-health-probe: make cluster-test")
    command = [str(probe), f"-addr={served.address}", f"-service={service}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr


def test_image_holds_no_compiler_no_torch_and_no_installer_of_its_own(served: Container) -> None:
    names = ("torch", "pip", "training", "export")
    modules = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    assert podman("exec", served.name, "/opt/digits/bin/python", "-c", modules) == "[]"
    for compiler in ("gcc", "cc", "ld"):
        assert not podman("exec", served.name, "/bin/sh", "-c", f"command -v {compiler} || true")


def test_image_adds_320_mb_to_its_base_at_most(served: Container) -> None:
    """Unpacked. The last stage copies two folders and runs nothing."""
    sizes = podman("exec", served.name, "du", "-sb", "/opt/digits", "/models")
    assert sum(int(line.split()[0]) for line in sizes.splitlines()) <= 320e6, sizes


def test_server_imports_everything_that_it_may_need(served: Container) -> None:
    """The Dockerfile takes away nothing of that: tracing, signatures and every format work."""
    program = """if True:
        import importlib, pkgutil, digits.client, digits.files, onnxruntime, service
        from PIL import features
        for module in pkgutil.walk_packages(service.__path__, "service."):
            importlib.import_module(module.name)
        service.telemetry.tracing.Tracing("http://127.0.0.1:1")
        print([name for name in ("zlib", "jpg", "webp") if not features.check(name)])
    """
    command = ["exec", served.name, "/opt/digits/bin/python", "-W", "error", "-c", program]
    assert podman(*command) == "[]"


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP"])
def test_image_files_of_every_format_are_read(
    served: Container, sample: dict[str, np.ndarray], format_: str
) -> None:
    file = io.BytesIO()
    Image.fromarray(sample["images"][0]).save(file, format_)
    with DigitClient(served.address) as client:
        assert client.classify(file.getvalue()).digits[0] == sample["labels"][0]


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_load_survives_within_512_mib_and_sigterm_drains(
    start: Containers, sample: dict[str, np.ndarray], transport: str
) -> None:
    container = start.serving(settings={"TRANSPORT": transport, "DRAIN_DELAY_S": 1})
    with load(container.address, sample["images"]) as (errors, answered):
        wait_until(lambda: errors or min(answered) >= 50, timeout_s=120)
    assert not errors
    with load(container.address, sample["images"]):
        container.signal(signal.SIGTERM)
        assert container.exit_code() == 0, container.logs()
    assert "drained: every call was answered" in container.logs()
    assert container.state("OOMKilled") == "false"


def test_sigterm_during_the_load_of_a_model_ends_the_process(start: Containers) -> None:
    """As PID 1 a process that has no handler ignores it: the handler comes before all else."""
    container = start()
    status = Path("/proc", container.state("Pid"), "status")
    caught = re.compile(r"^SigCgt:\s*(\w+)$", re.MULTILINE)
    terminate = 1 << (signal.SIGTERM - 1)
    wait_until(lambda: int(caught.findall(status.read_text())[0], 16) & terminate)
    container.signal(signal.SIGTERM)
    began = time.monotonic()
    assert container.exit_code() == 0, container.logs()
    assert time.monotonic() - began < 10


def test_model_from_a_mounted_volume_serves_and_a_damaged_one_does_not(
    start: Containers, tmp_path: Path
) -> None:
    version = in_serving_order(COMMITTED)[0]
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        shutil.copytree(version, folder / version.name)
    tmp_path.chmod(0o755)
    model = bad / version.name / FP32
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    container = start.serving(volume=good)
    assert container.announced()["sha256"] == load_artifact(version).first_of(ON_CPU).sha256
    refused = start(volume=bad)
    assert refused.exit_code() == 1
    assert FP32 in refused.logs()


def test_cuda_without_a_gpu_ends_with_the_cause(start: Containers) -> None:
    container = start(settings={"DEVICE": "cuda"})
    assert container.exit_code() == 1
    assert "cuda" in container.logs().lower()


def test_rendered_deployment_serves_and_drains(
    tmp_path: Path, sample: dict[str, np.ndarray]
) -> None:
    """overlays/cpu as it is, on the host's network and other ports."""
    grpc_port, http_port = free_ports(2)
    name = f"digits-{uuid.uuid4().hex[:8]}"
    manifests = combined(
        tmp_path / "overlay", [], base="overlays/cpu",
        namePrefix=f"{name}-",
        images=[{"name": "digits-serving", "newName": IMAGE.rpartition(":")[0]}],
        configMapGenerator=[{
            "name": "digits-serving", "behavior": "merge",
            "literals": [f"DIGITS_GRPC_PORT={grpc_port}", f"DIGITS_HTTP_PORT={http_port}"],
        }],
    )  # fmt: skip
    deployment = manifests.one("Deployment")
    pod = deployment["spec"]["template"]["spec"]
    pod["hostNetwork"] = True
    del pod["containers"][0]["ports"]  # nothing is mapped there
    played = tmp_path / "play.yaml"
    played.write_text(yaml.safe_dump_all([manifests.config_map, deployment]))
    try:
        podman("kube", "play", "--network=host", str(played))
        listed = json.loads(podman("ps", "--all", "--format=json", f"--filter=name={name}"))
        (container_name,) = [c["Names"][0] for c in listed if not c["IsInfra"]]
        container = Container(container_name, grpc_port)
        container.wait_for_serving()
        limits = json.loads(podman("inspect", container_name))[0]["HostConfig"]
        assert limits["Memory"] == 512 * 2**20
        assert limits["ReadonlyRootfs"] is True
        assert container.announced()["inference"].startswith("1 x 1 thread")
        with DigitClient(container.address) as client:
            digits = [client.classify(image).digits[0] for image in sample["images"][:100]]
        assert np.mean(np.array(digits) == sample["labels"][:100]) > 0.97
        with load(container.address, sample["images"], callers=2) as (errors, _):
            # As the kubelet does it; a signal alone would be followed by a restart.
            grace = pod["terminationGracePeriodSeconds"]
            command = ["podman", "stop", f"--time={grace}", container_name]
            stopping = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            # Serves on for the drain delay: a balancer has that long to notice.
            wait_until(lambda: container.health(SERVICE) != health_pb2.HealthCheckResponse.SERVING)
            assert not errors
            assert stopping.wait(timeout=60) == 0
        assert container.state("ExitCode") == "0", container.logs()
        assert "drained: every call was answered" in container.logs()
    finally:
        podman("kube", "down", str(played), check=False)
