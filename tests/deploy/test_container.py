"""The image, run as a pod would run it. `make image-test` builds it and names it in TEST_IMAGE.

Needs podman, docker will not do: its kube play runs the rendered Deployment itself. Containers
share the host's network, so that no bridge is needed; ports are free ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from digits.client import DigitClient
from service.artifact.format import MANIFEST, load_artifact
from service.artifact.repository import in_serving_order
from service.rpc.classify import SERVICE
from service.serving.loader import ON_CPU
from tests.conftest import COMMITTED, free_ports, wait_until
from tests.releases import FP32

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from tests.deploy.conftest import combined

IMAGE = os.environ.get("TEST_IMAGE", "")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not IMAGE, reason="TEST_IMAGE names no image: make image-test"),
    pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed"),
]
# A version after all that are committed.
NEXT = 1000
# The pod's settings (deploy/base), by the flags of podman.
RESTRICTED = (
    *("--network=host", "--read-only", "--tmpfs=/tmp:size=16m", "--cap-drop=all"),
    *("--security-opt=no-new-privileges", "--user=65532:65532", "--pids-limit=256"),
    *("--memory=512m", "--memory-swap=512m", "--cpus=1"),
)


def podman(*arguments: Any, check: bool = True, stdin: Any = None, timeout_s: Any = None) -> Any:
    done = subprocess.run(
        ["podman", *arguments], input=stdin, capture_output=True, check=False, timeout=timeout_s
    )
    assert not check or done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
    return done.stdout.decode().strip()


class Container:
    """A container that runs the image."""

    def __init__(self, name: str, port: Any) -> None:
        self.name, self.port = name, port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def state(self, field: Any) -> Any:
        return podman("inspect", self.name, "--format", f"{{{{.State.{field}}}}}")

    def logs(self) -> Any:
        done = subprocess.run(
            ["podman", "logs", self.name], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def health(self, service: Any) -> Any:
        with grpc.insecure_channel(self.address) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status
            except grpc.RpcError:
                return None

    def wait_for_serving(self) -> None:
        def serving() -> Any:
            assert self.state("Running") == "true", self.logs()
            return self.health(SERVICE) == health_pb2.HealthCheckResponse.SERVING

        wait_until(serving, timeout_s=120)

    def announced(self) -> Any:
        entries = [json.loads(line) for line in self.logs().splitlines() if line.startswith("{")]
        (entry,) = [entry for entry in entries if entry["message"] == "SERVING"]
        return entry

    def exit_code(self) -> int:
        return int(podman("wait", self.name, timeout_s=60))

    def signal(self, number: Any) -> None:
        podman("kill", f"--signal={number.value}", self.name)


@pytest.fixture
def start() -> Iterator[Callable[..., Container]]:
    """Starts the image under the pod's restrictions; removed at the end."""
    names = []

    def run(*flags: str, command: Any = ()) -> Container:
        grpc_port, http_port = free_ports(2)
        name = f"digits-{uuid.uuid4().hex[:8]}"
        names.append(name)
        podman(
            "run", "-d", f"--name={name}", *RESTRICTED,
            f"--env=DIGITS_GRPC_PORT={grpc_port}", f"--env=DIGITS_HTTP_PORT={http_port}",
            "--env=DIGITS_LOG_FORMAT=json", *flags, IMAGE, *command,
        )  # fmt: skip
        return Container(name, grpc_port)

    yield run
    for name in names:
        podman("rm", "--force", "--time=0", name, check=False)


@pytest.fixture
def served(start: Callable[..., Container]) -> Container:
    container = start()
    container.wait_for_serving()
    return container


