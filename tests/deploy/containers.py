"""Containers of the image under podman, with a pod's restrictions, and load on them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from digits.client import DigitClient
from service.rpc.classify import SERVICE
from tests.conftest import free_ports, wait_until

IMAGE = os.environ.get("TEST_IMAGE", "")
NEEDS_IMAGE = [
    pytest.mark.full,
    pytest.mark.skipif(not IMAGE, reason="TEST_IMAGE names no image: make image-test"),
    pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed"),
]
# Where the image looks for models.
MODELS = "/models/digits"
# The pod's settings (deploy/base), by the flags of podman.
RESTRICTED = (
    *("--network=host", "--read-only", "--tmpfs=/tmp:size=16m", "--cap-drop=all"),
    *("--security-opt=no-new-privileges", "--user=65532:65532", "--pids-limit=256"),
    *("--memory=512m", "--memory-swap=512m", "--cpus=1"),
)


def podman(
    *arguments: str, check: bool = True, stdin: bytes | None = None, timeout_s: float | None = None
) -> str:
    done = subprocess.run(
        ["podman", *arguments], input=stdin, capture_output=True, check=False, timeout=timeout_s
    )
    assert not check or done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr!r}"
    return done.stdout.decode().strip()


class Container:
    """A container that runs the image."""

    def __init__(self, name: str, port: int) -> None:
        self.name, self.port = name, port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def state(self, field: str) -> str:
        return podman("inspect", self.name, "--format", f"{{{{.State.{field}}}}}")

    def logs(self) -> str:
        done = subprocess.run(
            ["podman", "logs", self.name], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def health(self, service: str) -> int | None:
        """Its answer, or nothing where nobody answers."""
        with grpc.insecure_channel(self.address) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)
            except grpc.RpcError:
                return None

    def wait_for_serving(self) -> None:
        def serving() -> bool:
            assert self.state("Running") == "true", self.logs()
            return bool(self.health(SERVICE) == health_pb2.HealthCheckResponse.SERVING)

        wait_until(serving, timeout_s=120)

    def announced(self) -> dict[str, Any]:
        entries = [json.loads(line) for line in self.logs().splitlines() if line.startswith("{")]
        (entry,) = [entry for entry in entries if entry["message"] == "SERVING"]
        return dict(entry)

    def release(self) -> str:
        with DigitClient(self.address) as client:
            return client.get_model()[0].version

    def exit_code(self) -> int:
        return int(podman("wait", self.name, timeout_s=60))

    def signal(self, number: signal.Signals) -> None:
        podman("kill", f"--signal={number.value}", self.name)


class Containers:
    """Starts containers, and removes them when the block ends."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            podman("rm", "--force", "--time=0", name, check=False)

    def __call__(
        self,
        *flags: str,
        settings: dict[str, Any] | None = None,
        volume: Path | None = None,
        port: int | None = None,
        command: tuple[str, ...] = (),
    ) -> Container:
        """One that may not be serving yet.

        Args:
            flags: Of podman.
            settings: Of the server, by the names of their variables without the prefix.
            volume: A folder to be mounted in place of the image's models.
            port: Of gRPC; by default a free one.
            command: What the entry point gets.
        """
        grpc_port, http_port = free_ports(2)
        container = Container(f"digits-{uuid.uuid4().hex[:8]}", port or grpc_port)
        self._names.append(container.name)
        given = {"GRPC_PORT": container.port, "HTTP_PORT": http_port, "LOG_FORMAT": "json"}
        given |= settings or {}
        variables = [f"--env=DIGITS_{name}={value}" for name, value in given.items()]
        mounts = [f"--volume={volume}:{MODELS}:ro"] if volume else []
        name = f"--name={container.name}"
        podman("run", "-d", name, *RESTRICTED, *variables, *mounts, *flags, IMAGE, *command)
        return container

    def serving(self, *flags: str, **options: Any) -> Container:
        container = self(*flags, **options)
        container.wait_for_serving()
        return container


@contextlib.contextmanager
def load(
    address: str, images: np.ndarray, callers: int = 8
) -> Iterator[tuple[list[Exception], list[int]]]:
    """Callers that do not rest until the block ends; yields what went wrong, and their answers."""
    ended, errors, answered = threading.Event(), list[Exception](), [0] * callers

    def call(caller: int) -> None:
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
