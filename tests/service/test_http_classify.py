"""POST /v1/classify: answers, and refusals by name."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.ops_http.app import MAX_BODY_BYTES
from service.ops_http.errors import HTTP_STATUS
from service.playground.requests import MAX_IMAGES
from service.telemetry.metrics import HTTP_STATUSES
from tests.conftest import RunningServer, wait_until
from tests.service.http import JSON, SEVEN, answers, ask, classify, connect, form, metric


def test_answers_are_those_of_grpc(web: RunningServer, sample: dict[str, np.ndarray]) -> None:
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


def test_one_image_needs_no_list_around_it(
    web: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    status, _, answer = classify(web, {"pixels": sample["images"][0].tolist()})
    assert status == 200
    assert [p["digit"] for p in answer["predictions"]] == [sample["labels"][0]]


def test_files_come_in_three_forms_and_bring_back_what_the_network_saw(web: RunningServer) -> None:
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


def test_its_images_are_counted_and_its_requests_are_no_rpcs(web: RunningServer) -> None:
    def rpcs() -> list[Any]:
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
def test_bad_json_is_refused_by_name(web: RunningServer, case: str) -> None:
    body, field = BAD_BODIES[case]
    status, _, answer = classify(web, body)
    error = answer["error"]
    assert (status, error["code"], error["field"]) == (400, "INVALID_ARGUMENT", field)
    assert error["message"] == f"{field}: expected {error['expected']}, got {error['got']}"


def test_bad_forms_and_files_are_refused_by_name(web: RunningServer) -> None:
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


def test_other_content_is_refused_with_what_was_expected(web: RunningServer) -> None:
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
def test_a_page_from_elsewhere_is_refused(web: RunningServer, headers: Any) -> None:
    status, _, answer = classify(web, SEVEN.read_bytes(), "image/png", **headers)
    assert (status, answer["error"]["code"]) == (403, "FORBIDDEN")


def test_a_page_of_this_server_is_answered_wherever_it_is_not_from_elsewhere(
    web: RunningServer,
) -> None:
    behind_a_proxy = {"sec_fetch_site": "same-origin", "origin": "https://digits.example"}
    for headers in ({"origin": web.http}, {"sec_fetch_site": "same-origin"}, behind_a_proxy):
        assert classify(web, SEVEN.read_bytes(), "image/png", **headers)[0] == 200


def test_its_answers_are_counted_by_http_status(web: RunningServer) -> None:
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


def test_every_status_of_a_call_has_its_series() -> None:
    assert set(HTTP_STATUS.values()) < set(HTTP_STATUSES)


def test_where_tokens_are_needed_classify_needs_one_and_probes_do_not(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
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
