"""The model's tensors in the protocol's words, and the messages that describe them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from digits.oip import inference_pb2
from service.artifact.format import INPUT
from service.serving.model import Predictions, ServedModel

# The specification's name for an ONNX model.
PLATFORM = "onnx_onnxv1"
IMAGE = INPUT["name"]


@dataclass(frozen=True)
class Datatype:
    """A type of tensor.

    Attributes:
        name: In the protocol.
        raw: Of an element in raw contents.
        field: Of ``InferTensorContents`` that holds typed contents.
        typed: Of an element there.
    """

    name: str
    raw: np.dtype[np.generic]
    field: str
    typed: np.dtype[np.generic]


UINT8 = Datatype("UINT8", np.dtype("u1"), "uint_contents", np.dtype("u4"))
INT64 = Datatype("INT64", np.dtype("<i8"), "int64_contents", np.dtype("i8"))
FP32 = Datatype("FP32", np.dtype("<f4"), "fp32_contents", np.dtype("f4"))

# What an image tensor may be, with the value that is ink; 0 is background. FP32 ends at 1 because
# that can be held to: pixels of 0 to 255 have values above it, while pixels of 0 to 1 taken for
# those of 0 to 255 would be an all but black picture that nothing tells from a dark one.
INPUTS = {UINT8.name: (UINT8, 255), FP32.name: (FP32, 1)}


@dataclass(frozen=True)
class Output:
    """A tensor that the model gives.

    Attributes:
        name: In the protocol.
        datatype: Its type.
        dims: Its shape after the images' dimension.
        config: Its type in ModelConfig.
        values: Makes it of the predictions of a batch: a row an image.
    """

    name: str
    datatype: Datatype
    dims: tuple[int, ...]
    config: inference_pb2.DataType
    values: Callable[[Predictions], npt.NDArray[Any]]


def _probabilities(result: Predictions) -> npt.NDArray[Any]:
    return result.probabilities


def _digits(result: Predictions) -> npt.NDArray[Any]:
    digits = result.encoded.get("digits")
    if digits is None:
        digits = result.encoded["digits"] = result.probabilities.argmax(axis=1)
    array: npt.NDArray[Any] = digits
    return array


def _scores(result: Predictions) -> npt.NDArray[Any]:
    scores = result.encoded.get("scores")
    if scores is None:
        scores = result.encoded["scores"] = result.scores(0, len(result.probabilities))
    array: npt.NDArray[Any] = scores
    return array


OUTPUTS = {
    output.name: output
    for output in (
        Output("probabilities", FP32, (10,), inference_pb2.TYPE_FP32, _probabilities),
        Output("digit", INT64, (), inference_pb2.TYPE_INT64, _digits),
        Output("digit_score", FP32, (), inference_pb2.TYPE_FP32, _scores),
    )
}


def metadata(model: ServedModel) -> inference_pb2.ModelMetadataResponse:
    """What ModelMetadata says of a model. FP32 has no room in it beside UINT8."""
    tensor = inference_pb2.ModelMetadataResponse.TensorMetadata
    return inference_pb2.ModelMetadataResponse(
        name=model.name,
        versions=[model.version],
        platform=PLATFORM,
        inputs=[tensor(name=IMAGE, datatype=UINT8.name, shape=(-1, 28, 28))],
        outputs=[
            tensor(name=output.name, datatype=output.datatype.name, shape=(-1, *output.dims))
            for output in OUTPUTS.values()
        ],
    )


def config(model: ServedModel, max_images: int) -> inference_pb2.ModelConfigResponse:
    """What ModelConfig says of a model: Triton's extension, which perf_analyzer asks for."""
    return inference_pb2.ModelConfigResponse(
        config=inference_pb2.ModelConfig(
            name=model.name,
            platform=PLATFORM,
            max_batch_size=max_images,
            input=[
                inference_pb2.ModelInput(
                    name=IMAGE, data_type=inference_pb2.TYPE_UINT8, dims=(28, 28)
                )
            ],
            output=[
                inference_pb2.ModelOutput(
                    name=output.name, data_type=output.config, dims=output.dims
                )
                for output in OUTPUTS.values()
            ],
            dynamic_batching=inference_pb2.ModelDynamicBatching(),
        )
    )
