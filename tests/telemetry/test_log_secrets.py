"""Callers can not put secrets, terminal escapes or many bytes into the log."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hyperframe.frame import DataFrame, HeadersFrame, PingFrame, SettingsFrame

from service.telemetry import logs
from service.telemetry.logs import LIBRARY_LINES_PER_S, LINES_PER_S, LogHandler, _JsonFormatter
from tests.attacks.attacks import PREFACE
from tests.calls import TRANSPORTS
from tests.certificates import Authority
from tests.conftest import RunningServer, wait_until

SECRET = b"hush-hush-0123456789abcdefghijklmnop"
CALLS, PER_CONNECTION = 1000, 100
PING_ANSWER = PingFrame(0, opaque_data=b"the last", flags=["ACK"]).serialize()
CALL = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/digits.v1.DigitClassifierService/GetModel"),
    (b":authority", b"x"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]
# Headers that clients of gRPC do not send.
HEADERS = {
    "value of another charset": (b"x-user", b"caf\xe9 " + SECRET),
    "token with a stray byte": (b"authorization", b"Bearer " + SECRET + b"\xe9"),
    "token in UTF-8": (b"authorization", b"Bearer " + SECRET + b"\xc3\xa9"),
    "name of another charset": (b"caf\xe9", SECRET),
    "broken base64": (b"x-bin", b"!!" + SECRET),
    "control characters": (b"x-request-id", b"\x1b[31m" + SECRET),
    "no timeout": (b"grpc-timeout", SECRET),
    "no encoding": (b"grpc-encoding", SECRET),
    "no method": (b":method", SECRET),
}


def block(*headers: Any) -> bytes:
    """A header block of plain bytes, whatever they are."""
    fields = [*CALL, *headers]
    assert max(len(text) for field in fields for text in field) < 127
    return b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields
    )


def call(address: str, header: Any) -> None:
    """Calls on one connection; waits until the server has read the last one."""
    said = [PREFACE, SettingsFrame(0).serialize()]
    for stream in range(1, 2 * PER_CONNECTION, 2):
        head = HeadersFrame(stream, data=block(header))
        head.flags.add("END_HEADERS")
        body = DataFrame(stream, data=bytes(5))
        body.flags.add("END_STREAM")
        said += [head.serialize(), body.serialize()]
    said.append(PingFrame(0, opaque_data=b"the last").serialize())
    host, _, port = address.rpartition(":")
    peer = socket.create_connection((host, int(port)), timeout=30)
    with peer, contextlib.suppress(OSError):  # the server may end it
        peer.sendall(b"".join(said))
        answered = b""
        while answered.count(PING_ANSWER) < 1:
            received = peer.recv(65536)
            if not received:
                break
            answered += received


@TRANSPORTS
def test_headers_of_thousands_of_calls_leave_no_secret_and_few_bytes(
    start_server: Callable[..., RunningServer], tmp_path: Path, transport: str
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("anna:" + "a" * 32 + "\n")
    tokens.chmod(0o600)
    flags = f"--transport={transport}", f"--auth-token-file={tokens}", "--request-log-per-s=1"
    server = start_server(*flags)
    before, began = len(server.log_text()), time.monotonic()
    for header in HEADERS.values():
        for _ in range(CALLS // PER_CONNECTION):
            call(server.address, header)
    took_s = time.monotonic() - began
    assert server.stop() == 0
    text = server.log.read_bytes()
    assert SECRET not in text
    assert b"caf" not in text
    assert b"\x1b" not in text
    # A line of either kind a second, and of libraries, with a stack trace each.
    assert len(text) - before < 10_000 + (took_s + 1) * (2 * 500 + LIBRARY_LINES_PER_S * 1500)
    for line in text.splitlines():
        json.loads(line)  # nothing goes past the log


@TRANSPORTS
def test_handshakes_that_fail_leave_few_bytes(
    start_server: Callable[..., RunningServer], tmp_path: Path, transport: str
) -> None:
    certificate, key = Authority(tmp_path, "root").issue("server")
    server = start_server(
        f"--transport={transport}", f"--tls-cert={certificate}", f"--tls-key={key}"
    )
    before = len(server.log_text())
    host, _, port = server.address.rpartition(":")
    for _ in range(300):
        with socket.create_connection((host, int(port)), timeout=30) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\nX: " + SECRET + b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                peer.recv(4096)
    assert server.stop() == 0
    assert SECRET not in server.log.read_bytes()
    assert len(server.log_text()) - before < 5_000


@pytest.fixture
def written(tmp_path: Path) -> Iterator[tuple[LogHandler, Callable[..., list[Any]]]]:
    """A handler, and what it has written so far."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        handler = LogHandler(file.fileno(), _JsonFormatter())

        def lines() -> list[Any]:
            handler.finish()
            return [json.loads(line) for line in path.read_text().splitlines()]

        yield handler, lines


