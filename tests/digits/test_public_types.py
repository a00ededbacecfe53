"""Results and errors of every public type go to other processes, and are copied."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest

import digits.client
import digits.images
from digits.client import (
    AsyncDigitClient,
    Classification,
    ClientStateError,
    DigitClient,
    DigitError,
    Model,
    Prediction,
    Tls,
)
from digits.images import Normalised, PictureError
from tests.conftest import RunningServer

MODEL = Model("digits", "6", "ab" * 32, "int8", "CPUExecutionProvider")
PREDICTION = Prediction(7, 0.99, np.linspace(0, 1, 10, dtype=np.float32), 0.9)


def error_of_everything() -> DigitError:
    error = DigitError(grpc.StatusCode.INVALID_ARGUMENT, "pixels: expected more", "here:50051")
    error.violations = {"pixels": "expected more"}
    error.retry_after_s, error.offset = 0.25, 256
    error.unreachable_since = datetime(2026, 1, 2, tzinfo=UTC)
    error.add_note("of the caller's own")
    return error


THINGS = [
    error_of_everything(),
    ClientStateError("the client is closed"),
    PictureError("a picture", "none"),
    Classification([PREDICTION], MODEL, 10, 20, 30, (MODEL,)),
    MODEL,
    PREDICTION,
    Normalised(np.zeros((28, 28), np.uint8), 0.5),
    Tls(ca="roots.pem"),
]
AGAIN = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "oldest pickle": lambda thing: pickle.loads(pickle.dumps(thing, 0)),
    "newest pickle": lambda thing: pickle.loads(pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)),
}


def told(thing: Any) -> tuple[Any, str, dict[Any, str]]:
    return type(thing), str(thing), {name: repr(value) for name, value in vars(thing).items()}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: type(thing).__name__)
def test_results_and_errors_survive(thing: Any, again: str) -> None:
    assert told(AGAIN[again](thing)) == told(thing)


def test_no_public_type_is_forgotten() -> None:
    values = [getattr(digits.client, name) for name in digits.client.__all__]
    values += [each for each in vars(digits.images).values() if isinstance(each, type)]
    public = {each for each in values if isinstance(each, type)}
    modules = {f"digits.{name}" for name in ("answers", "channel", "errors", "formats", "images")}
    ours = {each for each in public if each.__module__ in modules}
    assert ours == {type(thing) for thing in THINGS}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("kind", [DigitClient, AsyncDigitClient])
def test_clients_say_that_they_can_not_be_copied(kind: Any, again: str) -> None:
    with pytest.raises(TypeError, match="can not be pickled or copied: make one in each process"):
        AGAIN[again](kind())


def refused(address: str) -> None:
    with DigitClient(address) as client:
        client.classify(b"nonsense")


def test_error_of_a_call_in_a_worker_process_reaches_who_waits_for_it(
    server: RunningServer,
) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        future = pool.submit(refused, server.address)
        with pytest.raises(DigitError) as caught:
            future.result(120)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(caught.value.violations) == ["encoded.files[0]"]
