"""The live view: right figures, 80 by 24, leaves the terminal as it was."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from rich.console import Console

from digits.cli.main import main
from digits.client import DigitClient
from digits.oip import inference_pb2, inference_pb2_grpc
from service.telemetry.histogram import BulkHistogram
from service.top.command import View
from service.top.scrape import Change, Scrape, ScrapeError, scrape
from tests.conftest import RunningServer, wait_until

BOUNDS = (1.0, 2.0, 4.0)


@pytest.fixture
def readings(tmp_path: Path) -> Callable[..., Scrape]:
    """Takes readings of a counter and a histogram that a test fills."""
    registry = CollectorRegistry()
    histogram = BulkHistogram("wait_seconds", "Waits.", BOUNDS)
    registry.register(histogram)
    counter = Counter("calls_total", "Calls.", ["code"], registry=registry)
    page = tmp_path / "metrics"

    def read(at: Any, calls: Any = (), waits: Any = ()) -> Scrape:
        histogram.observe_many(waits)
        for code in calls:
            counter.labels(code).inc()
        page.write_bytes(generate_latest(registry))
        return Scrape(at, scrape(page.as_uri()).samples)

    return read


def test_rates_are_increases_a_second(readings: Callable[..., Scrape]) -> None:
    change = Change(readings(10, ["OK"]), readings(12, ["OK", "OK", "LATE", "OK"]))
    assert change.rate("calls_total") == 2
    assert change.rates("calls_total", "code") == {"OK": 1.5, "LATE": 0.5}
    assert change.rate("calls_total", code="LATE") == 0.5


def test_quantiles_are_linear_within_a_bucket(readings: Callable[..., Scrape]) -> None:
    before = readings(0, waits=[0.5] * 100)  # old observations do not count
    change = Change(before, readings(1, waits=[0.5, 1.5, 1.5, 3.0]))
    assert change.quantile(0.25, "wait_seconds") == 1.0
    assert change.quantile(0.5, "wait_seconds") == 1.5
    assert change.quantile(1.0, "wait_seconds") == 4.0
    assert change.mean("wait_seconds") == 6.5 / 4


def test_beyond_the_last_bound_only_that_is_known(readings: Callable[..., Scrape]) -> None:
    change = Change(readings(0), readings(1, waits=[100.0]))
    assert change.quantile(0.5, "wait_seconds") == 4.0


def test_without_observations_there_is_no_quantile(readings: Callable[..., Scrape]) -> None:
    change = Change(readings(0), readings(1))
    assert change.quantile(0.5, "wait_seconds") is None
    assert change.mean("wait_seconds") is None


def test_counters_of_a_new_process_begin_at_zero() -> None:
    def reading(at: Any, started: Any, calls: Any) -> Scrape:
        series = {"process_start_time_seconds": started, "calls_total": calls}
        return Scrape(at, {(name, frozenset()): value for name, value in series.items()})

    assert Change(reading(0, 1000, 50), reading(1, 2000, 7)).rate("calls_total") == 7


def test_a_page_that_is_not_there_is_named() -> None:
    with pytest.raises(ScrapeError, match=r"http://127\.0\.0\.1:9/metrics: .*refused"):
        scrape("http://127.0.0.1:9/metrics")


def rendered(view: Any) -> str:
    shown = io.StringIO()
    Console(width=80, height=24, file=shown).print(view.render())
    return shown.getvalue()


def test_the_view_fits_a_small_terminal_and_tells_what_goes_on(
    server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    with DigitClient(server.address) as client:
        view = View(f"{server.http}/metrics", client)
        view.read()
        for _ in range(5):
            client.classify(sample["images"][:32])
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            client.classify_files([__file__])
        url = f"{server.http}/metrics"
        refused = {"grpc_code": "INVALID_ARGUMENT"}
        wait_until(lambda: scrape(url).value("grpc_server_handled_total", **refused))
        view.read()
    text = rendered(view)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "SERVING" in lines[0]
    assert re.search(r"digits/2 \(accuracy 99\.\d\d%\) int8 on CPUExecutionProvider", lines[1])
    assert re.search(r"images per batch: \d", text)
    assert re.search(r"Classify +\d.* [um]s +\d.* [um]s +\d.* [um]s", text)
    assert re.search(r"INVALID_ARGUMENT \d", text)
    assert re.search(r"memory +\d+ MiB", text)


def test_every_way_to_classify_is_seen(
    server: RunningServer, sample: dict[str, np.ndarray], channel: grpc.Channel
) -> None:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 28, 28]}
    request = inference_pb2.ModelInferRequest(
        model_name="digits", inputs=[tensor], raw_input_contents=[sample["images"][0].tobytes()]
    )
    url, goes_on = f"{server.http}/metrics", threading.Event()

    def images() -> Iterator[Any]:
        yield sample["images"][:5]
        goes_on.wait(60)

    with DigitClient(server.address) as client:
        view = View(url, client)
        view.read()
        answered = scrape(url).value("grpc_server_handled_total", grpc_method="ModelInfer")
        for _ in range(3):
            inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        stream = client.classify_stream(images())
        assert len(next(stream).predictions) == 5
        handled = {"grpc_method": "ModelInfer"}
        wait_until(
            lambda: scrape(url).value("grpc_server_handled_total", **handled) == answered + 3
        )
        view.read()
        text = rendered(view)
        goes_on.set()
        assert list(stream) == []
    assert len(text.splitlines()) <= 24
    assert not re.search(r"ModelInfer/s +0 ", text)
    assert re.search(r"streams open +1 ", text)
    assert re.search(r"ModelInfer +\d.* [um]s +\d.* [um]s +\d.* [um]s", text)
    assert re.search(r"Classify +- +- +-", text)


def test_a_server_that_went_away_is_told_and_the_last_figures_stay(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server()
    with DigitClient(server.address) as client:
        view = View(f"{server.http}/metrics", client)
        view.read()
        server.stop()
        with pytest.raises(ScrapeError):
            view.read()
    assert "UNREACHABLE" in rendered(view)


def test_once_prints_a_view(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--metrics", f"{server.http}/metrics", "--address", server.address]
    assert main(["top", "--once", "--interval-s", "0.1", *arguments]) == 0
    assert "SERVING" in capsys.readouterr().out


def test_q_leaves_the_terminal_as_it_was(server: RunningServer) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(ours)
    process = subprocess.Popen(
        [sys.executable, "-m", "digits", "top", "--metrics", f"{server.http}/metrics",
         "--address", server.address, "--interval-s", "0.2"],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # how a terminal tells that nobody writes any more
            while chunk := os.read(ours, 4096):
                shown.extend(chunk)

    threading.Thread(target=read, daemon=True).start()
    wait_until(lambda: b"SERVING" in shown)
    os.write(ours, b"q")
    assert process.wait(30) == 0
    wait_until(lambda: b"\x1b[?1049l" in shown)  # back from the alternate screen
    assert termios.tcgetattr(ours) == before
    os.close(theirs)
