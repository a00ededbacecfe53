"""The stability index, its window, and the reference that an artifact carries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from digits.v1 import digits_pb2_grpc
from service.artifact.errors import ArtifactError
from service.artifact.format import load_artifact
from service.artifact.reference import (
    BOUNDS,
    Observed,
    Reference,
    observe,
    read_reference,
    write_reference,
)
from service.serving.engine import Engine
from service.telemetry.drift import MIN_IMAGES, PART_S, PARTS, Window, stability_index
from tests.calls import pixels, scrape
from tests.conftest import REPOSITORY, RunningServer, wait_until
from training.data import load_split

CHANGED = 0.25
UNCHANGED = 0.1


class Clock:
    """Stands still unless it is told to move."""

    now = 1000.0

    def __call__(self) -> Any:
        return self.now


def answers(digits: Any) -> Observed:
    """Images that differ in the digit that was answered alone."""
    number = len(digits)
    sure, ink = np.full(number, 0.99), np.full(number, 0.1)
    return Observed(np.asarray(digits), sure, sure, ink)


EVEN = np.arange(5000) % 10


@pytest.fixture
def reference() -> Reference:
    return Reference(BOUNDS, answers(EVEN).counts())


@pytest.fixture(scope="module")
def artifact() -> Any:
    return load_artifact(REPOSITORY / "2")


@pytest.fixture(scope="module")
def variant(artifact: Any) -> Any:
    return artifact.variants["int8"]


@pytest.fixture(scope="module")
def index(variant: Any) -> Callable[..., Any]:
    """What each feature's index says about images, once a window is full of them."""
    engine = Engine(variant.model)

    def of(images: np.ndarray) -> Any:
        window = Window(variant.reference)
        for chunk in np.array_split(images, max(1, len(images) // 64)):
            window.add(observe(chunk, *engine.answer(chunk)))
        return window.stability()

    return of


@pytest.fixture(scope="module")
def digits(sample: dict[str, np.ndarray]) -> np.ndarray:
    """2,000 test digits; the committed ones, each four times."""
    return np.concatenate([sample["images"]] * 4)


def test_index_is_what_its_definition_says() -> None:
    """Worked by hand: shares 3/4 and 1/4 against 1/4 and 3/4, without the half images."""
    many = 10**9
    found = stability_index(np.array([3 * many, many]), np.array([many, 3 * many]))
    assert found == pytest.approx(0.5 * math.log(3) * 2, rel=1e-6)
    assert stability_index(np.array([5, 5]), np.array([500, 500])) == pytest.approx(0, abs=1e-12)
    assert math.isfinite(stability_index(np.array([0, 9]), np.array([9, 0])))


def test_observed_is_what_was_sent_and_answered() -> None:
    images = np.zeros((2, 28, 28), np.uint8)
    images[1] = 51
    answers = np.zeros((2, 10), np.float32)
    answers[0, [3, 7]] = 0.75, 0.25
    answers[1, 9] = 1
    seen = observe(images, answers, np.array([0.5, 1], np.float32))
    assert seen.digit.tolist() == [3, 9]
    assert seen.confidence.tolist() == [0.75, 1]
    assert seen.is_digit.tolist() == [0.5, 1]
    assert seen.ink.tolist() == [0, 0.2]
    assert all(count.sum() == 2 for count in seen.counts().values())


def test_test_digits_have_not_drifted(index: Callable[..., Any], digits: np.ndarray) -> None:
    assert max(index(digits).values()) < UNCHANGED


def test_all_test_digits_of_mnist_have_not_drifted(
    index: Callable[..., Any], full_data: Path
) -> None:
    images = load_split("mnist", "test", full_data).images.numpy()
    assert max(index(images).values()) < UNCHANGED / 5
    for half in np.array_split(images, 2):  # other writers, and still digits
        assert max(index(half).values()) < UNCHANGED


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        pytest.param(lambda images: 255 - images, "ink", id="inverted"),
        pytest.param(lambda images: np.roll(images, 5, axis=2), "confidence", id="shifted"),
        pytest.param(np.zeros_like, "digit", id="blank"),
        pytest.param(lambda images: images // 2, "ink", id="dim"),
    ],
)
def test_other_input_has_drifted(
    change: Any, feature: str, index: Callable[..., Any], digits: np.ndarray
) -> None:
    assert index(change(digits))[feature] > CHANGED


def test_window_says_nothing_before_it_holds_enough(reference: Reference) -> None:
    window = Window(reference, Clock())
    for images in (MIN_IMAGES - 1, 1):
        assert all(map(math.isnan, window.stability().values()))
        window.add(answers(EVEN[:images]))
    assert window.images == MIN_IMAGES
    assert max(window.stability().values()) < UNCHANGED


def test_window_forgets_what_is_older_than_its_parts(reference: Reference) -> None:
    clock = Clock()
    window = Window(reference, clock)
    window.add(answers(np.zeros(50_000, int)))
    assert window.stability()["digit"] > CHANGED
    for _ in range(PARTS):
        clock.now += PART_S
        window.add(answers(EVEN[:MIN_IMAGES]))
    assert window.images == PARTS * MIN_IMAGES
    assert window.stability()["digit"] < UNCHANGED


def test_window_of_a_quiet_server_reaches_back_until_it_holds_enough(reference: Reference) -> None:
    clock = Clock()
    window = Window(reference, clock)
    for _ in range(100):
        clock.now += 10 * PART_S
        window.add(answers(EVEN[:200]))
    assert PARTS * MIN_IMAGES >= window.images > (PARTS - 1) * MIN_IMAGES


def test_reference_with_other_buckets_is_compared_with_those() -> None:
    bounds = BOUNDS | {"digit": (4,)}
    window = Window(Reference(bounds, answers(EVEN).counts(bounds)))
    window.add(answers(EVEN % 5 * 2))  # as many below five as before, six tenths
    found = window.stability()["digit"]
    assert found == pytest.approx(0.1 * math.log(0.6 / 0.5) - 0.1 * math.log(0.4 / 0.5), rel=1e-3)


def test_reference_reads_back(variant: Any) -> None:
    counts = variant.reference.counts
    found = read_reference(
        json.loads(json.dumps(write_reference(counts, "validation"))), "reference"
    )
    assert found.bounds == variant.reference.bounds == BOUNDS
    assert all(np.array_equal(found.counts[name], counts[name]) for name in BOUNDS)
    assert {sum(count) for count in counts.values()} == {5000}


@pytest.mark.parametrize(
    ("feature", "section", "message"),
    [
        ("ink", None, "ink: expected an object"),
        ("confidence", {"bounds": [0.9, 0.5]}, "confidence: bounds: expected ascending"),
        ("confidence", {"bounds": []}, "confidence: bounds: expected ascending"),
        ("confidence", {"bounds": ["0.5"]}, "confidence: bounds: expected ascending"),
        ("digit", {"counts": [1] * 9}, "digit: counts: expected 10, of images"),
        ("digit", {"counts": [0] * 10}, "digit: counts: expected 10, of images"),
        ("digit", {"counts": [-1] * 10}, "digit: counts: expected 10, of images"),
        ("digit", {"counts": [10**30] * 10}, "digit: counts: expected 10, of images"),
        ("digit", {"counts": [0.5] * 10}, "digit: counts: expected 10, of images"),
        ("digit", {"counts": "0123456789"}, "digit: counts: expected 10, of images"),
    ],
    ids=str,
)
def test_reference_of_another_form_is_refused_by_name(
    feature: str, section: Any, message: str, variant: Any
) -> None:
    spoilt = write_reference(variant.reference.counts, "validation")
    spoilt[feature] = section and spoilt[feature] | section
    with pytest.raises(ArtifactError, match=message):
        read_reference(spoilt, "reference")


def test_reference_that_is_no_object_is_refused() -> None:
    with pytest.raises(ArtifactError, match="reference: expected an object"):
        read_reference([], "reference")


def send(server: RunningServer, request: Any, times: int = 1) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        for _ in range(times):
            stub.Classify(request)


def test_server_shows_drift_once_it_has_seen_enough(
    start_server: Callable[..., RunningServer], digits: np.ndarray
) -> None:
    server = start_server()
    send(server, pixels(digits[:1999].tobytes()))
    wait_until(lambda: scrape(server)["digits_drift_window_images"] == 1999)
    assert all(math.isnan(psi(server, feature)) for feature in BOUNDS)
    send(server, pixels(digits[:1].tobytes()))
    wait_until(lambda: max(psi(server, feature) for feature in BOUNDS) < UNCHANGED)
    send(server, pixels(bytes(784 * 2000)))
    wait_until(lambda: min(psi(server, feature) for feature in ("digit", "ink")) > CHANGED)


def psi(server: RunningServer, feature: Any) -> Any:
    return scrape(server)[f'digits_drift_psi{{feature="{feature}"}}']
