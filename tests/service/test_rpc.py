"""The gRPC contract over real connections, the same on both transports."""

from __future__ import annotations

import io
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.rpc.classify import SERVICE
from service.serving.engine import Engine
from service.serving.request import Refusal
from tests.calls import IMAGE, encoded, handled, pixels, refused, rich_detail, scrape, stream_of
from tests.conftest import REPOSITORY, SAMPLES, RunningServer, wait_until


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return digits_pb2_grpc.DigitClassifierServiceStub(channel)


def direct(images: np.ndarray) -> np.ndarray:
    engine = Engine((REPOSITORY / "2/model.int8.onnx").read_bytes())
    return np.concatenate(
        [engine.run(chunk) for chunk in np.array_split(images, len(images) // 50)]
    )


def assert_wire_equals_direct(stub: Any, images: np.ndarray, singles: Any) -> np.ndarray:
    """``singles`` images one by one and the rest in odd batches, from 8 callers at once."""
    expected = direct(images)
    bounds = list(range(singles + 1))
    sizes = [2, 3, 7, 16, 61, 64, 65, 200]
    while bounds[-1] < len(images):
        bounds.append(min(len(images), bounds[-1] + sizes[len(bounds) % len(sizes)]))

    def classify(start: Any, stop: Any) -> tuple[np.ndarray, list[Any]]:
        response = stub.Classify(pixels(images[start:stop].tobytes()), timeout=60)
        assert len(response.predictions) == stop - start
        got = np.array([p.probabilities for p in response.predictions], np.float32)
        labels = [p.digit for p in response.predictions]
        return got, labels

    with ThreadPoolExecutor(8) as callers:
        spans = list(pairwise(bounds))
        answers = list(callers.map(lambda span: classify(*span), spans))
    got = np.concatenate([probabilities for probabilities, _ in answers])
    labels = [label for _, some in answers for label in some]
    assert labels == expected.argmax(axis=1).tolist()
    assert np.abs(got - expected).max() <= 1e-6
    return np.array(labels)


def test_sample_over_the_wire_equals_onnxruntime(stub: Any, sample: dict[str, np.ndarray]) -> None:
    labels = assert_wire_equals_direct(stub, sample["images"], singles=100)
    assert (labels == sample["labels"]).mean() > 0.99


@pytest.mark.full
def test_full_test_set_over_the_wire_equals_onnxruntime(stub: Any, full_data: Path) -> None:
    raw = (full_data / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    truth = np.frombuffer(
        (full_data / "MNIST/raw/t10k-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8
    )
    labels = assert_wire_equals_direct(stub, images, singles=2000)
    assert (labels == truth).mean() >= 0.99


def test_answer_names_the_model_and_its_times(stub: Any) -> None:
    response = stub.Classify(pixels(IMAGE * 3))
    model = stub.GetModel(digits_pb2.GetModelRequest())
    assert response.model == model.model
    assert response.model.execution_provider == "CPUExecutionProvider"
    assert response.timing.batch_images >= 3
    assert response.timing.inference_us > 0
    assert list(model.labels) == [str(digit) for digit in range(10)]
    assert model.model.sha256 in model.manifest_json


def test_oversize_request_is_split_and_rejoined_in_order(
    stub: Any, sample: dict[str, np.ndarray]
) -> None:
    images = np.resize(sample["images"], (4096, 28, 28))
    response = stub.Classify(pixels(images.tobytes()), timeout=60)
    digits = [p.digit for p in response.predictions]
    assert len(digits) == 4096
    assert digits[:500] == digits[500:1000] == digits[3500:4000]
    assert np.mean(digits[:500] == sample["labels"]) > 0.99


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (digits_pb2.ClassifyRequest(), "input", "input: expected pixels or encoded, got neither"),
        (pixels(b""), "pixels", "pixels: expected 1 to 4096 images, got 0"),
        (pixels(b"x" * 785), "pixels",
         "pixels: expected a multiple of 784 bytes, got 785 bytes"),
        (pixels(IMAGE * 4097), "pixels", "pixels: expected 1 to 4096 images, got 4097"),
        (encoded(), "encoded.files", "encoded.files: expected 1 to 4096 images, got 0"),
        (encoded(b"GIF89a"), "encoded.files[0]",
         ("encoded.files[0]: expected a PNG, JPEG, WebP or BMP file, got 6 bytes of GIF; convert "
          "it to PNG")),
    ],
)  # fmt: skip
def test_bad_request_is_refused_naming_field_expected_and_got(
    stub: Any, request_: Any, field: str, message: str
) -> None:
    error = refused(stub.Classify, request_)
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)
    [violation] = rich_detail(error, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == (field, message)


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x05ab", b"\x12\x02\x0a\x09"])
def test_malformed_message_is_invalid(channel: grpc.Channel, data: bytes) -> None:
    call = channel.unary_unary(f"/{SERVICE}/Classify")
    error = refused(call, data)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == (
        "request: expected a serialised ClassifyRequest, got malformed bytes"
    )


def test_message_over_the_limit_is_refused_alike(stub: Any) -> None:
    error = refused(stub.Classify, pixels(bytes(6_000_000)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max (6000005 vs. 4259840)" in error.details()


def test_malformed_get_model_is_invalid_and_counted(
    server: RunningServer, channel: grpc.Channel
) -> None:
    before = handled(server, "INVALID_ARGUMENT", "GetModel")
    error = refused(channel.unary_unary(f"/{SERVICE}/GetModel"), b"\xff\xff")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "request: expected a serialised GetModelRequest, got malformed bytes"
    wait_until(lambda: handled(server, "INVALID_ARGUMENT", "GetModel") == before + 1)


# The last one is no item, but would be a good request of Classify.
@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff",
        b"",
        b"\x0a\x02\x0a\x09",
        pixels(IMAGE).SerializeToString() + b"\x98\x06\x01",
    ],
)
def test_malformed_item_of_a_stream_is_answered_in_place(
    channel: grpc.Channel, data: bytes
) -> None:
    good = digits_pb2.ClassifyStreamRequest(request=pixels(IMAGE)).SerializeToString()
    call = channel.stream_stream(f"/{SERVICE}/ClassifyStream")
    answers = [
        digits_pb2.ClassifyStreamResponse.FromString(answer)
        for answer in call(iter([good, data, good]), timeout=30)
    ]
    assert [answer.WhichOneof("result") for answer in answers] == ["response", "error", "response"]
    assert answers[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


@pytest.mark.parametrize("count", [300, 1000, 4096])
def test_stream_of_large_items_is_not_refused_by_its_own_queue(stub: Any, count: int) -> None:
    answers = list(stub.ClassifyStream(stream_of([pixels(IMAGE * count)] * 12), timeout=60))
    assert [len(answer.response.predictions) for answer in answers] == [count] * 12


def test_transparent_paper_is_background(stub: Any) -> None:
    seven = Image.open(SAMPLES / "7.png").convert("L")
    cut_out = Image.new("RGBA", seven.size, "white")
    cut_out.putalpha(seven)
    buffer = io.BytesIO()
    cut_out.save(buffer, "PNG")
    assert stub.Classify(encoded(buffer.getvalue())).predictions[0].digit == 7


def test_compressed_text_inside_an_image_is_not_unfolded(stub: Any) -> None:
    text = PngInfo()
    for number in range(40):
        text.add_text(f"bomb {number}", "x" * 1_000_000, zip=True)
    buffer = io.BytesIO()
    Image.open(SAMPLES / "7.png").save(buffer, "PNG", pnginfo=text)
    assert stub.Classify(encoded(buffer.getvalue())).predictions[0].digit == 7


def test_unknown_fields_beside_the_pixels_are_ignored(channel: grpc.Channel) -> None:
    call = channel.unary_unary(f"/{SERVICE}/Classify")
    request = pixels(IMAGE).SerializeToString() + b"\x98\x06\x01"  # field 99, a later version's
    response = digits_pb2.ClassifyResponse.FromString(call(request))
    assert len(response.predictions) == 1


def test_image_files_are_decoded_in_order(stub: Any) -> None:
    files = [(SAMPLES / f"{digit}.png").read_bytes() for digit in range(10)]
    response = stub.Classify(encoded(*files))
    assert [p.digit for p in response.predictions] == list(range(10))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_each_format_is_decoded(stub: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "seven"
    Image.open(SAMPLES / "7.png").save(path, kind)
    assert stub.Classify(encoded(path.read_bytes())).predictions[0].digit == 7


def test_truncated_image_is_refused(stub: Any) -> None:
    error = refused(stub.Classify, encoded((SAMPLES / "7.png").read_bytes()[:-60]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_bad_request_does_not_harm_its_neighbours(stub: Any, sample: dict[str, np.ndarray]) -> None:
    good = sample["images"][:64]
    expected = sample["labels"][:64]
    futures = []
    for image in good:
        futures.append(stub.Classify.future(pixels(image.tobytes())))
        futures.append(stub.Classify.future(pixels(b"bad")))
    digits = [future.result().predictions[0].digit for future in futures[::2]]
    assert np.mean(digits == expected) > 0.95
    assert {future.code() for future in futures[1::2]} == {grpc.StatusCode.INVALID_ARGUMENT}


def test_gzip_request_is_understood(stub: Any) -> None:
    response = stub.Classify(pixels(IMAGE), compression=grpc.Compression.Gzip)
    assert len(response.predictions) == 1


def test_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    error = refused(channel.unary_unary(f"/{SERVICE}/Nothing"), b"")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_health_tells_liveness_and_readiness(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        response = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    error = refused(health.Check, health_pb2.HealthCheckRequest(service="nothing"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [response] = stub.ServerReflectionInfo(iter([request]))
    names = {service.name for service in response.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_stream_answers_in_order_and_a_bad_item_in_place(
    stub: Any, sample: dict[str, np.ndarray]
) -> None:
    requests = [pixels(image.tobytes()) for image in sample["images"][:100]]
    requests[40] = pixels(b"bad")
    answers = list(stub.ClassifyStream(stream_of(requests), timeout=60))
    assert len(answers) == 100
    error = answers.pop(40).error
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert error.message.startswith("pixels: expected a multiple of 784")
    digits = [answer.response.predictions[0].digit for answer in answers]
    assert np.mean(digits == np.delete(sample["labels"][:100], 40)) > 0.95


def test_stream_that_the_caller_leaves_does_not_block_the_next(stub: Any) -> None:
    endless = threading.Event()

    def requests() -> Iterator[Any]:
        yield from stream_of([pixels(IMAGE)] * 3)
        endless.wait(30)

    stream = stub.ClassifyStream(requests())
    next(stream)
    stream.cancel()
    endless.set()
    assert len(list(stub.ClassifyStream(stream_of([pixels(IMAGE)] * 5), timeout=30))) == 5


def test_streams_that_are_left_in_the_middle_of_an_answer_do_not_harm_the_server(
    server: RunningServer,
) -> None:
    """The server closes their generators after their RPCs are gone."""
    for _ in range(30):
        with grpc.insecure_channel(server.address) as channel:
            stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
            stream = stub.ClassifyStream(stream_of([pixels(IMAGE * 64)] * 20))
            next(stream)
            stream.cancel()
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        assert len(list(stub.ClassifyStream(stream_of([pixels(IMAGE)] * 5), timeout=30))) == 5
    assert server.process.poll() is None


def test_slow_reader_holds_a_bounded_number_of_items(server: RunningServer) -> None:
    """The server takes no more requests than its window while nobody reads the answers."""
    # Without these the client itself would take megabytes of answers that nobody asked it for.
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    total = 600
    large = pixels(IMAGE * 256)
    taken = []

    def requests() -> Iterator[Any]:
        for number in range(total):
            taken.append(number)
            yield digits_pb2.ClassifyStreamRequest(request=large)

    with grpc.insecure_channel(server.address, options=narrow) as channel:
        stream = digits_pb2_grpc.DigitClassifierServiceStub(channel).ClassifyStream(requests())
        next(stream)
        settled = [0, -1]
        while settled[-1] != settled[-2]:
            threading.Event().wait(0.3)
            settled.append(len(taken))
        assert settled[-1] < 0.9 * total
        assert sum(1 for _ in stream) == total - 1


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_metrics_count_exactly_what_was_sent(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    # Of its own: what other tests cancelled may be counted at any time.
    server = start_server(f"--transport={transport}")
    with grpc.insecure_channel(server.address) as channel:
        count_exactly(server, digits_pb2_grpc.DigitClassifierServiceStub(channel))


def count_exactly(server: RunningServer, stub: Any) -> None:
    before = scrape(server)
    ok, invalid = handled(server, "OK"), handled(server, "INVALID_ARGUMENT")
    streams = handled(server, "OK", "ClassifyStream", "bidi_stream")
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda n: stub.Classify(pixels(IMAGE * n)), [1, 2, 5, 100] * 10))
    for _ in range(3):
        refused(stub.Classify, pixels(b"bad"))
    list(stub.ClassifyStream(stream_of([pixels(IMAGE)] * 4)))
    # A call is counted a moment after its answer left.
    wait_until(lambda: handled(server, "OK") - ok == 40)
    wait_until(lambda: handled(server, "OK", "ClassifyStream", "bidi_stream") == streams + 1)
    wait_until(
        lambda: scrape(server)["digits_images_total"] - before["digits_images_total"] == 1084
    )
    after = scrape(server)
    assert handled(server, "OK") - ok == 40
    assert handled(server, "INVALID_ARGUMENT") - invalid == 3
    grown = {name: after[name] - before[name] for name in after if name in before}
    assert grown["digits_images_total"] == 1080 + 4
    assert grown["digits_batch_size_sum"] == 1080 + 4
    assert grown["digits_queue_seconds_count"] == 44
    labels = f'grpc_method="Classify",grpc_service="{SERVICE}",grpc_type="unary"'
    assert grown[f"grpc_server_started_total{{{labels}}}"] == 43
    assert grown[f"grpc_server_handling_seconds_count{{{labels}}}"] == 43
    assert after["digits_queue_images"] == 0


def test_every_series_is_there_before_the_first_call(
    start_server: Callable[..., RunningServer],
) -> None:
    series = scrape(start_server())
    for code in grpc.StatusCode:
        assert any(f'grpc_code="{code.name}"' in name for name in series)
    for refusal in set(Refusal) - {Refusal.INVALID}:
        assert series[f'digits_requests_dropped_total{{reason="{refusal.value}"}}'] == 0
    for kind in ("tls", "tokens"):
        for result in ("loaded", "refused"):
            labels = f'kind="{kind}",result="{result}"'
            assert series[f"digits_credential_loads_total{{{labels}}}"] == 0
    assert series['digits_model_loads_total{result="loaded"}'] == 1
    assert any(name.startswith("digits_model_info{") for name in series)
    assert any(name.startswith("digits_transport_info{") for name in series)
    assert series["digits_images_total"] == 0


def test_http_port_answers_nothing_but_metrics_health_and_status(server: RunningServer) -> None:
    def status(path: Any, method: str = "GET") -> Any:
        request = urllib.request.Request(server.http + path, method=method)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/metrics") == status("/healthz") == status("/livez") == status("/") == 200
    assert status("/v1/classify") == status("/draw") == status("/metrics/../../etc/passwd") == 404
    assert status("/metrics", "POST") == 405
