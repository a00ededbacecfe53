"""gRPC-Web as a browser sends it, through Envoy with the template of deploy/; both transports."""

from __future__ import annotations

import base64
import http.client
import urllib.parse
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from google.rpc import error_details_pb2, status_pb2

from digits.v1 import digits_pb2
from tests.calls import pixels
from tests.conftest import RunningServer
from tests.service.envoy import TEMPLATE, Envoy, envoy_program

pytestmark = pytest.mark.full

CLASSIFY = "/digits.v1.DigitClassifierService/Classify"
# Of a frame's first byte: the payload is trailers, not a message.
TRAILERS = 0x80
ELSEWHERE = "http://elsewhere.example"


def allowed_origin() -> Any:
    config = yaml.safe_load(TEMPLATE.read_text())
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    (host,) = manager["typed_config"]["route_config"]["virtual_hosts"]
    cors = host["typed_per_filter_config"]["envoy.filters.http.cors"]
    (origin,) = cors["allow_origin_string_match"]
    return origin["exact"]


@pytest.fixture(scope="module")
def envoy(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    envoy_program()
    running = Envoy(tmp_path_factory.mktemp("envoy"), [server.address])
    yield running
    running.close()


def ask(
    envoy: Any, method: Any, headers: Any, body: bytes = b""
) -> tuple[Any, dict[str, Any], Any]:
    """Status, headers and body of the answer to one HTTP/1.1 request."""
    connection = http.client.HTTPConnection(envoy.address, timeout=30)
    try:
        connection.request(method, CLASSIFY, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def call(envoy: Any, message: Any, **headers: Any) -> tuple[Any, dict[str, Any], Any]:
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    web = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", **headers}
    return ask(envoy, "POST", web, framed)


def frames(body: Any) -> tuple[Any, Any]:
    """What a gRPC-Web client takes from a body: messages, and the trailers at its end."""
    messages, trailers = [], {}
    while body:
        kind, length = body[0], int.from_bytes(body[1:5], "big")
        payload, body = body[5 : 5 + length], body[5 + length :]
        assert len(payload) == length
        if kind == TRAILERS:
            assert body == b"", "trailers are the last frame"
            lines = payload.decode().strip("\r\n").split("\r\n")
            trailers = dict(line.split(":", 1) for line in lines)
        else:
            assert kind == 0
            messages.append(payload)
    return messages, trailers


def test_call_is_answered_with_a_message_and_trailers(
    envoy: Envoy, sample: dict[str, np.ndarray]
) -> None:
    images = sample["images"][:20]
    message = pixels(images.tobytes()).SerializeToString()
    status, headers, body = call(envoy, message, origin=allowed_origin())
    assert (status, headers["content-type"]) == (200, "application/grpc-web+proto")
    assert headers["access-control-allow-origin"] == allowed_origin()
    [answer], trailers = frames(body)
    assert trailers["grpc-status"] == "0"
    digits = [p.digit for p in digits_pb2.ClassifyResponse.FromString(answer).predictions]
    assert digits == sample["labels"][:20].tolist()


def test_error_reaches_the_page_with_its_details(envoy: Envoy) -> None:
    status, headers, body = call(envoy, pixels(b"bad").SerializeToString(), origin=allowed_origin())
    assert status == 200
    assert body == b""  # there is no answer that trailers could follow
    assert int(headers["grpc-status"]) == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    text = urllib.parse.unquote(headers["grpc-message"])
    assert text == "pixels: expected a multiple of 784 bytes, got 3 bytes"
    exposed = headers["access-control-expose-headers"]
    assert {"grpc-status", "grpc-message", "grpc-status-details-bin"} <= set(exposed.split(", "))
    rich = status_pb2.Status.FromString(decoded(headers["grpc-status-details-bin"]))
    detail = error_details_pb2.BadRequest()
    assert rich.details[0].Unpack(detail)
    assert detail.field_violations[0].field == "pixels"


def decoded(value: Any) -> Any:
    return base64.b64decode(value + "=" * (-len(value) % 4))


def test_preflight_allows_the_page_that_is_named_and_no_other(envoy: Envoy) -> None:
    def preflight(origin: Any) -> tuple[Any, dict[str, Any], Any]:
        asked = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type,x-grpc-web,authorization",
        }
        return ask(envoy, "OPTIONS", asked)

    status, headers, body = preflight(allowed_origin())
    assert (status, body) == (200, b"")
    assert headers["access-control-allow-origin"] == allowed_origin()
    assert "POST" in headers["access-control-allow-methods"]
    allowed = {name.strip() for name in headers["access-control-allow-headers"].split(",")}
    assert {"content-type", "x-grpc-web", "authorization", "grpc-timeout"} <= allowed
    _, headers, _ = preflight(ELSEWHERE)
    assert "access-control-allow-origin" not in headers


def test_page_from_elsewhere_can_not_read_the_answer(envoy: Envoy) -> None:
    _, headers, _ = call(envoy, pixels(bytes(784)).SerializeToString(), origin=ELSEWHERE)
    assert "access-control-allow-origin" not in headers