@contextlib.contextmanager
def load(address: str, images: np.ndarray, callers: int = 8) -> Iterator[tuple[Any, Any]]:
    """Callers that do not rest until the block ends; yields what went wrong."""
    ended, errors, answered = threading.Event(), [], [0] * callers

    def call(caller: Any) -> None:
        with DigitClient(address, timeout_s=30) as client:
            while not ended.is_set():
                try:
                    client.classify(images[: 1 + caller * 60])
                    answered[caller] += 1
                except Exception as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield errors, answered
    finally:
        ended.set()
        for thread in threads:
            thread.join()


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
        command: list[Any] = [
            "podman",
            "exec",
            served.name,
            "/opt/digits/bin/python",
            "-c",
            refused,
            path,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Read-only file system" in done.stderr
    assert served.announced()["inference"].startswith("1 x 1 thread")
    assert served.health("") == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(("service", "code"), [(SERVICE, 0), ("", 0), ("digits.v1.Other", 3)])
def test_probe_client_of_kubernetes_gets_its_answer(
    served: Container, service: Any, code: int
) -> None:
    """grpc_health_probe, in Go as the kubelet: 3 is an error's code, here NOT_FOUND."""
    probe = Path(os.environ.get("CLUSTER_PROGRAMS", "/nowhere"), "grpc-health-probe")
    if not probe.exists():
        pytest.skip("CLUSTER_PROGRAMS names no folder with grpc-health-probe: make cluster-test")
    command: list[Any] = [probe, f"-addr={served.address}", f"-service={service}"]
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
            if module.name != "service.top.command":  # rich is for people, and not in the image
                importlib.import_module(module.name)
        service.telemetry.tracing.Tracing("http://127.0.0.1:1")
        print([name for name in ("zlib", "jpg", "webp") if not features.check(name)])
    """
    command: list[Any] = [
        "exec",
        served.name,
        "/opt/digits/bin/python",
        "-W",
        "error",
        "-c",
        program,
    ]
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
    start: Callable[..., Container], sample: dict[str, np.ndarray], transport: str
) -> None:
    container = start(f"--env=DIGITS_TRANSPORT={transport}", "--env=DIGITS_DRAIN_DELAY_S=1")
    container.wait_for_serving()
    with load(container.address, sample["images"]) as (errors, answered):
        wait_until(lambda: errors or min(answered) >= 50, timeout_s=120)
    assert not errors
    with load(container.address, sample["images"]):
        container.signal(signal.SIGTERM)
        assert container.exit_code() == 0, container.logs()
    assert "drained: every call was answered" in container.logs()
    assert container.state("OOMKilled") == "false"


def test_sigterm_during_the_load_of_a_model_ends_the_process(
    start: Callable[..., Container],
) -> None:
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
    start: Callable[..., Container], tmp_path: Path
) -> None:
    version = in_serving_order(COMMITTED)[0]
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        shutil.copytree(version, folder / version.name)
    tmp_path.chmod(0o755)
    model = bad / version.name / FP32
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    container = start(f"--volume={good}:/models/digits:ro")
    container.wait_for_serving()
    assert container.announced()["sha256"] == load_artifact(version).first_of(ON_CPU).sha256
    refused = start(f"--volume={bad}:/models/digits:ro")
    assert refused.exit_code() == 1
    assert FP32 in refused.logs()


def archive(version: Any, name: Any, cut: Any = None) -> Any:
    """A version as NEXT, in the form in which ``kubectl cp`` sends it.

    Args:
        version: Folder of the version.
        name: Folder in the archive.
        cut: Bytes of the fp32 model after which the rest is missing.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in [version / FP32] if cut else version.iterdir():
            content = file.read_bytes()[:cut]
            if file.name == MANIFEST:
                content = json.dumps(json.loads(content) | {"version": NEXT}).encode()
            member = tarfile.TarInfo(f"{name}/{file.name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize("way", ["copied in two goes", "renamed", "linked"])
def test_version_that_comes_onto_the_volume_serves_and_no_call_is_lost(
    start: Callable[..., Container], tmp_path: Path, sample: dict[str, np.ndarray], way: str
) -> None:
    """examples/model-volume: pods read the volume, the loader of the README writes to it."""
    component = combined(tmp_path / "overlay", ["model-volume"])
    (mount,) = [m for m in component.container["volumeMounts"] if m["name"] == "models"]
    assert mount["readOnly"] is True
    version = in_serving_order(COMMITTED)[0]
    volume = tmp_path / "volume"
    shutil.copytree(version, volume / version.name)
    tmp_path.chmod(0o755)
    volume.chmod(0o777)  # the loader's fsGroup does it
    loader = start(
        f"--volume={volume}:{mount['mountPath']}", "--entrypoint=sleep", command=["9999"]
    )
    into = ("exec", "--interactive", f"--workdir={mount['mountPath']}", loader.name)
    container = start(
        f"--volume={volume}:{mount['mountPath']}:ro", "--env=DIGITS_RELOAD_INTERVAL_S=0.1"
    )
    container.wait_for_serving()
    with (
        load(container.address, sample["images"], callers=3) as (errors, answered),
        DigitClient(container.address) as client,
    ):
        if way == "copied in two goes":
            podman(*into, "tar", "-x", stdin=archive(version, NEXT, cut=1000))
            wait_until(lambda: f"version {NEXT} refused" in container.logs())
            podman(*into, "tar", "-x", stdin=archive(version, NEXT))
        else:
            podman(*into, "tar", "-x", stdin=archive(version, ".next"))
            step = ["mv", ".next"] if way == "renamed" else ["ln", "-s", ".next"]
            podman(*into, *step, str(NEXT))
        wait_until(lambda: errors or client.get_model()[0].version == str(NEXT))
        before = list(answered)
        wait_until(lambda: errors or all(a > b for a, b in zip(answered, before, strict=True)))
    assert not errors


def test_cuda_without_a_gpu_ends_with_the_cause(start: Callable[..., Container]) -> None:
    container = start("--env=DIGITS_DEVICE=cuda")
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
            command: list[Any] = ["podman", "stop", f"--time={grace}", container_name]
            stopping = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            # Serves on for the drain delay: a balancer has that long to notice.
            wait_until(lambda: container.health(SERVICE) != health_pb2.HealthCheckResponse.SERVING)
            assert not errors
            assert stopping.wait(timeout=60) == 0
        assert container.state("ExitCode") == "0", container.logs()
        assert "drained: every call was answered" in container.logs()
    finally:
        podman("kube", "down", str(played), check=False)
