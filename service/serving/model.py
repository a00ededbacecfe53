"""The model in service, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.serving.request import IMAGE_SIDE

if TYPE_CHECKING:
    from service.artifact.format import Artifact, Variant
    from service.serving.engine import Engine


class Answers(NamedTuple):
    """What a model says of N images.

    Attributes:
        probabilities: float32[N, 10], of each digit; their sum is 1.
        is_digit: float32[N], the probability that the image is a digit at all; 1 where the model
            was not trained to tell.
    """

    probabilities: npt.NDArray[np.float32]
    is_digit: npt.NDArray[np.float32]


@dataclass(frozen=True)
class ServedModel:
    """A verified, warmed-up model.

    Attributes:
        name: Of the repository that it is from.
        artifact: The release.
        variant: The model of it that serves.
        provider: The execution provider that runs it.
        engine: What runs it.
        batch_seconds: Size of a batch to its duration on one slot, measured at warm-up.
        encoded: Answers that describe it, made once, under a key of whoever made them.
    """

    name: str
    artifact: Artifact
    variant: Variant
    provider: str
    engine: Engine
    batch_seconds: Mapping[int, float]
    encoded: dict[Any, bytes] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def version(self) -> str:
        """The number of the release, in text."""
        return self.artifact.version

    @property
    def sha256(self) -> str:
        """Of the model file."""
        return self.variant.sha256

    @property
    def precision(self) -> str:
        """``fp32`` or ``int8``."""
        return self.variant.precision


class Predictions:
    """The predictions of one batch.

    Attributes:
        probabilities: float32[N, 10].
        is_digit: float32[N], see ``Answers``.
        model: What made them.
        encoded: Bytes that were made of them once for all requests of the batch, under a key of
            whoever made them.
    """

    __slots__ = ("encoded", "is_digit", "model", "probabilities")

    def __init__(self, answers: Answers, model: ServedModel) -> None:
        self.probabilities, self.is_digit = answers
        self.model = model
        self.encoded: dict[Any, Any] = {}

    def scores(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """How likely each of some images is the digit that it is taken for, float32[count]."""
        rows = slice(first, first + count)
        scores: npt.NDArray[np.float32]
        scores = np.maximum.reduce(self.probabilities[rows], axis=1) * self.is_digit[rows]
        return scores


class ModelRunner:
    """Runs batches on the model in service.

    Attributes:
        model: The model in service, or None while loading.
    """

    def __init__(self) -> None:
        self.model: ServedModel | None = None

    def serve(self, model: ServedModel) -> None:
        """Runs ``model`` from the next batch on."""
        self.model = model

    def run(self, pixels: bytes | memoryview, count: int) -> Predictions:
        """Classifies ``count`` images of 784 bytes, back to back."""
        model = self.model
        if model is None:
            raise RuntimeError("a batch before a model; this is a bug")
        images = np.frombuffer(pixels, np.uint8).reshape(count, IMAGE_SIDE, IMAGE_SIDE)
        return Predictions(model.engine.answer(images), model)
