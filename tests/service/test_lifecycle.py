"""Start, drain and stop of the real process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.rpc.classify import SERVICE
from tests.calls import TRANSPORTS, stub_for
from tests.conftest import (
    REPOSITORY,
    SAMPLES,
    START_TIMEOUT_S,
    RunningServer,
    start_process,
    wait_until,
)
from tests.gate import Gate
from tests.releases import write_keys

IMAGE = bytes(784)


def pixels(count: int) -> Any:
    return digits_pb2.ClassifyRequest(pixels=IMAGE * count)


def metric(server: RunningServer, series: Any) -> Any:
    text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()
    return next(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(series + " ")
    )


STARTED = (
    'grpc_server_started_total{grpc_method="Classify",'
    f'grpc_service="{SERVICE}",grpc_type="unary"}}'
)


@TRANSPORTS
def test_every_call_in_flight_at_sigterm_is_answered_and_the_exit_is_clean(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--max-queue-images=100000")
    channel, stub = stub_for(server.address)
    futures = [stub.Classify.future(pixels(200), timeout=60) for _ in range(50)]
    wait_until(lambda: metric(server, STARTED) == 50)
    server.process.terminate()
    assert [future.code() for future in futures] == [grpc.StatusCode.OK] * 50
    assert server.process.wait(30) == 0
    assert "drained: every call was answered" in server.log_text()
    channel.close()


class SlowLink:
    """A TCP proxy that passes the server's bytes on at a limited rate."""

    def __init__(self, address: str, bytes_per_s: Any) -> None:
        host, _, port = address.rpartition(":")
        self._target, self._rate = (host, int(port)), bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            for pump in ((caller, server, None), (server, caller, self._rate)):
                threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _pump(self, source: Any, sink: Any, rate: Any) -> None:
        try:
            while data := source.recv(8192):
                sink.sendall(data)
                if rate:
                    threading.Event().wait(len(data) / rate)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.close()


