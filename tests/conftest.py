"""What tests share: real digits, the default model, and real servers on free ports."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.gate import Gate
from tests.suite import (  # noqa: F401 - pytest finds its hooks here
    made_once,
    pytest_addoption,
    pytest_configure,
    pytest_xdist_auto_num_workers,
)

ROOT = Path(__file__).parents[1]
# Small models for tests: release 1 in fp32, release 2 in fp32 and int8.
REPOSITORY = ROOT / "tests/fixtures/digits"
# The release that a clone serves.
COMMITTED = ROOT / "models/digits"
SAMPLES = ROOT / "tests/samples"
START_TIMEOUT_S = 60

# Threads of PyTorch that wait for each other stop as soon as something else needs a CPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A suite that a shell started in the background inherits that Ctrl-C means nothing, and so would
# every command that it runs.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class RunningServer:
    """A ``digits serve`` process that printed SERVING."""

    process: subprocess.Popen[bytes]
    address: str
    http: str
    announced: dict[str, Any]
    log: Path

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def log_text(self) -> str:
        return self.log.read_text()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[..., Any], timeout_s: float = START_TIMEOUT_S) -> Any:
    """Polls until the condition is true; its value."""
    give_up = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < give_up, "the condition did not become true in time"
        time.sleep(0.01)
    return value


def start_process(
    log: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    under: Sequence[str] = (),
    constants: Mapping[str, float] | None = None,
    gate: Gate | None = None,
) -> Any:
    """Starts the server; it may not be serving yet.

    Args:
        log: Gets its output.
        flags: Of the server.
        env: Variables beside those of this process.
        under: A command that runs the server's.
        constants: Values by ``module.NAME``, in place of those in the code.
        gate: Where its inferences ask before they begin.
    """
    command = [*under, sys.executable, "-m", "service.cli", "serve"]
    if constants or gate:
        values = [f"{name}={value}" for name, value in (constants or {}).items()]
        values += [f"--gate={gate.folder}"] if gate else []
        command[-3:] = [str(ROOT / "tests/patched.py"), *values, "--", "serve"]
    command += ["--grpc-port=0", "--http-port=0", "--log-format=json"]
    if not any(flag.startswith("--model-repository") for flag in flags):
        command.append(f"--model-repository={REPOSITORY}")
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, *flags], stderr=file, stdout=file, env={**os.environ, **(env or {})}
        )


def serving_entry(log: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    def find() -> dict[str, Any] | None:
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry["message"] == "SERVING":
                    return dict(entry)
        assert process.poll() is None, f"exited with {process.returncode}: {log.read_text()}"
        return None

    entry = dict(wait_until(find))
    # HTTP comes a moment later; whoever connects before that waits.
    urllib.request.urlopen(entry["http"].replace("/metrics", "/healthz"), timeout=60).close()
    return entry


def serving(log: Path, process: subprocess.Popen[bytes]) -> RunningServer:
    """The server of a process that was started, once it serves; killed if it does not."""
    try:
        entry = serving_entry(log, process)
    except BaseException:
        process.kill()
        process.wait()
        raise
    http = entry["http"].removesuffix("/metrics")
    return RunningServer(process, entry["grpc"], http, entry, log)


@contextlib.contextmanager
def running_server(log: Path, *flags: str, **options: Any) -> Iterator[RunningServer]:
    """A server that must drain cleanly in the end; ``options`` are those of ``start_process``."""
    server = serving(log, start_process(log, *flags, **options))
    try:
        yield server
    finally:
        server.process.terminate()
        assert server.process.wait(30) == 0, log.read_text(errors="replace")


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers and kills those that a test leaves behind."""
    servers: list[RunningServer] = []
    numbers = itertools.count()  # two may be started at the same time

    def start(*flags: str, **options: Any) -> RunningServer:
        """A server that serves; ``options`` are those of ``start_process``."""
        log = tmp_path / f"server-{next(numbers)}.log"
        servers.append(serving(log, start_process(log, *flags, **options)))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server for a whole module, on each transport in turn."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, f"--transport={request.param}") as running:
        yield running


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def sample() -> dict[str, np.ndarray]:
    """500 MNIST test digits: images uint8[500, 28, 28], labels int64[500]."""
    with np.load(SAMPLES / "mnist-500.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def run_outside(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command that sees nothing of this checkout or its settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DIGITS_"))}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels of this tree, or a skip where their builds can not be set up."""
    return made_once(tmp_path_factory, "wheels", build_wheels)


def build_wheels(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    probe = [*pip, "download", "--retries=0", "--timeout=10", "--no-deps", "-d", folder / "probe"]
    if run_outside([*probe, "hatchling"]).returncode:
        pytest.skip("pip reaches no index")
    tree = folder / "tree"
    for name in ("proto", "service", "training", "export", "models"):
        ignored = shutil.ignore_patterns("__pycache__", "*_pb2*")  # the build makes stubs
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree / name)
    built = run_outside([*pip, "wheel", "--no-deps", "-w", folder, tree / "proto", tree])
    assert built.returncode == 0, built.stdout + built.stderr


@pytest.fixture(scope="session")
def full_data() -> Path:
    """The folder with all of MNIST, or a skip."""
    root = Path(os.environ.get("DIGITS_DATA", ROOT / "data"))
    root = root if root.is_absolute() else ROOT / root
    if not (root / "MNIST/raw/t10k-images-idx3-ubyte").is_file():
        pytest.skip(f"the full MNIST data is not under {root} (set DIGITS_DATA)")
    return root
