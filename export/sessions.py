"""Ways to run a model: as it serves, with other options, in a fresh process, and in PyTorch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.artifact.format import INPUT
from service.serving.engine import CPU_PROVIDER, IS_DIGIT, PROBABILITIES, session_options

# Runs of each model that are timed: turns, and runs in a turn.
TIMED_TURNS, RUNS_A_TURN = 12, 6

Images = npt.NDArray[np.uint8]
Result = TypeVar("Result")
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outputs:
    """What a model answered.

    Attributes:
        logits: float32[N, 10].
        probabilities: float32[N, 10].
        is_digit: float32[N]; 1 of a model that was not trained to tell.
    """

    logits: Floats
    probabilities: Floats
    is_digit: Floats

    @property
    def not_finite(self) -> int:
        """How many values are NaN or infinite."""
        parts = (self.logits, self.probabilities, self.is_digit)
        return int(sum(np.count_nonzero(~np.isfinite(part)) for part in parts))

    @property
    def decisions(self) -> npt.NDArray[np.int64]:
        """int64[N], the digit with the highest logit."""
        return np.asarray(self.logits.argmax(axis=1))


def serving_session(model: bytes) -> ort.InferenceSession:
    """A session with the options that serve."""
    return ort.InferenceSession(model, session_options(1), providers=[CPU_PROVIDER])


def run_session(session: ort.InferenceSession, images: Images, batch_size: int = 64) -> Outputs:
    """Runs images uint8[N, 28, 28] in batches."""
    batches = range(0, len(images), batch_size)
    names = [output.name for output in session.get_outputs()]
    parts = [
        session.run(names, {INPUT["name"]: images[start : start + batch_size]}) for start in batches
    ]
    found = dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))
    is_digit = found.get(IS_DIGIT, np.ones((len(images), 1), np.float32))
    return Outputs(found["logits"], found[PROBABILITIES], is_digit[:, 0])


def images_per_s(models: Sequence[bytes], images: Images) -> list[float]:
    """The rate of each model, in turns, by its fastest run: noise only ever makes runs slower.

    A turn is several runs long, as each model serves alone and has the caches to itself.

    Args:
        models: Serialised.
        images: One batch, uint8[N, 28, 28].
    """
    sessions = [serving_session(model) for model in models]
    fastest = [math.inf] * len(models)
    for _ in range(TIMED_TURNS):
        for number, session in enumerate(sessions):
            for _ in range(RUNS_A_TURN):
                began = time.perf_counter()
                run_session(session, images)
                fastest[number] = min(fastest[number], time.perf_counter() - began)
    return [len(images) / seconds for seconds in fastest]


def digest(outputs: Outputs) -> str:
    """Hex digest of every bit of the answers."""
    parts = (outputs.logits, outputs.probabilities, outputs.is_digit)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def session_digest(model: bytes, images: Images) -> str:
    """The digest of what a new session answers."""
    return digest(run_session(serving_session(model), images))


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The function's result in a new interpreter, which shares nothing with this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
