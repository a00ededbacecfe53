"""What the clients take, and how large inputs are split, sent and answered."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from digits.base_client import IN_FLIGHT
from digits.client import AsyncDigitClient, DigitClient, DigitError
from digits.inputs import MAX_FILES, classify_requests
from digits.v1 import digits_pb2, digits_pb2_grpc
from service.top.scrape import scrape
from tests.conftest import SAMPLES, RunningServer, wait_until

FILES = [SAMPLES / f"{digit}.png" for digit in range(10)]


def metric(server: Any, name: str, **labels: Any) -> Any:
    return scrape(f"{server.http}/metrics").value(name, **labels)


def blocking(address: str, images: Any, options: Any = None, **arguments: Any) -> Any:
    with DigitClient(address, **(options or {})) as client:
        return client.classify(images, **arguments)


def asynchronous(address: str, images: np.ndarray, options: Any = None, **arguments: Any) -> Any:
    async def ask() -> Any:
        async with AsyncDigitClient(address, **(options or {})) as client:
            return await client.classify(images, **arguments)

    return asyncio.run(ask())


CLIENTS = pytest.mark.parametrize("classify", [blocking, asynchronous])


def sizes(pictures: Any, images: int = 100) -> list[int]:
    """Images of each request, negative where they are files."""
    return [
        len(request.pixels) // 784 - len(request.encoded.files)
        for request in classify_requests(pictures, images)
    ]


def test_requests_are_bounded_and_of_one_form() -> None:
    array, file = np.zeros((250, 28, 28), np.uint8), FILES[0].read_bytes()
    assert sizes(array) == [100, 100, 50]
    assert sizes(list(array)) == [100, 100, 50]
    assert sizes([array, array[0], array[:3]]) == [100, 100, 54]
    assert sizes([file, array[:2], FILES[0], str(FILES[1]), array[0]]) == [-1, 2, -2, 1]
    assert sizes([file] * 100) == [-MAX_FILES, MAX_FILES - 100]
    assert sizes([file] * 7, images=3) == [-3, -3, -1]
    assert sizes([bytes(600_000)] * 3) == [-1, -1, -1]
    assert sizes(array[:0]) == sizes([]) == [0]


@pytest.mark.parametrize("thing", [17, None, object(), {"a.png": 1}, [None]])
def test_what_is_no_picture_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="images: expected"):
        sizes(thing)


SEVEN = np.array(Image.open(FILES[7]).convert("L"))
UNIT = torch.from_numpy(SEVEN) / 255
ARRAYS = {
    "784 values": SEVEN.reshape(784),
    "lists": SEVEN.tolist(),
    "flat list": SEVEN.ravel().tolist(),
    "int64": SEVEN.astype(np.int64),
    "floats to 255": SEVEN.astype(np.float64),
    "floats to 1": SEVEN / 255,
    "channel last": SEVEN[..., None],
    "tensor with axes": UNIT[None, None],
    "tensor with gradient": UNIT.clone().requires_grad_(),
    "bfloat16": UNIT.to(torch.bfloat16),
    "half": UNIT.half(),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_other_types_and_shapes_are_the_same_pixels(kind: str) -> None:
    (request,) = classify_requests(ARRAYS[kind], 9)
    got = np.frombuffer(request.pixels, np.uint8).reshape(28, 28)
    assert np.abs(got.astype(int) - SEVEN).max() <= (1 if kind == "bfloat16" else 0)


def test_booleans_are_ink() -> None:
    (request,) = classify_requests(SEVEN > 127, 9)
    assert request.pixels == ((SEVEN > 127) * np.uint8(255)).tobytes()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        ((UNIT - 0.1307) / 0.3081, "undo a normalisation"),
        (SEVEN.astype(np.int32) * 257, "divide by the largest"),
        (np.full((28, 28), np.nan), "expected values of 0 to 1"),
        (np.zeros(785), "drop a label column"),
        (np.zeros((3, 28, 28, 3)), "digits.images.normalise"),
    ],
)
def test_ambiguous_arrays_are_rejected_with_a_way_to_convert(array: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sizes(array)


@pytest.mark.parametrize("largest", [1, 15])
def test_faint_pixels_are_warned_of(largest: int) -> None:
    with pytest.warns(UserWarning, match=f"got {largest} at most in 1 of 1; multiply"):
        sizes((SEVEN > 127) * np.uint8(largest))


def test_open_file_is_told_from_a_list_of_its_lines() -> None:
    with FILES[7].open("rb") as file:
        with pytest.raises(TypeError, match=r"got BufferedReader; its read\(\) gives bytes"):
            sizes(file)
        assert sizes(bytearray(file.read())) == [-1]


MALFORMED = (
    "", " ", "127.0.0.1:", ":50051", "127.0.0.1:http", "127.0.0.1:99999", "127.0.0.1:0",
    "127.0.0.1:-1", "127.0.0.1:1 ", "127.0.0.1:1,127.0.0.1:2", "127.0.0.1:1/x", "::1:x", "[::1]x",
    "dns:///", "dns:///here:", "ipv4:127.0.0.1", "ipv4:127.0.0.1:1,", "ipv6:[::1]:0", "unix:",
)  # fmt: skip


@pytest.mark.parametrize("kind", [DigitClient, AsyncDigitClient])
@pytest.mark.parametrize("address", MALFORMED)
def test_malformed_address_is_refused(kind: Any, address: str) -> None:
    expected = f"address: expected host:port or a gRPC target, got {address!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        kind(address)


@pytest.mark.parametrize("scheme", ["http", "https", "grpc"])
def test_url_in_place_of_an_address_is_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match=f"or a gRPC target, got the URL '{scheme}://here:1'"):
        DigitClient(f"{scheme}://here:1")


WELL_FORMED = (
    "here", "here:50051", "here.example.:1", "127.0.0.1:65535", "[::1]:1", "[fe80::1%eth0]:1",
    "::1", "fe80::1%eth0", "dns:here:1", "dns:///here:1", "dns://8.8.8.8/here:1",
    "ipv4:127.0.0.1:1,127.0.0.2:2", "ipv6:[::1]:1,[::2]:2", "ipv6:%5B::1%5D:1", "unix:/run/socket",
    "unix:///run/socket", "unix-abstract:name", "xds:///here", "vsock:1:2",
)  # fmt: skip


@pytest.mark.parametrize("address", WELL_FORMED)
def test_targets_of_every_scheme_are_taken(address: str) -> None:
    DigitClient(address).close()


@CLIENTS
def test_every_kind_of_picture(
    server: RunningServer, sample: dict[str, np.ndarray], classify: Any
) -> None:
    path, image = FILES[7], Image.open(FILES[7])
    with image:
        wide = image.convert("RGB").resize((150, 90))
        kinds = [path, str(path), path.read_bytes(), image, wide, image.convert("CMYK")]
        array = np.array(image)
        assert array.shape == (28, 28)
        kinds += [array, np.stack([array, array])]
        assert classify(server.address, kinds).digits == [7] * 9
        for kind in kinds[:-1]:
            assert classify(server.address, kind).digits == [7]


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"],
)
def test_pil_image_of_every_mode(server: RunningServer, mode: str) -> None:
    with Image.open(FILES[7]) as image:
        grey = image.convert("L")
    via = {"PA": "P", "RGBa": "RGBA", "HSV": "RGB", "YCbCr": "RGB", "P": "RGB"}.get(mode)
    picture = (grey.convert(via) if via else grey).convert(mode)
    if mode in ("I", "I;16"):
        picture = Image.fromarray(np.array(grey).astype(np.uint16) * 257).convert(mode)
    assert picture.mode == mode
    assert blocking(server.address, picture).digits == [7]


def test_pil_image_of_a_photo_is_turned_as_its_file_is(
    server: RunningServer, tmp_path: Path
) -> None:
    path = tmp_path / "seven.jpg"
    with Image.open(FILES[7]) as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        turned = image.convert("L").resize((280, 280)).rotate(90)
        turned.save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        answers = [blocking(server.address, kind).predictions[0] for kind in (path, image)]
    assert [answer.digit for answer in answers] == [7, 7]


@CLIENTS
def test_large_input_is_answered_in_order_with_progress(
    server: RunningServer, sample: dict[str, np.ndarray], classify: Any
) -> None:
    images = np.concatenate([sample["images"]] * 4)
    seen: list[Any] = []
    options = {"request_images": 130}
    answer = classify(server.address, images, options, progress=seen.append)
    whole = classify(server.address, sample["images"], {"request_images": 4096})
    assert answer.digits == whole.digits * 4
    assert seen == [130] * 15 + [50]
    assert answer.models == (answer.model,)
    assert 0 < answer.batch_images <= 130 * IN_FLIGHT


class Counting(digits_pb2_grpc.DigitClassifierServiceServicer):
    """Answers when as many requests wait as are told to; the version is that of the request."""

    def __init__(self, together: Any) -> None:
        self.together = together
        self.waiting = self.most = 0
        self.changed = threading.Condition()

    def Classify(self, request: Any, context: Any) -> Any:
        with self.changed:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.together, timeout=30)
            self.waiting -= 1
        digit = request.pixels[0]
        if digit == 9:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "pixels: expected no 9")
        count = len(request.pixels) // 784
        predictions = [digits_pb2.Prediction(digit=digit)] * count
        model = digits_pb2.ModelRef(version=str(digit // 4))
        return digits_pb2.ClassifyResponse(predictions=predictions, model=model)


@pytest.fixture
def counting() -> Iterator[tuple[Counting, str]]:
    servicer = Counting(4)
    server = grpc.server(futures.ThreadPoolExecutor(16))
    digits_pb2_grpc.add_DigitClassifierServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def numbered(*numbers: Any) -> np.ndarray:
    images = np.full((len(numbers), 28, 28), 255, np.uint8)
    images[:, 0, 0] = numbers  # what ``Counting`` looks at
    return images


@CLIENTS
def test_several_requests_are_under_way_but_no_more_than_said(
    counting: tuple[Counting, str], classify: Any
) -> None:
    servicer, address = counting
    answer = classify(address, numbered(*[1] * 20), {"request_images": 1})
    assert len(answer.predictions) == 20
    assert servicer.most == 4 == IN_FLIGHT


@CLIENTS
def test_every_model_that_answered_is_told(counting: tuple[Counting, str], classify: Any) -> None:
    _, address = counting
    answer = classify(address, numbered(*range(1, 9)), {"request_images": 1})
    assert answer.digits == list(range(1, 9))
    assert [model.version for model in answer.models] == ["0", "1", "2"]
    assert answer.model == answer.models[-1]


@CLIENTS
def test_refusal_of_a_part_tells_where_it_began(
    counting: tuple[Counting, str], classify: Any
) -> None:
    _, address = counting
    with pytest.raises(DigitError, match=r"no 9 \(counted from image 6 on\)") as caught:
        classify(address, numbered(1, 1, 1, 1, 1, 1, 9, 9), {"request_images": 2})
    assert caught.value.offset == 6


def test_what_the_pictures_raise_comes_after_the_answers_before_it(
    counting: tuple[Counting, str],
) -> None:
    _, address = counting

    def pictures() -> Iterator[Any]:
        yield from numbered(1, 1, 1, 1, 2, 2)
        raise KeyError("mine")

    with DigitClient(address, request_images=4) as client:
        answers = client.classify_batches(pictures())
        counting[0].together = 2
        assert [len(next(answers).digits) for _ in range(2)] == [4, 2]
        with pytest.raises(KeyError, match="mine"):
            next(answers)


def test_pictures_are_taken_as_they_are_needed(
    server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    taken = []

    def pictures() -> Iterator[Any]:
        for image in sample["images"]:
            taken.append(1)
            yield image

    with DigitClient(server.address, request_images=10) as client:
        answers: Any = client.classify_batches(pictures())
        next(answers)
        assert len(taken) <= 10 * (IN_FLIGHT + 2)
        answers.close()
    assert len(taken) < 500


@CLIENTS
def test_calls_go_round_all_addresses(
    start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray], classify: Any
) -> None:
    servers = [start_server("--transport=grpcio") for _ in range(2)]
    target = "ipv4:" + ",".join(server.address for server in servers)
    images = sample["images"]
    assert len(classify(target, images, {"request_images": 5}).predictions) == 500
    for server in servers:
        counted = wait_until(lambda s=server: metric(s, "digits_images_total"))
        assert 150 <= counted <= 350
    servers[0].stop()
    assert len(classify(target, images, {"request_images": 5}).predictions) == 500


def test_hint_of_a_rate_limit_is_waited_for(
    start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Over its rate limit a server says when to come back, and the client waits."""
    tokens = tmp_path / "tokens"
    tokens.write_text("anna:" + "a" * 32 + "\n")
    server = start_server(
        "--transport=http2", f"--auth-token-file={tokens}", "--rate-limit-images-per-s=100"
    )
    with DigitClient(server.address, token="a" * 32, timeout_s=20) as client:
        began = time.monotonic()
        for _ in range(4):
            client.classify(sample["images"][:90])
        took_s = time.monotonic() - began
    refused = metric(server, "grpc_server_handled_total", grpc_code="RESOURCE_EXHAUSTED")
    assert took_s >= 1.6  # 360 images, the first 100 and the last 90 of them unpaid
    assert refused <= 6  # and no knocking in between