def test_answers_that_a_slow_connection_has_not_taken_are_not_lost(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--max-queue-images=100000")
    link = SlowLink(server.address, 1_500_000)
    channel, stub = stub_for(link.address)
    futures = [stub.Classify.future(pixels(4000), timeout=60) for _ in range(15)]
    wait_until(lambda: metric(server, STARTED) == 15)
    server.process.terminate()
    assert [future.code() for future in futures] == [grpc.StatusCode.OK] * 15
    assert server.process.wait(30) == 0
    channel.close()
    link.close()


@TRANSPORTS
def test_stream_that_was_answered_whole_ends_well_during_a_drain(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--drain-delay-s=0.3")
    channel, stub = stub_for(server.address)
    release = threading.Event()

    def requests() -> Iterator[Any]:
        yield digits_pb2.ClassifyStreamRequest(request=pixels(1))
        release.wait(30)

    stream = stub.ClassifyStream(requests(), timeout=30)
    next(stream)
    server.process.terminate()
    release.set()
    assert list(stream) == []
    assert server.process.wait(30) == 0
    channel.close()


def http_status(server: RunningServer) -> Any:
    try:
        with urllib.request.urlopen(f"{server.http}/healthz") as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_healthz_says_not_serving_during_the_drain_delay(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--drain-delay-s=2")
    assert http_status(server) == 200
    server.process.terminate()
    wait_until(lambda: http_status(server) == 503, timeout_s=1.5)
    assert server.process.wait(30) == 0


def test_decoding_that_takes_longer_than_the_grace_does_not_hold_the_exit(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--grace-s=0.5")
    channel, stub = stub_for(server.address)
    file = (SAMPLES / "7.png").read_bytes()
    request = digits_pb2.ClassifyRequest(encoded=digits_pb2.EncodedImages(files=[file] * 4000))
    futures = [stub.Classify.future(request, timeout=60) for _ in range(40)]
    wait_until(lambda: metric(server, STARTED) == 40)
    began = time.monotonic()
    server.process.terminate()
    assert server.process.wait(30) == 1
    assert time.monotonic() - began < 5
    assert all(future.exception() is not None or future.result() for future in futures)
    channel.close()


@TRANSPORTS
def test_drain_delay_serves_on_while_readiness_says_not_serving(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--drain-delay-s=1.5")
    channel, stub = stub_for(server.address)
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    watch = health.Watch(request)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    server.process.terminate()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert len(stub.Classify(pixels(3)).predictions) == 3
    liveness = health.Check(health_pb2.HealthCheckRequest(service=""))
    assert liveness.status == health_pb2.HealthCheckResponse.SERVING
    began = time.monotonic()
    # An open Watch must not hold the exit up until the end of the grace of 20 s.
    assert server.process.wait(15) == 0
    assert time.monotonic() - began < 10
    channel.close()


@TRANSPORTS
def test_stream_open_at_sigterm_gets_its_answers_then_unavailable(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}")
    channel, stub = stub_for(server.address)
    hold = threading.Event()

    def requests() -> Iterator[Any]:
        for _ in range(5):
            yield digits_pb2.ClassifyStreamRequest(request=pixels(2))
        hold.wait(30)

    stream = stub.ClassifyStream(requests(), timeout=60)
    answers = [next(stream) for _ in range(5)]
    assert all(len(answer.response.predictions) == 2 for answer in answers)
    server.process.terminate()
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    hold.set()
    assert server.process.wait(30) == 0
    channel.close()


def test_grace_that_is_too_short_is_reported_in_the_exit_code(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]],
) -> None:
    server, _, long, _ = busy("http2", "--grace-s=0.01")
    server.process.terminate()
    assert server.process.wait(30) == 1
    assert "still in flight after 0.01 s" in server.log_text()
    assert long.code() is not grpc.StatusCode.OK


def test_second_signal_stops_at_once(start_server: Callable[..., RunningServer]) -> None:
    server = start_server("--drain-delay-s=600")
    server.process.terminate()
    wait_until(lambda: "SIGTERM: draining" in server.log_text())
    assert server.stop(signal.SIGTERM, timeout_s=5) == 128 + signal.SIGTERM


def test_interrupt_drains_like_sigterm(start_server: Callable[..., RunningServer]) -> None:
    assert start_server().stop(signal.SIGINT) == 0


def run_serve(*flags: str, env: Any = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", "serve", "--grpc-port=0", "--http-port=0"]
    command.append(f"--model-repository={REPOSITORY}")
    return subprocess.run(
        [*command, *flags], capture_output=True, text=True, timeout=60,
        env={**os.environ, **(env or {})}, check=False,
    )  # fmt: skip


def test_wrong_settings_exit_with_2_and_name_each() -> None:
    done = run_serve("--device=tpu", "--bogus", env={"DIGITS_TYPO": "1"})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 3


def test_repository_without_a_valid_version_exits_with_1_and_the_reason(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "1", tmp_path / "1")
    (tmp_path / "1/model.fp32.onnx").write_bytes(b"half")
    done = run_serve(f"--model-repository={tmp_path}")
    assert done.returncode == 1
    assert "release 1 rejected: model.fp32.onnx: expected sha256" in done.stderr
    assert "Traceback" not in done.stderr


@TRANSPORTS
def test_port_in_use_exits_with_1_and_names_it(transport: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_serve(f"--grpc-port={port}", f"--transport={transport}")
        assert done.returncode == 1
        assert f"can not listen on 127.0.0.1:{port}" in done.stderr
        done = run_serve(f"--http-port={port}", f"--transport={transport}")
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert f"can not listen on 127.0.0.1:{port}" in done.stderr


def test_cuda_that_is_not_there_exits_with_1_and_never_serves() -> None:
    done = run_serve("--device=cuda")
    if "the CUDA provider works" in done.stderr:
        pytest.skip("there is a GPU")
    assert done.returncode == 1
    assert "can not serve: onnxruntime is built without CUDA" in done.stderr
    assert "SERVING" not in done.stderr + done.stdout


def test_announcement_says_what_is_served_and_how_to_try_it(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server()
    announced = server.announced
    assert announced["model"] == "digits release 2"
    assert len(announced["sha256"]) == 64
    assert announced["precision"] == "int8"
    assert announced["provider"].startswith("CPUExecutionProvider (")
    assert announced["transport"] == "http2"
    assert announced["try"].endswith(f"classify --address {server.address} tests/samples/7.png")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])
def test_every_kind_of_address_can_be_listened_on(
    start_server: Callable[..., RunningServer], host: str
) -> None:
    server = start_server(f"--host={host}")
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        assert len(stub.Classify(pixels(1), timeout=10).predictions) == 1


def test_reflection_can_be_turned_off(start_server: Callable[..., RunningServer]) -> None:
    server = start_server("--no-reflection")
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([b""])))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_serving_parts_load_no_torch() -> None:
    code = (
        "import sys, service.server, service.cli, service.rpc.grpcio, digits.client;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'training', 'export')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_repeated_answers_are_identical(start_server: Callable[..., RunningServer]) -> None:
    server = start_server()
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        golden = np.load(REPOSITORY / "1/golden.npz")["images"]
        request = digits_pb2.ClassifyRequest(pixels=golden.tobytes())
        first = stub.Classify(request).predictions
        assert all(stub.Classify(request).predictions == first for _ in range(20))


def test_server_that_requires_a_signature_serves_nothing_unsigned(tmp_path: Path) -> None:
    key = write_keys(tmp_path) / "public.pem"
    process = start_process(tmp_path / "log", f"--model-public-key={key}")
    assert process.wait(START_TIMEOUT_S) == 1
    log = (tmp_path / "log").read_text()
    assert "rejected: manifest.sig: No such file" in log
    assert "expected a valid release, found none" in log
