"""What a call brings, as Python objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from digits.errors import DigitError, item_error
from digits.v1 import digits_pb2


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Attributes:
        digit: The most probable digit, 0 to 9.
        confidence: Its probability, 0 to 1.
        probabilities: float32[10], the probability of each digit.
        digit_score: How likely the image is this digit and not something else, 0 to 1; low for a
            letter, several digits or blank paper. None where the server does not tell.
    """

    digit: int
    confidence: float
    probabilities: npt.NDArray[np.float32]
    digit_score: float | None = None


@dataclass(frozen=True)
class Model:
    """The model that made an answer.

    Attributes:
        name: Name of the model.
        version: Number of the version.
        sha256: Digest of its ONNX file.
        precision: fp32 or int8.
        execution_provider: What really ran it, such as CPUExecutionProvider.
    """

    name: str
    version: str
    sha256: str
    precision: str
    execution_provider: str


@dataclass(frozen=True)
class Classification:
    """The answer to one call.

    Attributes:
        predictions: One an image, in order.
        model: What made them; of a large input, what made the last of them.
        queue_us: Microseconds in the server's queue; of several requests the longest.
        inference_us: Microseconds of inference, of all requests.
        batch_images: Images in the largest batch that held one of this call's, other callers'
            included.
        models: Everything that made one of them, in order. That is more than ``model`` only where
            the input took several requests, and these met servers with different models.
    """

    predictions: list[Prediction]
    model: Model
    queue_us: int
    inference_us: int
    batch_images: int
    models: tuple[Model, ...]

    @property
    def digits(self) -> list[int]:
        """The predicted digits, in order."""
        return [prediction.digit for prediction in self.predictions]


def item_answer(response: digits_pb2.ClassifyStreamResponse) -> Classification | DigitError:
    """An answer of a stream as Python objects."""
    if response.HasField("response"):
        return classification(response.response)
    return item_error(response.error)


def classification(response: digits_pb2.ClassifyResponse) -> Classification:
    """A response as Python objects."""
    model = served_model(response.model)
    return Classification(
        predictions=[
            Prediction(
                p.digit,
                p.confidence,
                np.array(p.probabilities, np.float32),
                p.digit_score if p.HasField("digit_score") else None,
            )
            for p in response.predictions
        ],
        model=model,
        queue_us=response.timing.queue_us,
        inference_us=response.timing.inference_us,
        batch_images=response.timing.batch_images,
        models=(model,),
    )


def joined(parts: Sequence[Classification]) -> Classification:
    """The answers to the requests of one input, at least one, as one."""
    if len(parts) == 1:
        return parts[0]
    return Classification(
        predictions=[prediction for part in parts for prediction in part.predictions],
        model=parts[-1].model,
        queue_us=max(part.queue_us for part in parts),
        inference_us=sum(part.inference_us for part in parts),
        batch_images=max(part.batch_images for part in parts),
        models=tuple(dict.fromkeys(part.model for part in parts)),
    )


def served_model(ref: digits_pb2.ModelRef) -> Model:
    """A reference to a model as a Python object."""
    return Model(ref.name, ref.version, ref.sha256, ref.precision, ref.execution_provider)
