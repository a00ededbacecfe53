"""The way into the core: what is let in, what is refused, and that all of it is replied to once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.serving.batcher import Batcher
from service.serving.gate import Gate
from service.serving.model import Answers, ModelRunner
from service.serving.pictures import Pictures
from service.serving.preparing import Preparer
from service.serving.request import IMAGE_BYTES, InvalidInputError, Refusal, Request
from tests.conftest import SAMPLES
from tests.serving.core import Answered, Caller, Told, pixels

SEVEN = (SAMPLES / "7.png").read_bytes()


class Engine:
    """Says that every image is its mean."""

    def answer(self, images: np.ndarray) -> Answers:
        means = np.repeat(images.mean(axis=(1, 2)), 10).reshape(-1, 10).astype(np.float32)
        return Answers(means, np.ones(len(images), np.float32))


def model(version: str = "1", image_s: float = 20e-6) -> Any:
    return SimpleNamespace(
        engine=Engine(), version=version, batch_seconds={1: image_s, 4: 4 * image_s}
    )


class Core:
    def __init__(self, **settings: Any) -> None:
        self.told, self.answered = Told(), Answered()
        runner = ModelRunner()
        batcher = Batcher(
            runner.run, slots=2, max_batch_size=4, max_queue_images=100, listener=self.told
        )
        self.gate = Gate(
            batcher, runner, Preparer(self.told), max_images_per_request=8,
            listener=self.told, **settings,
        )  # fmt: skip

    def request(self, *images: int, deadline: Any = None) -> Request:
        return Request(pixels(*images), len(images), deadline, self.answered.reply, Caller())


def serving(**settings: Any) -> Core:
    core = Core(**settings)
    core.gate.serve(model())
    core.gate.start()
    core.gate.open()
    return core


@pytest.fixture
def core() -> Iterator[Core]:
    core = serving()
    yield core
    assert core.gate.stop(30)


def test_requests_get_what_the_model_in_service_says(core: Core) -> None:
    one, two = core.request(10), core.request(20, 30)
    core.gate.submit([one, two])
    core.answered.wait_for(2)
    assert one.result.probabilities[one.first, 0] == 10
    assert two.result.probabilities[two.first : two.first + 2, 0].tolist() == [20, 30]
    assert one.result.model is core.gate.model


def test_another_model_answers_from_the_next_batch_on_and_its_cost_counts(core: Core) -> None:
    core.gate.serve(model("2", image_s=200e-6))
    assert core.gate.batcher.image_cost_s == pytest.approx(200e-6)
    core.gate.submit([core.request(10)])
    core.answered.wait_for(1)
    assert core.answered[0].result.model.version == "2"


def test_closed_gate_refuses_with_its_reason() -> None:
    core = Core()
    early = core.request(1)
    assert (core.gate.is_open, core.gate.closed_reason) == (False, "the model is loading")
    core.gate.submit([early])
    assert (early.refusal, early.detail) == (Refusal.STOPPED, "the model is loading")
    core.gate.open()
    assert (core.gate.is_open, core.gate.closed_reason) == (True, "")
    core.gate.close("the server is draining")
    late, files = core.request(1), core.request()
    core.gate.submit([late])
    core.gate.prepare(files, Pictures([SEVEN]))
    assert {one.detail for one in (late, files)} == {"the server is draining"}
    assert core.answered == core.told.dropped == [early, late, files]


def test_what_was_admitted_is_answered_after_the_gate_closed() -> None:
    core = serving()
    requests = [core.request(n) for n in range(20)]
    core.gate.submit(requests)
    core.gate.prepare(core.request(), Pictures([SEVEN] * 3))
    core.gate.close("the server is draining")
    assert core.gate.stop(30)
    assert [one.refusal for one in core.answered] == 21 * [None]


@pytest.mark.parametrize("count", [0, 9])
def test_number_of_images_is_bounded(core: Core, count: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"^field: expected 1 to 8 images, got {count}$"):
        core.gate.check_count("field", count)
    with pytest.raises(InvalidInputError, match="expected 1 to 8 images"):
        core.gate.count_images("field", count * IMAGE_BYTES)


def test_pixels_must_be_whole_images(core: Core) -> None:
    assert core.gate.count_images("pixels", 8 * IMAGE_BYTES) == 8
    with pytest.raises(InvalidInputError) as caught:
        core.gate.count_images("pixels", 783)
    violation = caught.value.violation
    assert (violation.field, violation.got) == ("pixels", "783 bytes")
    assert violation.expected == "a multiple of 784 bytes"


def test_callers_beyond_their_rate_are_refused_and_the_others_served() -> None:
    def limit(requests: Any) -> list[Any]:
        over = [one for one in requests if one.count > 1]
        for one in over:
            one.retry_after_s = 7.0
        return over

    core = serving(rate_limit=limit)
    within, beyond, files = core.request(1), core.request(1, 2), core.request()
    core.gate.submit([within, beyond])
    files.count = 2
    core.gate.prepare(files, Pictures([SEVEN, SEVEN]))
    core.answered.wait_for(3)
    assert core.gate.stop(30)
    assert within.result is not None
    assert [one.refusal for one in (beyond, files)] == 2 * [Refusal.RATE_LIMITED]
    assert beyond.retry_after_s == 7.0
    assert core.told.dropped == [beyond, files]


def test_files_become_images_with_their_plausibility(core: Core) -> None:
    request = core.request()
    core.gate.prepare(request, Pictures([SEVEN, SEVEN]))
    core.answered.wait_for(1)
    assert (request.refusal, request.count, len(request.images)) == (None, 2, 2 * IMAGE_BYTES)
    assert request.plausibility.shape == (2,)
    assert request.plausibility.min() > 0.9
    assert request.result.probabilities.shape == (2, 10)


def test_file_that_can_not_be_read_is_named_and_no_listener_told() -> None:
    core = serving()
    request = core.request()
    core.gate.prepare(request, Pictures([SEVEN, b"nothing"], name="body.files"))
    assert core.gate.stop(30)
    assert core.answered == [request]
    assert request.refusal is Refusal.INVALID
    assert str(request.violation) == (
        "body.files[1]: expected a PNG, JPEG, WebP or BMP file, got 7 bytes of something else"
    )
    assert core.told.dropped == []


def test_threads_are_those_that_must_live(core: Core) -> None:
    assert len(core.gate.threads) == 3
    assert all(thread.is_alive() for thread in core.gate.threads)


def test_request_whose_count_is_not_known_is_charged_once_it_is() -> None:
    charged: list[Any] = []

    def limit(requests: Any) -> list[Any]:
        charged.extend(one.count for one in requests)
        return []

    core = serving(rate_limit=limit)
    core.gate.prepare(core.request(), Pictures([SEVEN, SEVEN]))
    core.answered.wait_for(1)
    assert core.gate.stop(30)
    assert charged == [2]
