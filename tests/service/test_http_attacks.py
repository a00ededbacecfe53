"""Memory and time that one request to the HTTP port can cost, and the rate limits of addresses."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from service.host.addresses import neighbourhood
from service.ops_http.app import MAX_BODY_BYTES
from service.playground.classify import ALL_ADDRESSES, ClassifyHandler
from service.playground.requests import MAX_JSON_BYTES
from tests.conftest import SAMPLES, RunningServer
from tests.memory import MIB, PeakMemory

SEVEN = (SAMPLES / "7.png").read_bytes()
FORM, JSON = "multipart/form-data; boundary=x", "application/json"
FILE = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f.png"\r\n'
NESTED = b"--x\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n"


def filled(head: bytes, unit: bytes, tail: bytes = b"", size: int = MAX_BODY_BYTES) -> bytes:
    """The longest body of so many units between a head and a tail."""
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def hostile_json(head: bytes, unit: bytes, tail: bytes) -> bytes:
    return filled(head, unit, tail, MAX_JSON_BYTES)


BODIES = {
    "empty lines": (filled(b"", b"\r\n"), FORM),
    "line feeds": (filled(b"", b"\n"), FORM),
    "headers of a part": (filled(FILE, b"a:b\r\n"), FORM),
    "long headers of a part": (filled(FILE, b"a:" + b"b" * 8000 + b"\r\n"), FORM),
    "a part of line feeds": (filled(FILE + b"\r\n", b"\n"), FORM),
    "a part of half boundaries": (filled(FILE + b"\r\n", b"\r\n--"), FORM),
    "semicolons": (filled(FILE[:-2], b";filename ", size=2000) + b"\r\n\r\n\r\n--x--", FORM),
    "parts": (filled(b"", FILE + b"\r\n\r\n"), FORM),
    "nested forms": (filled(b"", NESTED), FORM),
    "epilogue": (filled(FILE + b"\r\n\r\n--x--", b"\r\n"), FORM),
    "lists in lists": (hostile_json(b'{"pixels":', b"[", b"}"), JSON),
    "empty lists": (hostile_json(b'{"pixels":[', b"[],", b"[]]}"), JSON),
    "empty objects": (hostile_json(b'{"pixels":[', b"{},", b"{}]}"), JSON),
    "numbers": (hostile_json(b'{"pixels":[', b"1,", b"1]}"), JSON),
    "rows of numbers": (hostile_json(b'{"pixels":[', b"[1],", b"[1]]}"), JSON),
    "a number": (hostile_json(b'{"pixels":[[', b"9", b"]]}"), JSON),
    "numbers of 4,200 digits": (hostile_json(b'{"pixels":[[', b"9" * 4200 + b",", b"1]]}"), JSON),
    "an exponent": (hostile_json(b'{"pixels":[[1e', b"9", b"]]}"), JSON),
    "infinities": (hostile_json(b'{"pixels":[[', b"Infinity,", b"NaN]]}"), JSON),
    "texts": (hostile_json(b'{"pixels":[[', b'"",', b'""]]}'), JSON),
    "long texts": (hostile_json(b'{"pixels":[["', b"a", b'"]]}'), JSON),
    "nulls": (hostile_json(b'{"pixels":[[', b"null,", b"null]]}"), JSON),
    "keys": (hostile_json(b"{", b'"a":0,', b'"b":0}'), JSON),
    "files": (hostile_json(b'{"encoded":{"files":[', b'"",', b'""]}}'), JSON),
    "base64": (hostile_json(b'{"pixels":"', b"\\u0041", b'"}'), JSON),
}


def post(server: RunningServer, body: Any, kind: Any, *, token: str = "") -> tuple[int, Any]:
    """The first line of the answer, and the rest."""
    address = urlsplit(server.http)
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    head += f"Authorization: Bearer {token}\r\n" if token else ""
    with socket.create_connection((address.hostname, address.port), timeout=60) as peer:
        with contextlib.suppress(ConnectionError):  # it may have answered already
            peer.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, _, rest = peer.recv(65536).partition(b"\r\n")
    return int(status.split()[1]), rest


def used_s(server: RunningServer) -> Any:
    times = psutil.Process(server.process.pid).cpu_times()
    return times.user + times.system


@pytest.mark.parametrize("attack", BODIES)
def test_hostile_body_is_refused_at_little_cost(web: RunningServer, attack: str) -> None:
    """By processor time, all of which the event loop may spend at once; other work adds nothing."""
    body, kind = BODIES[attack]
    assert len(body) <= (MAX_JSON_BYTES if kind == JSON else MAX_BODY_BYTES)
    before = used_s(web)
    with PeakMemory(web) as peak:
        status, answer = post(web, body, kind)
    assert status == 400, answer
    assert used_s(web) - before < 0.25  # of which 0.1 s are the loop's at most, and 0.02 usual
    assert peak.grown < 48 * MIB
    assert len(answer) < 2000
    assert post(web, SEVEN, "image/png")[0] == 200
    assert len(web.log_text()) < 5000


def test_the_largest_request_in_numbers_is_taken(web: RunningServer) -> None:
    image = [[255] * 28] * 28
    status, _ = post(web, json.dumps({"pixels": [image] * 64}).encode(), JSON)
    assert status == 200


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.3", "loopback"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_addresses_that_one_caller_can_have_are_one(address: str, counted: str) -> None:
    assert neighbourhood(address) == counted


def test_all_addresses_together_have_a_rate() -> None:
    """Each request is from another network; a second of the rate is there at the start."""
    nobody: Any = None
    handler = ClassifyHandler(nobody, refusal=None, is_draining=lambda: False, requests_per_s=5)
    waits = [handler._wait_s(f"2001:db8:{number:x}::/64", 100.0) for number in range(1000)]
    assert sum(wait == 0 for wait in waits) == 5 * ALL_ADDRESSES + 1
    assert max(waits) <= 1


def test_who_shows_no_token_takes_nothing_of_the_rate(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    tokens, good = tmp_path / "tokens", "0123456789abcdef0123456789abcdef"
    tokens.write_text(f"me:{good}\n")
    tokens.chmod(0o600)
    server = start_server(
        "--playground",
        f"--auth-token-file={tokens}",
        constants={"service.playground.classify.REQUESTS_PER_S": 0.001},
    )
    assert {post(server, SEVEN, "image/png", token="x" * 32)[0] for _ in range(50)} == {401}
    assert post(server, SEVEN, "image/png", token=good)[0] == 200