def record(name: str, message: Any, *args: Any, **extra: Any) -> Any:
    return logging.makeLogRecord({"name": name, "msg": message, "args": args, **extra})


@pytest.mark.parametrize("name", ["grpc._cython.cygrpc", "asyncio", "aiohttp.server", "PIL.Image"])
def test_of_a_library_only_what_was_known_before_a_caller_came_is_written(
    written: tuple[LogHandler, Callable[..., list[Any]]], name: str
) -> None:
    handler, lines = written
    try:
        raise ValueError("hush: in the error")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    handler.emit(record(name, "Invalid encoding on %s", b"hush", exc_info=info))
    [line] = lines()
    assert line["message"] == "Invalid encoding on %s"
    assert line["exception"].endswith("ValueError")
    assert "test_log_secrets.py" in line["exception"]
    assert "hush" not in line["exception"].replace('raise ValueError("hush: in the error")', "")


def test_lines_of_a_library_and_of_one_logger_are_bounded_and_counted(
    written: tuple[LogHandler, Callable[..., list[Any]]],
) -> None:
    handler, lines = written
    before = time.monotonic()
    for number in range(3000):
        handler.emit(record("aiohttp.server", f"{number}" * 1000))
        handler.emit(record("service.one", "again"))
    handler.emit(record("service.two", "other"))
    found = lines()
    most_s = 1 + time.monotonic() - before
    of_library = [line for line in found if line["logger"] == "aiohttp.server"]
    assert LIBRARY_LINES_PER_S <= len(of_library) <= most_s * LIBRARY_LINES_PER_S + 1
    assert max(len(line["message"]) for line in of_library) == logs.MAX_LIBRARY_CHARS
    assert sum(line["logger"] == "service.one" for line in found) <= most_s * LINES_PER_S + 1
    assert found[-1]["message"] == "other"

    emitted = 3000

    def told() -> Any:
        nonlocal emitted
        handler.emit(record("service.one", "again"))
        emitted += 1
        own = [line for line in lines() if line["logger"] == "service.one"]
        return len(own) + sum(line.get("suppressed", 0) for line in own) == emitted

    wait_until(told)


def test_warning_is_written_within_its_bounds(
    written: tuple[LogHandler, Callable[..., list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, lines = written
    logger = logging.getLogger("py.warnings")
    logger.addHandler(handler)
    logging.captureWarnings(capture=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(capture=True)
            for number in range(100):
                warnings.warn(f"tag {number} \x1b[31m" + "x" * 1000, stacklevel=1)
    finally:
        logging.captureWarnings(capture=False)
        logger.removeHandler(handler)
    found = lines()
    assert 1 <= len(found) <= 3 * LIBRARY_LINES_PER_S
    assert "tag 0" in found[0]["message"]
    assert max(len(line["message"]) for line in found) <= logs.MAX_LIBRARY_CHARS


CONTROLS = "\x1b[31m", "\n", "\r", "\x9b", "\u2028", "\u202e", "\x7f", "\x00"


@pytest.mark.parametrize("control", CONTROLS)
def test_control_characters_get_no_further_than_the_formatter(control: str) -> None:
    text = logs._TextFormatter("%(levelname)s %(message)s")
    hostile = f"a{control}b"
    try:
        raise ValueError(hostile)
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    made = record("service.one", hostile, fields={"peer": hostile}, exc_info=info)
    for formatter in (text, _JsonFormatter()):
        line = formatter.format(made)
        assert control == "\n" or control[0] not in line
    assert text.format(record("x", hostile, fields={"peer": hostile})).count("\n") == 0


def test_opencv_does_not_write_past_the_log() -> None:
    """A damaged PNG file, of which OpenCV warns by itself unless it is told not to."""
    told = "import numpy as np, cv2, service.serving.pictures\n"
    damaged = 'cv2.imdecode(np.frombuffer(b"\\x89PNG\\r\\n\\x1a\\n" + b"x" * 60, np.uint8), 0)'
    run = subprocess.run([sys.executable, "-c", told + damaged], capture_output=True, check=True)
    assert run.stderr == b""
