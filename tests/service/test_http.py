"""The HTTP port: metrics, health, pages, and how it ends."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable

import grpc
import pytest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.parser import text_fd_to_metric_families

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.playground.classify import BODY_S
from tests.conftest import RunningServer, wait_until
from tests.service.http import JSON, SEVEN, STARTED, ask, classify, connect, metric


def test_openmetrics_is_sent_to_those_who_ask_for_it(web: RunningServer) -> None:
    status, headers, body = ask(
        web, "/metrics", accept="application/openmetrics-text; version=1.0.0"
    )
    assert status == 200
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    families = {family.name for family in text_fd_to_metric_families(io.StringIO(body.decode()))}
    assert {"digits_batch_size", "grpc_server_handled", "digits_model_info"} <= families


@pytest.mark.parametrize("version", ["abc", "9.9", "1.0.0.77", "0.0.1", ""])
def test_a_version_that_is_not_ours_gets_the_text_format(web: RunningServer, version: str) -> None:
    accept = f"application/openmetrics-text; version={version}"
    status, headers, body = ask(web, "/metrics", accept=accept)
    assert (status, headers["Content-Type"]) == (200, CONTENT_TYPE_PLAIN_0_0_4)
    assert b"digits_batch_size" in body


def test_whoever_takes_openmetrics_among_others_gets_it(web: RunningServer) -> None:
    any_version = "application/openmetrics-text"
    prometheus_3 = (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
        "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,*/*;q=0.1"
    )
    for accept in (any_version, f"text/plain, {any_version}; version=1.0.0", prometheus_3):
        assert ask(web, "/metrics", accept=accept)[1]["Content-Type"] == CONTENT_TYPE_LATEST


def test_metrics_are_compressed_on_request(web: RunningServer) -> None:
    import gzip

    _, plain_headers, plain = ask(web, "/metrics")
    _, headers, body = ask(web, "/metrics", accept_encoding="gzip")
    assert "Content-Encoding" not in plain_headers
    assert headers["Content-Encoding"] == "gzip"
    assert b"digits_batch_size" in gzip.decompress(body)
    assert len(body) < len(plain) / 3


@pytest.mark.parametrize(
    ("accepted", "compressed"),
    [
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("gzip ; q=1.0, br", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, identity", False),
        ("identity, gzip ;q=0.0", False),
        ("xgzip, gzipped", False),
        ("br", False),
    ],
)
def test_metrics_are_compressed_for_those_only_who_take_that(
    web: RunningServer, accepted: str, compressed: bool
) -> None:
    headers = ask(web, "/metrics", accept_encoding=accepted)[1]
    assert (headers.get("Content-Encoding") == "gzip") == compressed


def test_head_is_answered_like_get_without_a_body(web: RunningServer) -> None:
    for path in ("/", "/metrics", "/healthz", "/livez", "/draw"):
        status, headers, body = ask(web, path, method="HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 0


def test_unknown_paths_and_methods_are_refused_with_what_was_expected(web: RunningServer) -> None:
    status, _, body = ask(web, "/metrics/../../etc/passwd")
    assert status == 404
    assert "/healthz" in json.loads(body)["error"]["message"]
    status, headers, body = ask(web, "/healthz", method="POST", body=b"x")
    assert (status, headers["Allow"]) == (405, "GET,HEAD")
    assert json.loads(body)["error"]["message"] == "method: expected GET or HEAD, got POST"
    assert ask(web, "/v1/classify")[0] == 405


def test_every_answer_is_hardened_and_names_no_software_version(web: RunningServer) -> None:
    for path in ("/", "/metrics", "/draw", "/draw.js", "/nothing", "/v1/classify"):
        _, headers, _ = ask(web, path)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Server"] == "digits-serving"


def test_status_page_says_what_serves_and_where_to_look(web: RunningServer) -> None:
    status, headers, body = ask(web, "/")
    page = body.decode()
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    for fact in ("SERVING", web.announced["sha256"], web.announced["transport"], "uptime"):
        assert fact in page
    for path in ("draw", "metrics", "healthz", "livez", "page.css", "icon.svg"):
        assert f'href="{path}"' in page
        assert ask(web, f"/{path}")[0] == 200


def test_classify_and_playground_are_off_unless_asked_for(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server()
    assert ask(server, "/v1/classify", body=b"{}", content_type=JSON)[0] == 404
    for path in ("/draw", "/draw.js", "/draw.css"):
        assert ask(server, path)[0] == 404
    assert b'href="draw"' not in ask(server, "/")[2]


def test_while_draining_classify_is_unavailable_and_health_says_so(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--playground", "--grace-s=20")
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        files = digits_pb2.EncodedImages(files=[SEVEN.read_bytes()] * 4000)
        request = digits_pb2.ClassifyRequest(encoded=files)
        busy = [stub.Classify.future(request, timeout=60) for _ in range(10)]
        wait_until(lambda: metric(server, STARTED) == len(busy))
        server.process.terminate()
        wait_until(lambda: ask(server, "/healthz")[0] == 503, 10)
        _, _, answer = wait_until(
            lambda: (a := classify(server, SEVEN.read_bytes(), "image/png"))[0] == 503 and a, 10
        )
        assert answer["error"] == {
            "code": "UNAVAILABLE",
            "message": "the server is shutting down",
        }
        assert ask(server, "/livez")[0] == 200
        for call in busy:
            call.cancel()
        assert server.process.wait(30) == 0


def test_connections_that_do_nothing_do_not_hold_the_exit(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--playground")
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with connect(server), connect(server) as slow:
        slow.sendall(head + b"Content-Length: 1000\r\n\r\nx")
        wait_until(lambda: ask(server, "/healthz")[0] == 200)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < BODY_S
