"""What the server counts, against the clients' own counts, on both transports."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from digits.v1 import digits_pb2_grpc
from export.artifact import promote
from service.rpc.classify import SERVICE
from service.telemetry.metrics import LATENCY_BUCKETS
from tests.calls import IMAGE, NO_RETRIES, TRANSPORTS, encoded, pixels, scrape, stream_of
from tests.conftest import SAMPLES, RunningServer, wait_until
from tests.gate import Gate
from tests.releases import copy_release
from tests.service.conftest import FAST, LARGE

CLASSIFY = f'grpc_method="Classify",grpc_service="{SERVICE}",grpc_type="unary"'


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """Makes stubs that do not retry by themselves, so that what is counted is what was sent."""
    channels = []

    def make(server: RunningServer) -> Any:
        channels.append(grpc.insecure_channel(server.address, options=NO_RETRIES))
        return digits_pb2_grpc.DigitClassifierServiceStub(channels[-1])

    yield make
    for channel in channels:
        channel.close()


def codes(series: Any) -> dict[Any, Any]:
    """Classify calls by the name of their code, where there were any."""
    return {
        code.name: count
        for code in grpc.StatusCode
        if (count := series[f'grpc_server_handled_total{{grpc_code="{code.name}",{CLASSIFY}}}'])
    }


def grown(server: RunningServer, before: Any) -> dict[Any, Any]:
    return {name: value - before.get(name, 0) for name, value in scrape(server).items()}


def assert_counts_agree(series: Any) -> None:
    """What must hold between the counts whatever happened, once all is answered."""
    ended = sum(codes(series).values())
    assert series[f"grpc_server_started_total{{{CLASSIFY}}}"] == ended
    assert series[f"grpc_server_handling_seconds_count{{{CLASSIFY}}}"] == ended
    images = series["digits_images_total"]
    assert sum(series[f'digits_predictions_total{{digit="{d}"}}'] for d in range(10)) == images
    for name in ("digits_confidence", "digits_ink_ratio"):
        assert series[f"{name}_count"] == images
    assert series["digits_queue_images"] == 0


def settled(server: RunningServer, before: Any, expected: Any) -> dict[Any, Any]:
    """What was counted, once as many calls have ended as the clients know of."""
    wait_until(lambda: sum(codes(grown(server, before)).values()) == expected)
    # What a batch brought is counted after its calls: images, then codes, then nothing.
    wait_until(
        lambda: (
            grown(server, before)["digits_queue_seconds_count"]
            >= codes(grown(server, before)).get("OK", 0)
        )
    )
    return grown(server, before)


def test_predictions_are_counted_as_the_callers_saw_them(
    server: RunningServer, connect: Callable[..., Any], sample: dict[str, np.ndarray]
) -> None:
    """Single images, a request that is split, a stream, and a file."""
    stub, images = connect(server), sample["images"]
    before = scrape(server)
    requests = [pixels(image.tobytes()) for image in images[:40]] + [pixels(images.tobytes())]
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(stub.Classify, requests))
    stream = stub.ClassifyStream(stream_of([pixels(image.tobytes()) for image in images[:20]]))
    answers += [item.response for item in stream]
    answers.append(stub.Classify(encoded((SAMPLES / "7.png").read_bytes())))
    seen = [prediction for answer in answers for prediction in answer.predictions]
    wait_until(lambda: grown(server, before)["digits_images_total"] == len(seen) == 561)
    counted = settled(server, before, 42)
    assert_counts_agree(counted)
    digits = Counter(prediction.digit for prediction in seen)
    for digit in range(10):
        assert counted[f'digits_predictions_total{{digit="{digit}"}}'] == digits[digit]
    confidences = np.array([prediction.confidence for prediction in seen])
    assert counted["digits_confidence_sum"] == pytest.approx(confidences.sum(), rel=1e-5)
    assert counted['digits_confidence_bucket{le="0.99"}'] == (confidences <= 0.99).sum()
    sent = np.concatenate([images[:40], images, images[:20]])
    ink = sent.reshape(len(sent), -1).mean(axis=1) / 255
    of_the_file = counted["digits_ink_ratio_sum"] - ink.sum()
    assert 0.02 < of_the_file < 0.5
    below = (ink <= 0.1).sum() + (of_the_file <= 0.1)
    assert counted['digits_ink_ratio_bucket{le="0.1"}'] == below


@TRANSPORTS
def test_overload_is_counted_as_the_callers_saw_it(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    server, stub, long, gate = busy(transport, "--max-queue-images=64")
    # Some of one image, which have a lane of their own and are taken.
    calls = [stub.Classify.future(request) for request in (LARGE, pixels(IMAGE)) * 30]
    wait_until(lambda: sum(call.done() for call in calls) >= 30)
    gate.open()
    seen = Counter(call.code().name for call in [*calls, long])
    counted = settled(server, {}, 61)
    assert codes(counted) == seen == {"OK": 31, "RESOURCE_EXHAUSTED": 30}
    assert counted["digits_images_total"] == 30 + 4096
    refused = counted['digits_requests_dropped_total{reason="queue_full"}']
    assert refused == seen["RESOURCE_EXHAUSTED"]
    assert_counts_agree(counted)


@TRANSPORTS
def test_cancellation_leaves_no_call_uncounted(
    start_server: Callable[..., RunningServer], connect: Callable[..., Any], transport: str
) -> None:
    """A caller may cancel what is answered at that moment: then server and caller differ by it."""
    server = start_server(f"--transport={transport}", "--instances=1", "--max-queue-images=20000")
    stub, before = connect(server), scrape(server)
    futures = [stub.Classify.future(LARGE) for _ in range(300)]
    for future in futures[::20]:
        future.cancel()
    seen = Counter(future.code().name for future in futures)
    wait_until(lambda: grown(server, before)[f"grpc_server_started_total{{{CLASSIFY}}}"] >= 285)
    # A call that was cancelled before it was sent is none.
    reached = grown(server, before)[f"grpc_server_started_total{{{CLASSIFY}}}"]
    counted = settled(server, before, reached)
    assert seen.keys() == {"OK", "CANCELLED"}
    assert codes(counted).keys() <= {"OK", "CANCELLED"}
    assert codes(counted)["OK"] >= seen["OK"] >= 285
    # Some may have been cancelled while they were inferred.
    assert 32 * codes(counted)["OK"] <= counted["digits_images_total"] <= 32 * reached
    assert_counts_agree(counted)


def test_reload_loses_no_count(
    start_server: Callable[..., RunningServer], connect: Callable[..., Any], repository: Path
) -> None:
    copy_release(repository, 2, "2")
    promote(repository, 1)
    server = start_server(f"--model-repository={repository}", FAST)
    stub, answered, ended = connect(server), [], threading.Event()

    def call() -> None:
        while not ended.is_set():
            answered.append(stub.Classify(LARGE).model.version)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        loads = 'digits_model_loads_total{result="loaded"}'
        for so_far, number in enumerate((2, 1, 2), 1):
            promote(repository, number)
            wait_until(lambda so_far=so_far: scrape(server)[loads] > so_far)
    finally:
        ended.set()
        for caller in callers:
            caller.join()
    counted = settled(server, {}, len(answered))
    assert codes(counted) == {"OK": len(answered)}
    assert counted["digits_images_total"] == 32 * len(answered)
    assert_counts_agree(counted)
    assert counted[loads] == 4
    assert len([name for name in counted if name.startswith("digits_model_info{")]) == 1


@TRANSPORTS
def test_drain_answers_and_counts_what_is_in_flight(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    server, stub, long, gate = busy(transport, "--max-queue-images=8192", "--grace-s=60")
    assert scrape(server)["digits_ready"] == 1
    work = [long, *(stub.Classify.future(LARGE) for _ in range(8))]
    wait_until(lambda: scrape(server)[f"grpc_server_started_total{{{CLASSIFY}}}"] == len(work))
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: scrape(server)["digits_ready"] == 0)
    gate.open()
    assert [len(future.result().predictions) for future in work] == [4096, *[32] * 8]
    assert server.process.wait(30) == 0


def families(server: RunningServer, accept: Any) -> tuple[Any, str]:
    request = urllib.request.Request(server.http + "/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request) as response:
        return response.headers["Content-Type"], response.read().decode()


def test_openmetrics_is_exported_to_who_asks_for_it(server: RunningServer) -> None:
    kind, text = families(server, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert found["grpc_server_handling_seconds"].type == "histogram"
    assert found["digits_images"].type == "counter"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_finds_nothing_to_complain_about(server: RunningServer) -> None:
    _, text = families(server, "text/plain")
    check = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (check.returncode, check.stdout + check.stderr) == (0, "")


def test_latency_buckets_cover_a_lone_image_and_the_longest_deadline() -> None:
    assert (LATENCY_BUCKETS[0], LATENCY_BUCKETS[-1]) == (50e-6, 20.0)
    assert list(LATENCY_BUCKETS) == sorted(set(LATENCY_BUCKETS))


def test_cardinality_does_not_depend_on_what_is_sent(
    server: RunningServer, connect: Callable[..., Any]
) -> None:
    stub = connect(server)
    before = scrape(server).keys()
    for request in (pixels(b"bad"), pixels(bytes(784)), encoded(b"x"), encoded()):
        for metadata in (None, (("x-caller", os.urandom(8).hex()),)):
            stub.Classify.future(request, metadata=metadata).code()
    assert scrape(server).keys() == before


def test_cpu_in_place_of_a_gpu_is_told(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """Beside the CPU wheel, the GPU wheel looks installed: auto then serves on the CPU."""
    assert scrape(start_server())["digits_device_fallback"] == 0
    package = tmp_path / "site/onnxruntime_gpu-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n"
    )
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    fallen = start_server(env={"PYTHONPATH": path})
    assert scrape(fallen)["digits_device_fallback"] == 1
    assert "both installed" in fallen.announced["provider"]
    meant = start_server("--device=cpu", env={"PYTHONPATH": path})
    assert scrape(meant)["digits_device_fallback"] == 0
