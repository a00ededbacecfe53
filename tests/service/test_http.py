"""The HTTP port: what it answers, what it refuses, and what can not bring it down."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import socket
import time
from functools import partial

import grpc
import numpy as np
import psutil
import pytest
from aiohttp import ClientSession
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.parser import text_fd_to_metric_families

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.assembly import MAX_HTTP_CONNECTIONS as MAX_CONNECTIONS
from service.ops_http.connections import SILENCE_S
from service.ops_http.errors import HTTP_STATUS
from service.ops_http.metrics import LOOP_SHARE
from service.ops_http.server import HttpServer, Ops
from service.playground.app import Offer, add_playground
from service.playground.classify import BODY_S, MAX_AT_ONCE
from service.playground.requests import MAX_BODY_BYTES, MAX_IMAGES, MAX_JSON_BYTES
from service.serving.request import Refusal
from service.telemetry.metrics import HTTP_STATUSES
from tests.conftest import wait_until
from tests.service.http import JSON, SEVEN, STARTED, answers, ask, classify, connect, form, metric

# --- metrics, health, pages ------------------------------------------------------------------


def test_openmetrics_is_sent_to_those_who_ask_for_it(web):
    status, headers, body = ask(
        web, "/metrics", accept="application/openmetrics-text; version=1.0.0"
    )
    assert status == 200
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    families = {family.name for family in text_fd_to_metric_families(io.StringIO(body.decode()))}
    assert {"digits_batch_size", "grpc_server_handled", "digits_model_info"} <= families


@pytest.mark.parametrize("version", ["abc", "9.9", "1.0.0.77", "0.0.1", ""])
def test_a_version_that_is_not_ours_gets_the_text_format(web, version):
    accept = f"application/openmetrics-text; version={version}"
    status, headers, body = ask(web, "/metrics", accept=accept)
    assert (status, headers["Content-Type"]) == (200, CONTENT_TYPE_PLAIN_0_0_4)
    assert b"digits_batch_size" in body


def test_whoever_takes_openmetrics_among_others_gets_it(web):
    any_version = "application/openmetrics-text"
    prometheus_3 = (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
        "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,*/*;q=0.1"
    )
    for accept in (any_version, f"text/plain, {any_version}; version=1.0.0", prometheus_3):
        assert ask(web, "/metrics", accept=accept)[1]["Content-Type"] == CONTENT_TYPE_LATEST


def test_metrics_are_compressed_on_request(web):
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
def test_metrics_are_compressed_for_those_only_who_take_that(web, accepted, compressed):
    headers = ask(web, "/metrics", accept_encoding=accepted)[1]
    assert (headers.get("Content-Encoding") == "gzip") == compressed


def test_head_is_answered_like_get_without_a_body(web):
    for path in ("/", "/metrics", "/healthz", "/livez", "/draw"):
        status, headers, body = ask(web, path, method="HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 0


def test_unknown_paths_and_methods_are_refused_with_what_was_expected(web):
    status, _, body = ask(web, "/metrics/../../etc/passwd")
    assert status == 404
    assert "/healthz" in json.loads(body)["error"]["message"]
    status, headers, body = ask(web, "/healthz", method="POST", body=b"x")
    assert (status, headers["Allow"]) == (405, "GET,HEAD")
    assert json.loads(body)["error"]["message"] == "method: expected GET or HEAD, got POST"
    assert ask(web, "/v1/classify")[0] == 405


def test_every_answer_is_hardened_and_names_no_software_version(web):
    for path in ("/", "/metrics", "/draw", "/draw.js", "/nothing", "/v1/classify"):
        _, headers, _ = ask(web, path)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Server"] == "digits-serving"


def test_status_page_says_what_serves_and_where_to_look(web):
    status, headers, body = ask(web, "/")
    page = body.decode()
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    for fact in ("SERVING", web.announced["sha256"], web.announced["transport"], "uptime"):
        assert fact in page
    for path in ("draw", "metrics", "healthz", "livez", "page.css", "icon.svg"):
        assert f'href="{path}"' in page
        assert ask(web, f"/{path}")[0] == 200


def test_classify_and_playground_are_off_unless_asked_for(start_server):
    server = start_server()
    assert ask(server, "/v1/classify", body=b"{}", content_type=JSON)[0] == 404
    for path in ("/draw", "/draw.js", "/draw.css"):
        assert ask(server, path)[0] == 404
    assert b'href="draw"' not in ask(server, "/")[2]


# --- /v1/classify ----------------------------------------------------------------------------


def test_answers_are_those_of_grpc(web, sample):
    images = sample["images"][:40]
    with grpc.insecure_channel(web.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        expected = stub.Classify(digits_pb2.ClassifyRequest(pixels=images.tobytes()))
    for pixels in (images.tolist(), base64.b64encode(images.tobytes()).decode()):
        status, _, answer = classify(web, {"pixels": pixels})
        assert status == 200
        got = answer["predictions"]
        assert [p["digit"] for p in got] == [p.digit for p in expected.predictions]
        for mine, theirs in zip(got, expected.predictions, strict=True):
            np.testing.assert_allclose(mine["probabilities"], theirs.probabilities, atol=1e-6)
        assert answer["model"]["sha256"] == web.announced["sha256"]
        assert answer["timing"]["batch_images"] >= 1


def test_one_image_needs_no_list_around_it(web, sample):
    status, _, answer = classify(web, {"pixels": sample["images"][0].tolist()})
    assert status == 200
    assert [p["digit"] for p in answer["predictions"]] == [sample["labels"][0]]


def test_files_come_in_three_forms_and_bring_back_what_the_network_saw(web):
    data = SEVEN.read_bytes()
    encoded = {"encoded": {"files": [base64.b64encode(data).decode()]}}
    for body, kind in ((data, "image/png"), form([data]), (encoded, JSON)):
        status, _, answer = classify(web, body, kind)
        assert status == 200
        (prediction,) = answer["predictions"]
        assert prediction["digit"] == 7
        seen = base64.b64decode(prediction["pixels"])
        again = classify(web, {"pixels": base64.b64encode(seen).decode()})[2]
        assert len(seen) == 784
        np.testing.assert_allclose(
            again["predictions"][0]["probabilities"], prediction["probabilities"], atol=1e-6
        )
        assert "pixels" not in again["predictions"][0]
        assert 0.5 < prediction["digit_score"] <= 1
        assert 0.5 < again["predictions"][0]["digit_score"] <= again["predictions"][0]["confidence"]


def test_its_images_are_counted_and_its_requests_are_no_rpcs(web):
    def rpcs():
        text = ask(web, "/metrics")[2].decode()
        return [line for line in text.splitlines() if line.startswith("grpc_server")]

    before = rpcs(), metric(web, "digits_images_total")
    body, kind = form([SEVEN.read_bytes()] * 5)
    assert classify(web, body, kind)[0] == 200
    assert classify(web, b"no image", "image/png")[0] == 400
    wait_until(lambda: metric(web, "digits_images_total") == before[1] + 5)
    assert rpcs() == before[0]


GRID = [[0] * 28] * 28
BAD_BODIES = {
    "not JSON": (b"{", "body"),
    "deep JSON": (b"[" * 200_000, "body"),
    "a list": ([], "body"),
    "two inputs": ({"pixels": "", "encoded": {}}, "body"),
    "unknown field": ({"image": ""}, "body"),
    "no images": ({"pixels": ""}, "pixels"),
    "not a whole image": ({"pixels": base64.b64encode(bytes(785)).decode()}, "pixels"),
    "not base64": ({"pixels": "%%%"}, "pixels"),
    "a number": ({"pixels": 3}, "pixels"),
    "ragged": ({"pixels": [[1, 2], [3]]}, "pixels"),
    "flat": ({"pixels": [0] * 784}, "pixels"),
    "four dimensions": ({"pixels": [[GRID]]}, "pixels"),
    "over 255": ({"pixels": [[256] * 28] * 28}, "pixels"),
    "negative": ({"pixels": [[-1] * 28] * 28}, "pixels"),
    "beyond 64 bits": ({"pixels": [[2**70] * 28] * 28}, "pixels"),
    "fractions": ({"pixels": [[0.5] * 28] * 28}, "pixels"),
    "booleans": ({"pixels": [[True] * 28] * 28}, "pixels"),
    "text": ({"pixels": [["1"] * 28] * 28}, "pixels"),
    "null": ({"pixels": [[None] * 28] * 28}, "pixels"),
    "files are no list": ({"encoded": {"files": "x"}}, "encoded"),
    "no files": ({"encoded": {"files": []}}, "encoded.files"),
    "file is no base64": ({"encoded": {"files": ["é"]}}, "encoded.files[0]"),
    "file is no image": ({"encoded": {"files": ["AAAA"]}}, "encoded.files[0]"),
    "too many": ({"encoded": {"files": [""] * (MAX_IMAGES + 1)}}, "encoded.files"),
    "too many pixels": (
        {"pixels": base64.b64encode(bytes(784 * (MAX_IMAGES + 1))).decode()},
        "pixels",
    ),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_json_is_refused_by_name(web, case):
    body, field = BAD_BODIES[case]
    status, _, answer = classify(web, body)
    error = answer["error"]
    assert (status, error["code"], error["field"]) == (400, "INVALID_ARGUMENT", field)
    assert error["message"] == f"{field}: expected {error['expected']}, got {error['got']}"


def test_bad_forms_and_files_are_refused_by_name(web):
    boundary = "multipart/form-data; boundary=x"
    text_field = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n'
    nested = (
        b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\n--y--\r\n--x--\r\n"
    )
    for body, kind, field in (
        (b"garbage", boundary, "body"),
        (b"garbage", "multipart/form-data", "body"),
        (b"--x", boundary, "body"),
        (b"\r\n" + form([b"x"])[0], boundary, "body"),
        (form([b"x"])[0], "multipart/form-data", "body"),
        (b"--\r\n" + form([b"x"])[0][5:], "multipart/form-data", "body"),
        (form([b"x"])[0][:-5], boundary, "body"),
        (b"--x\r\n" + b"a" * 20_000, boundary, "body"),
        (text_field, boundary, "body"),
        (nested, boundary, "body"),
        (*form([b"x"] * (MAX_IMAGES + 1)), "encoded.files"),
        (b"not an image", "image/png", "encoded.files[0]"),
        (b"", "image/png", "encoded.files[0]"),
    ):
        status, _, answer = classify(web, body, kind)
        assert (status, answer["error"].get("field")) == (400, field), (body[:99], answer)
    assert "Traceback" not in web.log_text()


def test_other_content_is_refused_with_what_was_expected(web):
    for headers in ({"content_type": "text/plain"}, {"content_encoding": "gzip"}):
        status, _, answer = classify(web, b"x", **{"content_type": "image/png", **headers})
        assert status == 415
        assert "expected" in answer["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"origin": "http://elsewhere.example"},
        {"origin": "http://127.0.0.1"},  # another port
        {"origin": "null"},
    ],
    ids=str,
)
def test_a_page_from_elsewhere_is_refused(web, headers):
    status, _, answer = classify(web, SEVEN.read_bytes(), "image/png", **headers)
    assert (status, answer["error"]["code"]) == (403, "FORBIDDEN")


def test_a_page_of_this_server_is_answered_wherever_it_is_not_from_elsewhere(web):
    behind_a_proxy = {"sec_fetch_site": "same-origin", "origin": "https://digits.example"}
    for headers in ({"origin": web.http}, {"sec_fetch_site": "same-origin"}, behind_a_proxy):
        assert classify(web, SEVEN.read_bytes(), "image/png", **headers)[0] == 200


def test_its_answers_are_counted_by_http_status(web):
    data = SEVEN.read_bytes()
    before = answers(web)
    assert list(before) == list(HTTP_STATUSES)
    asked = [
        classify(web, data, "image/png"),
        classify(web, b"no image", "image/png"),
        classify(web, data, "image/png", origin="http://elsewhere.example"),
        classify(web, data, "text/plain"),
        ask(web, "/v1/classify"),
        classify(web, data, "image/png"),
    ]
    assert [status for status, *_ in asked] == [200, 400, 403, 415, 405, 200]
    assert answers(web) - before == {200: 2, 400: 1, 403: 1, 405: 1, 415: 1}


def test_every_status_of_a_call_has_its_series():
    assert set(HTTP_STATUS.values()) < set(HTTP_STATUSES)


def test_where_tokens_are_needed_classify_needs_one_and_probes_do_not(start_server, tmp_path):
    tokens, good = tmp_path / "tokens", "0123456789abcdef0123456789abcdef"
    tokens.write_text(f"me:{good}\n")
    tokens.chmod(0o600)
    server = start_server("--playground", f"--auth-token-file={tokens}")
    data = SEVEN.read_bytes()
    for headers in ({}, {"authorization": f"Bearer {good[::-1]}"}):
        status, _, answer = classify(server, data, "image/png", **headers)
        assert (status, answer["error"]["code"]) == (401, "UNAUTHENTICATED")
    # Nobody waits for the body of a caller without a token, however large or wrong it may be.
    for kind, length in (("image/png", len(data)), ("text/plain", MAX_BODY_BYTES + 1)):
        with connect(server) as peer:
            head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
            peer.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert peer.recv(65536).startswith(b"HTTP/1.1 401")
    assert metric(server, 'digits_requests_dropped_total{reason="unauthenticated"}') == 4
    assert +answers(server) == {401: 4}
    answer = classify(server, data, "image/png", authorization=f"Bearer {good}")
    assert answer[2]["predictions"][0]["digit"] == 7
    assert ask(server, "/healthz")[0] == 200
    assert good not in ask(server, "/")[2].decode()


# --- bounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("kind", "limit"), [(JSON, MAX_JSON_BYTES), ("image/png", MAX_BODY_BYTES)])
def test_a_body_over_the_limit_is_refused(web, kind, limit, declared):
    with connect(web) as peer:
        framing = f"Content-Length: {limit + 1}" if declared else "Transfer-Encoding: chunked"
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n"
        peer.sendall(head.encode())
        if not declared:  # of a declared length, nothing is waited for
            peer.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (limit + 1, bytes(limit + 1)))
        answer = peer.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert f"at most {limit} bytes".encode() in answer


def test_a_form_over_the_limit_is_refused(web):
    body, kind = form([bytes(MAX_BODY_BYTES // 4)] * 5)
    with connect(web) as peer:
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        peer.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            peer.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert peer.recv(65536).startswith(b"HTTP/1.1 413")


def test_bodies_that_trickle_hold_others_up_for_a_bounded_time(web):
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(web)) for _ in range(MAX_AT_ONCE)]
        for peer in slow:
            peer.sendall(head + b"Content-Length: 1000\r\n\r\nx")
        wait_until(lambda: classify(web, b"x", "image/png")[0] == 429, BODY_S)
        status, headers, answer = classify(web, b"x", "image/png")
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer["error"]["code"] == "RESOURCE_EXHAUSTED"
        assert ask(web, "/healthz")[0] == 200
        for peer in slow:
            assert peer.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < BODY_S + 10
        assert classify(web, SEVEN.read_bytes(), "image/png")[0] == 200


def test_an_address_that_asks_too_often_is_told_when_to_come_back(start_server):
    server = start_server(
        "--playground", constants={"service.playground.classify.REQUESTS_PER_S": 1}
    )
    data = SEVEN.read_bytes()
    assert classify(server, data, "image/png")[0] == 200
    asked = [classify(server, data, "image/png") for _ in range(2)]
    status, headers, answer = asked[-1]  # the first may have saved up a moment's worth
    assert (status, headers["Retry-After"]) == (429, "1")
    assert 0 < answer["error"]["retry_after_s"] <= 1
    assert answers(server)[429] >= 1
    wait_until(lambda: classify(server, data, "image/png")[0] == 200, 10)


def test_a_header_that_trickles_is_cut_off(web):
    began = time.monotonic()
    with connect(web) as peer:
        peer.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        peer.settimeout(0.2)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 3 * SILENCE_S:
                peer.sendall(b"X-Slow: 1\r\n")
                with contextlib.suppress(TimeoutError):
                    if peer.recv(4096) == b"":
                        break
    assert SILENCE_S - 1 < time.monotonic() - began < 2 * SILENCE_S


@pytest.mark.full
def test_probes_are_answered_beside_2000_idle_connections(web):
    process = psutil.Process(web.process.pid)
    before = process.memory_info().rss, process.num_threads(), process.num_fds()
    with contextlib.ExitStack() as stack:
        for number in range(2000):
            peer = stack.enter_context(connect(web))
            if number % 2:
                peer.sendall(b"GET /metrics HTTP/1.1\r\nX-Half: ")
            if number % 500 == 499:
                assert ask(web, "/healthz")[0] == 200
                assert process.num_fds() - before[2] <= MAX_CONNECTIONS + 10
        assert classify(web, SEVEN.read_bytes(), "image/png")[2]["predictions"][0]["digit"] == 7
        assert process.num_threads() - before[1] <= 2
        assert process.memory_info().rss - before[0] < 32 * 2**20


def test_who_has_the_most_connections_makes_room(monkeypatch):
    """Here each address of loopback counts as one; the one that was there first has one."""
    monkeypatch.setattr("service.ops_http.connections.SILENCE_S", 3600)
    monkeypatch.setattr("service.ops_http.connections.neighbourhood", str)

    async def run():
        async with port() as (url, number), ClientSession() as client:
            with contextlib.ExitStack() as stack:
                address = ("127.0.0.1", number)
                first = socket.create_connection(address, source_address=("127.0.0.2", 0))
                stack.enter_context(first)
                for _ in range(MAX_CONNECTIONS + 3):
                    many = stack.enter_context(socket.create_connection(address))
                async with client.get(f"{url}/healthz") as response:
                    assert response.status == 200
                for peer in (first, many):
                    peer.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        peer.recv(1)

    asyncio.run(run())


def test_one_connection_too_many_cuts_the_oldest(monkeypatch):
    monkeypatch.setattr("service.ops_http.connections.SILENCE_S", 3600)

    async def run():
        async with port() as (url, number), ClientSession() as client:
            with contextlib.ExitStack() as stack:
                peers = []
                for _ in range(MAX_CONNECTIONS + 3):
                    peer = stack.enter_context(socket.create_connection(("127.0.0.1", number)))
                    peer.settimeout(30)
                    peers.append(peer)
                async with client.get(f"{url}/healthz") as response:
                    assert response.status == 200
                for peer in peers[:4]:  # the client's was one more
                    with contextlib.suppress(ConnectionResetError):
                        assert await asyncio.to_thread(peer.recv, 1) == b""
                peers[4].setblocking(False)
                with pytest.raises(BlockingIOError):
                    peers[4].recv(1)

    asyncio.run(run())


def test_pipelined_scrapes_that_nobody_reads_do_not_keep_a_probe_out(web):
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS - 10):
            peer = stack.enter_context(connect(web))
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        began = time.monotonic()
        assert ask(web, "/healthz")[0] == 200
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("together", [1, 50])
def test_renderings_for_scrapes_take_a_bounded_share_of_the_loop(together):
    began = []

    class Slow:
        def collect(self):
            began.append(time.monotonic())
            time.sleep(0.02)
            return []

    registry = CollectorRegistry()
    registry.register(Slow())

    def accept(number):  # each another version
        return {"Accept": f"application/openmetrics-text; version=1.{number}"}

    async def run():
        async with port(registry=registry) as (url, _), ClientSession() as client:
            began.clear()  # registering looks once
            for _ in range(5):
                answers = await asyncio.gather(
                    *(client.get(f"{url}/metrics", headers=accept(n)) for n in range(together))
                )
                assert {answer.status for answer in answers} == {200}

    asyncio.run(run())
    between = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert min(between) > 0.02 / LOOP_SHARE
    assert len(began) < 5 * max(2, together / 5)  # they are shared


def test_malformed_http_is_refused_in_a_line_and_logged_in_none(web):
    before = web.log_text()
    for garbage in (
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with connect(web) as peer:
            peer.sendall(garbage)
            answer = peer.recv(65536)
        assert b" 400 " in answer.splitlines()[0], (garbage[:40], answer)
        assert b"Server: digits-serving" in answer
        assert b'"code": "BAD_REQUEST"' in answer
    assert web.log_text() == before


def test_a_broken_body_is_refused(web):
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with connect(web) as peer:
        peer.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert b" 400 " in peer.recv(65536).splitlines()[0]
    assert "Traceback" not in web.log_text()


# --- the end ---------------------------------------------------------------------------------


def test_while_draining_classify_is_unavailable_and_health_says_so(start_server):
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


def test_connections_that_do_nothing_do_not_hold_the_exit(start_server):
    server = start_server("--playground")
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with connect(server), connect(server) as slow:
        slow.sendall(head + b"Content-Length: 1000\r\n\r\nx")
        wait_until(lambda: ask(server, "/healthz")[0] == 200)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < BODY_S


# --- what a call can end with, without a model -----------------------------------------------


@contextlib.asynccontextmanager
async def port(*, registry=None, is_alive=lambda: True, **offer):
    ops = Ops(registry=registry or CollectorRegistry(), is_ready=lambda: True, is_alive=is_alive)
    defaults = {"is_ready": lambda: True, "describe": dict, "requests_per_s": 1000.0}
    extend = partial(add_playground, offer=Offer(**{**defaults, **offer}))
    server = HttpServer("127.0.0.1", 0, ops, extend)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.port}", server.port
    finally:
        await server.close()


class FakeGate:
    """Takes requests of any form, and does with them what a test says."""

    def __init__(self, submit):
        self.submit = submit

    def count_images(self, field, size):
        return 1


# How the core refuses, with its HTTP status.
REFUSED = {
    Refusal.QUEUE_FULL: 429,
    Refusal.EXPIRED: 504,
    Refusal.CANCELLED: 499,
    Refusal.STOPPED: 503,
    Refusal.FAILED: 500,
    Refusal.UNAUTHENTICATED: 401,
}


@pytest.mark.parametrize("refusal", REFUSED)
def test_each_refusal_has_its_http_status(refusal):
    def refuse(requests):
        for request in requests:
            request.refusal, request.retry_after_s = refusal, 1.2
            request.reply([request])

    async def run():
        async with (
            port(gate=FakeGate(refuse)) as (url, _),
            ClientSession() as client,
            client.post(f"{url}/v1/classify", json={"pixels": ""}) as response,
        ):
            error = (await response.json())["error"]
            assert response.status == REFUSED[refusal]
            assert HTTP_STATUS[grpc.StatusCode[error["code"]]] == response.status
            assert response.headers.get("Retry-After") == ("2" if response.status == 429 else None)

    asyncio.run(run())


def test_a_caller_that_leaves_cancels_its_request():
    requests, told = [], []
    body = b'{"pixels": ""}'
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    async def run():
        async with port(gate=FakeGate(requests.extend), count=told.append) as (_, number):
            with socket.create_connection(("127.0.0.1", number)) as peer:
                peer.sendall(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
                await asyncio.to_thread(wait_until, lambda: requests)
                assert not requests[0].origin.cancelled
            await asyncio.to_thread(wait_until, lambda: requests[0].origin.cancelled and told, 4)

    asyncio.run(run())
    assert told == [499]


def test_a_request_without_an_answer_ends_at_its_deadline(monkeypatch):
    monkeypatch.setattr("service.playground.classify.DEADLINE_S", 0.1)
    requests = []

    async def run():
        async with (
            port(gate=FakeGate(requests.extend)) as (url, _),
            ClientSession() as client,
            client.post(f"{url}/v1/classify", json={"pixels": ""}) as response,
        ):
            assert response.status == 504
            assert (await response.json())["error"]["code"] == "DEADLINE_EXCEEDED"

    asyncio.run(run())
    assert requests[0].origin.cancelled


def test_an_error_of_ours_tells_nothing_of_itself(caplog):
    def fail(_):
        raise RuntimeError("an internal")

    async def run():
        async with (
            port(gate=FakeGate(fail)) as (url, _),
            ClientSession() as client,
            client.post(f"{url}/v1/classify", json={"pixels": ""}) as response,
        ):
            assert response.status == 500
            assert "an internal" not in await response.text()

    asyncio.run(run())
    assert "an internal" in caplog.text


def test_livez_says_when_the_engine_stalls_though_the_server_is_ready():
    async def run():
        async with port(is_alive=lambda: False) as (url, _), ClientSession() as client:
            async with client.get(f"{url}/livez") as response:
                assert (response.status, await response.text()) == (503, "STALLED\n")
            async with client.get(f"{url}/healthz") as response:
                assert response.status == 200

    asyncio.run(run())
