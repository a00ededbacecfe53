"""The model in service, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from service.serving.request import IMAGE_SIDE

if TYPE_CHECKING:
    from service.artifact.format import Artifact
    from service.serving.engine import Engine


@dataclass(frozen=True)
class ServedModel:
    """A verified, warmed-up model.

    Attributes:
        name: Of the repository that it is from.
        version: A number in text.
        sha256: Of the model file.
        precision: ``fp32`` or ``int8``.
        provider: The execution provider that runs it.
        artifact: What was verified.
        engine: What runs it.
        batch_seconds: Size of a batch to its duration on one slot, measured at warm-up.
    """

    name: str
    version: str
    sha256: str
    precision: str
    provider: str
    artifact: Artifact
    engine: Engine
    batch_seconds: Mapping[int, float]


class Predictions:
    """The predictions of one batch.

    Attributes:
        probabilities: float32[N, 10].
        model: What made them.
        encoded: Bytes that were made of them once for all requests of the batch, under a key of
            whoever made them.
    """

    __slots__ = ("encoded", "model", "probabilities")

    def __init__(self, probabilities: npt.NDArray[np.float32], model: ServedModel) -> None:
        self.probabilities = probabilities
        self.model = model
        self.encoded: dict[Any, Any] = {}


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
        return Predictions(model.engine.run(images), model)
