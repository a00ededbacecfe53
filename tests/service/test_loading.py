"""While a model loads: alive, not ready, and quick to leave."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from digits.v1 import digits_pb2
from service.rpc.classify import SERVICE
from tests.calls import IMAGE, TRANSPORTS, pixels, stub_for
from tests.conftest import start_process, wait_until


def test_while_a_model_loads_slowly_http_says_not_serving(
    endless_repository: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start_process(
        tmp_path / "log", f"--model-repository={endless_repository}", f"--http-port={port}"
    )

    def status(path: Any) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            return None

    try:
        assert wait_until(lambda: status("/healthz")) == 503
        assert status("/livez") == status("/metrics") == status("/") == 200
    finally:
        process.kill()
        process.wait()


@TRANSPORTS
def test_while_a_model_loads_slowly_probes_find_it_alive_and_not_ready(
    endless_repository: Path, tmp_path: Path, transport: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start_process(
        tmp_path / "log", f"--model-repository={endless_repository}", f"--grpc-port={port}",
        f"--transport={transport}",
    )  # fmt: skip

    def status(service: Any) -> Any:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status
            except grpc.RpcError:
                return None

    try:
        assert wait_until(lambda: status("")) == health_pb2.HealthCheckResponse.SERVING
        assert status(SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        process.kill()
        process.wait()


@TRANSPORTS
def test_sigterm_while_loading_exits_within_two_seconds(
    endless_repository: Path, tmp_path: Path, transport: str
) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start_process(
        log, f"--model-repository={endless_repository}", f"--grpc-port={port}",
        f"--transport={transport}",
    )  # fmt: skip
    channel, stub = stub_for(f"127.0.0.1:{port}")
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    status = health.Check(request, wait_for_ready=True, timeout=30).status
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Classify(pixels(IMAGE))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the model is loading"
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModel(digits_pb2.GetModelRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    process.terminate()
    began = time.monotonic()
    assert process.wait(30) == 0
    assert time.monotonic() - began < 2
    channel.close()


def as_pid_1() -> Any:
    """What starts a program as the first process of a PID namespace."""
    for privileges in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *privileges, "--pid", "--fork", "--kill-child"]
        with contextlib.suppress(OSError):
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
    pytest.skip("a PID namespace can not be made here (unshare --pid)")


def test_sigterm_while_loading_as_pid_1_exits_within_two_seconds(
    endless_repository: Path, tmp_path: Any
) -> None:
    """The kernel drops signals that the first process of a container does not handle."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = (f"--model-repository={endless_repository}", f"--grpc-port={port}")
    parent = start_process(tmp_path / "log", *flags, under=as_pid_1())
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30)
        (server,) = psutil.Process(parent.pid).children()
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert status.partition("NSpid:")[2].split()[1] == "1"
        began = time.monotonic()
        server.terminate()
        assert parent.wait(30) == 0
        assert time.monotonic() - began < 2
    finally:
        parent.kill()  # and its child with it
        parent.wait()
