"""Requests to the HTTP port of a server."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from tests.conftest import SAMPLES, RunningServer

SEVEN = SAMPLES / "7.png"
JSON = "application/json"
STARTED = (
    'grpc_server_started_total{grpc_method="Classify",'
    'grpc_service="digits.v1.DigitClassifierService",grpc_type="unary"}'
)


def ask(
    server: RunningServer, path: Any, *, method: Any = None, body: Any = None, **headers: Any
) -> tuple[Any, Any, Any]:
    """Status, headers and body of one request; ``content_type`` names that header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.http + path, body, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def classify(
    server: RunningServer, body: Any, content_type: Any = JSON, **headers: Any
) -> tuple[Any, Any, Any]:
    """Status, headers and the JSON of /v1/classify."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    answer = ask(server, "/v1/classify", body=body, content_type=content_type, **headers)
    return answer[0], answer[1], json.loads(answer[2])


def form(files: Any) -> tuple[bytes, str]:
    """The body and the content type of a form, as a browser makes it."""
    head = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f.png"\r\n\r\n'
    return b"".join(head + data + b"\r\n" for data in files) + b"--x--\r\n", (
        "multipart/form-data; boundary=x"
    )


def connect(server: RunningServer) -> Any:
    address = urlsplit(server.http)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def metric(server: RunningServer, name: str) -> float:
    for line in ask(server, "/metrics")[2].decode().splitlines():
        if line.startswith(name + " "):
            return float(line.split()[-1])
    raise AssertionError(f"no {name}")


def answers(server: RunningServer) -> Any:
    """Counted so far, by HTTP status."""
    lines = ask(server, "/metrics")[2].decode().splitlines()
    series = re.compile(r'digits_http_requests_total{status="(\d+)"} (.*)')
    found = map(series.fullmatch, lines)
    return Counter({int(each[1]): int(float(each[2])) for each in found if each})
