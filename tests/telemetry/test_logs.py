"""Logs: their form, and that a server answers and stops whoever reads them, or nobody."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import http.client
import json
import logging
import os
import subprocess
import sys
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.host.streams import QUEUE_BYTES
from service.telemetry.logs import LogHandler, _JsonFormatter, _TextFormatter
from tests.calls import TRANSPORTS
from tests.conftest import REPOSITORY, wait_until

SERVE = (
    *(sys.executable, "-m", "service.cli", "serve", "--grpc-port=0", "--http-port=0"),
    *(f"--model-repository={REPOSITORY}", "--request-log-per-s=10000"),
)
DROPPED = "digits_log_lines_dropped_total"


@pytest.fixture
def unread() -> Iterator[Any]:
    """The end to write to of a pipe of one page that nobody reads."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield writer
    os.close(reader)  # for those who wait
    os.close(writer)


@pytest.fixture
def handler(unread: Any) -> Iterator[LogHandler]:
    """Writes to it; what waits is dropped before the descriptor may be that of another file."""
    with contextlib.closing(os.fdopen(os.dup(unread), "wb", 0)) as own:
        made = LogHandler(own.fileno(), _JsonFormatter())
        yield made
        with os.fdopen(os.open(f"/proc/self/fd/{unread}", os.O_RDONLY), "rb", 0) as reader:
            os.set_blocking(reader.fileno(), False)
            while not made._writer.flush(0.01):
                reader.read()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts servers whose streams are not the tests'; kills those that are left."""
    processes = []

    def started(command: Any, **streams: Any) -> Any:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, **{**silent, **streams})
        )
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.wait()


def ports_of(process: Any) -> tuple[Any, Any] | None:
    """The server's HTTP and gRPC port, once it is ready; it may have nowhere to print them."""
    assert process.poll() is None
    with contextlib.suppress(OSError, psutil.Error):
        found = psutil.Process(process.pid).net_connections("tcp")
        listening = {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}
        for port in listening:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the other port
                url = f"http://127.0.0.1:{port}/healthz"
                if urllib.request.urlopen(url, timeout=5).status == 200:
                    (rpcs,) = listening - {port}
                    return port, rpcs
    return None


def call_badly(port: Any, times: Any) -> set[Any]:
    """The codes of calls that each leave a line in the log."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        request = digits_pb2.ClassifyRequest(pixels=b"x")
        return {stub.Classify.future(request, timeout=60).code().name for _ in range(times)}


def answers_and_stops(process: Any, calls: int = 100) -> Any:
    web, rpcs = wait_until(partial(ports_of, process))
    assert call_badly(rpcs, calls) == {"INVALID_ARGUMENT"}
    url = f"http://127.0.0.1:{web}/metrics"
    text = urllib.request.urlopen(url, timeout=60).read().decode()
    process.terminate()
    assert process.wait(30) == 0
    return next(line for line in text.splitlines() if line.startswith(DROPPED + " "))


@TRANSPORTS
def test_calls_are_answered_while_nobody_reads_the_log(
    start: Callable[..., Any], unread: Any, transport: str
) -> None:
    process = start([*SERVE, f"--transport={transport}"], stderr=unread)
    assert answers_and_stops(process) == f"{DROPPED} 0.0"  # they wait


def test_a_second_signal_ends_a_server_whose_log_nobody_reads(
    start: Callable[..., Any], unread: Any
) -> None:
    process = start([*SERVE, "--drain-delay-s=3600"], stderr=unread)
    _, rpcs = wait_until(partial(ports_of, process))
    call_badly(rpcs, 100)
    for number in (1, 2):
        process.terminate()
        if number == 1:
            wait_until(lambda: ports_of(process) is None)  # the first is seen: it is not ready
    assert process.wait(30) == 128 + 15


def test_a_banner_that_nobody_reads_holds_up_nothing(
    start: Callable[..., Any], unread: Any
) -> None:
    os.write(unread, b"x" * 4096)
    answers_and_stops(start(SERVE, stdout=unread))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_to_a_full_disk_or_to_nobody_is_survived(
    start: Callable[..., Any], stream: str
) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        dropped = answers_and_stops(start(SERVE, **{stream: full}))
    assert (dropped == f"{DROPPED} 0.0") == (stream == "stdout")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        answers_and_stops(start(SERVE, **{stream: writer}))
    finally:
        os.close(writer)


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_survived(start: Callable[..., Any], closed: str) -> None:
    answers_and_stops(start(["sh", "-c", f'exec "$@" {closed}', "sh", *SERVE]))


def record(message: Any, *args: Any, **extra: Any) -> Any:
    return logging.makeLogRecord({"name": "digits", "msg": message, "args": args, **extra})


def test_dropped_lines_are_told_in_the_form_of_the_others(handler: LogHandler, unread: Any) -> None:
    reading = os.open(f"/proc/self/fd/{unread}", os.O_RDONLY)
    for number in range(30):
        handler.emit(record("x" * (QUEUE_BYTES // 10), fields={"number": number}))
    assert handler.dropped > 10
    lines: list[Any] = []
    with os.fdopen(reading) as text:
        while not any("dropped" in line["message"] for line in lines):
            lines.append(json.loads(text.readline()))
    assert lines[-1]["message"].startswith(f"{handler.dropped} log lines were dropped: ")
    assert (lines[-1]["level"], lines[-1]["logger"]) == ("warning", "service.telemetry.logs")


def test_a_record_that_can_not_be_formatted_is_told_and_raises_nothing(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        handler = LogHandler(file.fileno(), _JsonFormatter())
        handler.emit(record("%d images", "three"))
        handler.emit(record("later"))
        handler.finish()
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert first["message"] == "a log record of digits: TypeError"
    assert second["message"] == "later"


def test_a_line_that_waits_keeps_nothing_alive(handler: LogHandler) -> None:
    class HeldError(RuntimeError):
        pass

    handler.emit(record("x" * 10_000))  # more than the pipe holds: the next line waits
    try:
        raise HeldError
    except HeldError as error:
        held = weakref.ref(error)
        handler.emit(record("failed", exc_info=(HeldError, error, error.__traceback__)))
    gc.collect()
    assert held() is None


def test_text_lines_carry_the_fields() -> None:
    line = _TextFormatter("%(message)s").format(record("moved", fields={"to": "version 2"}))
    assert line == 'moved to="version 2"'


def test_what_python_would_print_is_logged(tmp_path: Path) -> None:
    """A warning, the error that ends a thread, and one that a finalizer raises."""
    code = """if True:
        import threading, warnings
        from service.telemetry.logs import configure_logging, finish_logs
        configure_logging("json")
        warnings.warn("old")
        thread = threading.Thread(target=lambda: 1 / 0, name="slot-9")
        thread.start()
        thread.join()
        class Bad:
            def __del__(self):
                raise KeyError("key")
        Bad()
        finish_logs()
    """
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True
    )
    warning, ended, ignored = map(json.loads, done.stderr.splitlines())
    assert "UserWarning: old" in warning["message"]
    assert ended["message"] == "thread slot-9 ended with an error"
    assert "ZeroDivisionError" in ended["exception"]
    assert "KeyError" in ignored["exception"]
