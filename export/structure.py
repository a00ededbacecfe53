"""Is the file what the server and its users were promised? The graph alone, without running it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
import onnx

from export.check import Check, at_most, equal
from service.artifact.format import INPUT, OPSET, OUTPUTS

GROUP = "structure"
IR_VERSION = 10
TRAINING_OPS = frozenset({"BatchNormalization", "Dropout"})
MAX_MODEL_BYTES = 16 * 2**20
_PATH_OR_TRACE = re.compile(rb"/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+|\.py\b|Traceback")


def check_structure(model: bytes, labels: Sequence[str]) -> Iterator[Check]:
    """Everything that can be said without running the model or knowing the trained one.

    Args:
        model: Serialised.
        labels: Of its classes.
    """
    name = "onnx checker (full) and strict shape inference"
    try:
        proto = onnx.load_from_string(model)
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except Exception as error:  # the checker raises several types
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        yield Check(GROUP, name, first_line, "valid", passed=False)
        return
    yield Check(GROUP, name, "valid", "valid", passed=True)
    graph = proto.graph
    opsets = {opset.domain or "ai.onnx": opset.version for opset in proto.opset_import}
    yield equal(GROUP, "operator sets", opsets, {"ai.onnx": OPSET})
    yield equal(GROUP, "IR version", proto.ir_version, IR_VERSION)
    domains = sorted({node.domain or "ai.onnx" for node in graph.node})
    yield equal(GROUP, "operator domains", domains, ["ai.onnx"])
    inputs = [_signature(value) for value in graph.input]
    yield equal(GROUP, "input", inputs, ["image uint8[batch, 28, 28]"])
    wanted = [f"{name} float32[batch, 10]" for name in OUTPUTS[:2]]
    if len(graph.output) > len(wanted):
        wanted.append(f"{OUTPUTS[2]} float32[batch, 1]")
    yield equal(GROUP, "outputs", [_signature(v) for v in graph.output], wanted)
    external = [tensor.name for tensor in graph.initializer if tensor.external_data]
    yield equal(GROUP, "tensors stored outside the file", external, [])
    training = sorted({node.op_type for node in graph.node} & TRAINING_OPS)
    yield equal(GROUP, "training operators", training, [])
    yield equal(GROUP, "metadata", _metadata(proto), metadata(labels))
    yield equal(GROUP, "paths or stack traces", _leaks(model), [])
    yield at_most(GROUP, "bytes", len(model), MAX_MODEL_BYTES)


def metadata(labels: Sequence[str]) -> dict[str, str]:
    """What every exported file says about itself."""
    return {"input": json.dumps(INPUT), "labels": json.dumps(list(labels))}


def labels_of(proto: onnx.ModelProto) -> list[str]:
    """The labels in an exported file's metadata."""
    return list(json.loads(_metadata(proto)["labels"]))


def _metadata(proto: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def _signature(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    shape = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{value.name} {dtype}[{shape}]"


def _leaks(model: bytes) -> list[str]:
    proto = onnx.load_from_string(model)
    for tensor in proto.graph.initializer:
        tensor.raw_data = b""  # weights may look like anything
    found = _PATH_OR_TRACE.findall(proto.SerializeToString())
    return sorted({match.decode() for match in found})
