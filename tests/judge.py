"""Chooses between readings of a picture as ``service.serving.gate`` does, without a server."""

from __future__ import annotations

from functools import cache

from digits.images import Normalised
from service.artifact.format import load_artifact
from service.serving.engine import Engine
from tests.conftest import COMMITTED


@cache
def engine(precision: str = "int8") -> Engine:
    """The committed model, on the CPU; each process opens its own."""
    return Engine(load_artifact(COMMITTED / "1").variants[precision].model)


def judge(reading: Normalised, precision: str = "int8") -> tuple[int, float]:
    """The digit that the committed model reads, and its score."""
    answers = engine(precision).answer(reading.pixels[None])
    probabilities = answers.probabilities[0]
    score = float(probabilities.max() * answers.is_digit[0]) * reading.plausibility
    return int(probabilities.argmax()), score
