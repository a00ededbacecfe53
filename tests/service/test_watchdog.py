"""A server whose engine is stuck, or answers wrong, does not look healthy."""

from __future__ import annotations

import dataclasses
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.rpc.classify import CLASSIFY, SERVICE
from service.serving.batcher import Batcher
from service.serving.gate import Gate
from service.serving.loader import load_model
from service.serving.model import ModelRunner
from service.serving.preparing import Preparer
from service.telemetry.metrics import Metrics
from service.watchdog import Watchdog
from tests.calls import TRANSPORTS
from tests.conftest import REPOSITORY, RunningServer, wait_until
from tests.service.trap import FOR_A_WHILE, FOR_EVER, write_trap

HEALTHY = health_pb2.HealthCheckResponse.SERVING
UNHEALTHY = health_pb2.HealthCheckResponse.NOT_SERVING
STALL_TIMEOUT = "service.watchdog.STALL_TIMEOUT_S"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trap") / "digits"
    write_trap(path / "1")
    return path


def health(address: str, service: str = "") -> Any:
    """The status; DEADLINE_EXCEEDED is not healthy either."""
    with grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            return health_pb2_grpc.HealthStub(channel).Check(request, timeout=1).status
        except grpc.RpcError as error:
            return error.code()


def http_status(server: RunningServer, path: Any) -> Any:
    try:
        return urllib.request.urlopen(server.http + path, timeout=1).status
    except urllib.error.HTTPError as error:
        return error.code


def metric(server: RunningServer, series: Any) -> Any:
    text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()
    return next(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(series + " ")
    )


def classify(stub: Any, value: Any, count: int, timeout: Any) -> Any:
    request = digits_pb2.ClassifyRequest(pixels=bytes([value]) * 784 * count)
    return stub.Classify.future(request, timeout=timeout)