def test_deadline_that_the_hint_goes_beyond_ends_at_once(
    start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("anna:" + "a" * 32 + "\n")
    flags = f"--auth-token-file={tokens}", "--rate-limit-images-per-s=10"
    server = start_server("--transport=http2", *flags)
    with DigitClient(server.address, token="a" * 32, timeout_s=30) as client:
        client.classify(sample["images"][:20])
        began = time.monotonic()
        with pytest.raises(DigitError) as caught:
            client.classify(sample["images"][:10], timeout_s=0.4)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (caught.value.retry_after_s or 0) > 0.4
    assert time.monotonic() - began < 0.4


HINTS: dict[Any, Any] = {
    "nothing listened there": ("127.0.0.1:1", {}),
    "no such socket": ("unix:/nowhere/at/all", {}),
    "gRPC takes 443": ("127.0.0.1", {}),
    "the name has no address": ("dns:///no.such.host.invalid:1", {}),
}


@CLIENTS
def test_error_says_that_the_port_is_not_grpcs(
    classify: Any, server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    with pytest.raises(DigitError, match="that is an HTTP port"):
        classify(server.http.removeprefix("http://"), sample["images"][0])


@CLIENTS
@pytest.mark.parametrize("hint", HINTS)
def test_error_says_what_is_wrong_with_the_connection(classify: Any, hint: str) -> None:
    address, options = HINTS[hint]
    with pytest.raises(DigitError, match=hint) as caught:
        classify(address, np.zeros((28, 28), np.uint8), {"timeout_s": 20, **options})
    assert address in str(caught.value)
