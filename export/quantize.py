"""The int8 variant: static quantisation, calibrated on training images.

Weights and activations become 8-bit integers with scales that are fixed here (QDQ format, which
ONNX Runtime fuses into integer kernels). Scales computed at run time, "dynamic quantisation",
would make an answer depend on the images that share its batch.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.graph import cleaned
from export.sessions import Images
from export.structure import labels_of
from service.artifact.format import INPUT

# Training images, as they are and corrupted, that set the range of every activation.
CALIBRATION_IMAGES = 2000
CALIBRATION_BATCH = 100
# The last layer stays in float32: it is a hundredth of the work and holds the calibration of the
# probabilities. The others but Conv pass integers on.
OPERATORS = ["Conv", "Relu", "MaxPool", "Reshape", "Transpose"]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands calibration images over in batches."""

    def __init__(self, images: Images) -> None:
        starts = range(0, len(images), CALIBRATION_BATCH)
        self._batches: Iterator[Images] = iter(
            [images[start : start + CALIBRATION_BATCH] for start in starts]
        )

    def get_next(self) -> dict[str, Images] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT["name"]: batch}


def quantize_model(model: bytes, images: Images) -> bytes:
    """The int8 variant of an exported model; the same model and images give the same bytes.

    Args:
        model: The fp32 model.
        images: uint8[N, 28, 28] from the training split, never from the test split.
    """
    chosen = np.random.default_rng(0).permutation(len(images))[:CALIBRATION_IMAGES]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantiser advises to do what is done here
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, prepared, result = (
                Path(folder, name) for name in ("fp32.onnx", "prepared.onnx", "int8.onnx")
            )
            source.write_bytes(model)
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                result,
                _Reader(images[chosen]),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                # 7-bit weights: without VNNI, AVX2 kernels add pairs of products in 16 bits, which
                # 8-bit weights can overflow.
                reduce_range=True,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=OPERATORS,
                extra_options={"TensorQuantOverrides": _pixels_as_they_are(prepared)},
            )
            proto = onnx.load(result)
    finally:
        root.setLevel(level)
    kept = [opset for opset in proto.opset_import if not opset.domain]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)  # the quantiser also names domains that nothing uses
    del proto.graph.value_info[:]
    _take_pixels(proto.graph)
    labels = labels_of(onnx.load_from_string(model))
    return cleaned(proto, proto.graph.name, labels).SerializeToString(deterministic=True)


def _pixels_as_they_are(prepared: Path) -> dict[str, Any]:
    """A step of 1 for the first convolution, whatever the brightest calibration pixel is."""
    first = next(node for node in onnx.load(prepared).graph.node if node.op_type == "Conv")
    step = {"scale": np.array(1, np.float32), "zero_point": np.array(0, np.uint8)}
    return {first.input[0]: [step]}


def _take_pixels(graph: onnx.GraphProto) -> None:
    """Lets the first convolution take the pixels as they come: they are 8-bit integers already.

    With a step of 1, converting them to float32 and back changes nothing.
    """
    cast = next(node for node in graph.node if node.op_type == "Cast")
    quantize = next(
        node for node in graph.node
        if node.op_type == "QuantizeLinear" and _origin(graph, node) is cast
    )  # fmt: skip
    for removed in (cast, quantize):
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == removed.output[0]:
                    node.input[index] = removed.input[0]
        graph.node.remove(removed)


def _origin(graph: onnx.GraphProto, node: onnx.NodeProto) -> onnx.NodeProto:
    """The node that made the values, before others that only arranged them."""
    made_by = {output: each for each in graph.node for output in each.output}
    source = made_by.get(node.input[0], node)
    while source.op_type in {"Reshape", "Transpose", "Unsqueeze"}:
        source = made_by[source.input[0]]
    return source


def is_quantizable(model: bytes) -> bool:
    """Whether the model has a layer that int8 would make cheaper."""
    return any(node.op_type == "Conv" for node in onnx.load_from_string(model).graph.node)