@TRANSPORTS
def test_an_inference_that_never_returns_is_noticed_and_reported(
    transport: str, repository: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(
        f"--model-repository={repository}",
        f"--transport={transport}",
        "--instances=1",
        "--grace-s=0.2",
        constants={STALL_TIMEOUT: 0.4},
    )
    assert health(server.address) == health(server.address, SERVICE) == HEALTHY
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        stuck = classify(stub, FOR_EVER, 8, timeout=60)  # too many to run on the event loop
        wait_until(lambda: health(server.address) == UNHEALTHY)
        assert health(server.address, SERVICE) == UNHEALTHY
        wait_until(lambda: http_status(server, "/livez") == 503)
        assert http_status(server, "/healthz") == 503
        assert metric(server, "digits_engine_stalled") == 1
        assert "an inference has not returned within 0.4 s" in server.log_text()
        refused = classify(stub, 0, 1, timeout=30)
        assert refused.code() == grpc.StatusCode.UNAVAILABLE
        assert not stuck.done()
        stuck.cancel()
    assert server.stop() == 1  # what was in flight was not answered, and the exit is not delayed


@TRANSPORTS
def test_a_lone_call_that_never_returns_takes_health_with_it(
    transport: str, repository: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(
        f"--model-repository={repository}",
        f"--transport={transport}",
        "--instances=1",
        "--grace-s=0.2",
        constants={STALL_TIMEOUT: 0.4},
    )
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        stuck = classify(stub, FOR_EVER, 1, timeout=60)
        wait_until(lambda: health(server.address) != HEALTHY)
        wait_until(lambda: "an inference has not returned" in server.log_text())
        if transport == "http2":  # its own thread is stuck, and another one answers
            assert classify(stub, 0, 1, timeout=30).code() == grpc.StatusCode.UNAVAILABLE
        stuck.cancel()
    server.process.kill()


@TRANSPORTS
def test_an_inference_that_returns_after_all_brings_the_server_back(
    transport: str, repository: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(
        f"--model-repository={repository}",
        f"--transport={transport}",
        constants={STALL_TIMEOUT: 0.1},
    )
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        slow = classify(stub, FOR_A_WHILE, 8, timeout=60)
        wait_until(lambda: health(server.address) == UNHEALTHY)
        assert slow.code() == grpc.StatusCode.OK
        wait_until(lambda: health(server.address) == HEALTHY)
        assert classify(stub, 0, 1, timeout=30).code() == grpc.StatusCode.OK
    assert http_status(server, "/healthz") == http_status(server, "/livez") == 200
    assert server.stop() == 0


@pytest.fixture
def hot_path() -> Iterator[tuple[Gate, Metrics]]:
    """The path of a call with a model in service, and its metrics."""
    metrics = Metrics([CLASSIFY])
    runner = ModelRunner()
    batcher = Batcher(runner.run, slots=1, max_batch_size=64, max_queue_images=64)
    classify = Gate(batcher, runner, Preparer(metrics), max_images_per_request=64)
    classify.start()
    classify.serve(
        load_model(REPOSITORY / "1", "digits", device="cpu", intra_op_threads=1, max_batch_size=4)
    )
    classify.open()
    yield classify, metrics
    classify.stop(5)


@pytest.fixture
def watch(hot_path: tuple[Gate, Metrics]) -> Iterator[Callable[..., list[Any]]]:
    """Starts a watchdog that looks often; returns the list of its reports."""
    classify, metrics = hot_path
    watchdogs = []

    def start(threads: Any = lambda: classify.threads) -> list[Any]:
        reports = []
        watchdogs.append(
            Watchdog(
                classify, threads, lambda trouble, stuck: reports.append(trouble), metrics,
                stall_timeout_s=0.5, golden_interval_s=0.01,
            )
        )  # fmt: skip
        watchdogs[-1].start()
        return reports

    yield start
    for watchdog in watchdogs:
        watchdog.stop()


def golden_checks(metrics: Any, result: Any) -> Any:
    return metrics.registry.get_sample_value("digits_golden_checks_total", {"result": result})


def with_other_labels(model: Any) -> Any:
    """The model with golden digits that it does not answer as they say."""
    golden = model.artifact.golden
    golden = dataclasses.replace(golden, labels=(golden.labels + 1) % 10)
    return dataclasses.replace(model, artifact=dataclasses.replace(model.artifact, golden=golden))


def test_golden_digits_are_checked_again_and_again(
    hot_path: tuple[Gate, Metrics], watch: Callable[..., list[Any]]
) -> None:
    _, metrics = hot_path
    reports = watch()
    wait_until(lambda: golden_checks(metrics, "passed") >= 3)
    assert reports == []
    assert golden_checks(metrics, "failed") == 0


def test_wrong_golden_answers_are_reported_until_a_right_model_serves(
    hot_path: tuple[Gate, Metrics],
    watch: Callable[..., list[Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    classify, metrics = hot_path
    honest: Any = classify.model
    reports = watch()
    classify.serve(with_other_labels(honest))
    wait_until(lambda: reports)
    assert reports == ["the model no longer answers its golden digits as it should"]
    assert golden_checks(metrics, "failed") >= 1
    assert "labels are wrong" in caplog.text
    classify.serve(honest)
    wait_until(lambda: len(reports) == 2)
    assert reports[1] == ""


def test_a_dead_thread_is_reported(watch: Callable[..., list[Any]]) -> None:
    dead = threading.Thread(target=lambda: None, name="slot-9")
    dead.start()
    dead.join()
    reports = watch(lambda: [dead])
    wait_until(lambda: reports)
    assert reports == ["thread slot-9 has died; this is a bug"]


def test_the_watchdog_survives_a_look_that_fails(
    watch: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    looks = []

    def threads() -> list[Any]:
        looks.append(1)
        if len(looks) == 1:
            raise RuntimeError("can't start new thread")
        dead = threading.Thread(target=lambda: None, name="slot-9")
        dead.start()
        dead.join()
        return [dead]

    reports = watch(threads)
    wait_until(lambda: reports)
    assert "a check of the watchdog failed" in caplog.text
