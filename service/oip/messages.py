"""ModelInfer's messages: from a request to pixels, and from predictions to a response."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from digits.oip import inference_pb2
from service.oip.tensors import IMAGE, INPUTS, OUTPUTS, Datatype, Output
from service.rpc.codec import as_field, parse
from service.serving.model import Predictions, ServedModel
from service.serving.request import IMAGE_BYTES, InvalidInputError

# What of a caller's own words goes into a message.
MAX_QUOTED = 64
FORMS = ((28, 28), (1, 28, 28), (784,))
INPUT = "inputs[0]"
# Of what a response repeats of its request.
MAX_ECHOED_BYTES = 1024
# ModelInferResponse.raw_output_contents.
RAW_OUTPUT_CONTENTS = 6
ALL_OUTPUTS = tuple(OUTPUTS.values())


@dataclass(frozen=True, slots=True)
class Infer:
    """A valid ModelInfer request.

    Attributes:
        pixels: 784 bytes an image.
        count: Number of images.
        version: The one asked for; empty for any.
        outputs: What is asked for, in this order.
        is_raw: Whether the answer's values are to be raw, as the request's are.
        echoed: Serialised fields of the response that come back as they came.
    """

    pixels: bytes
    count: int
    version: str
    outputs: tuple[Output, ...]
    is_raw: bool
    echoed: bytes


def check_model(model: ServedModel, name: str, version: str, prefix: str = "") -> None:
    """Holds a request to the model in service.

    Args:
        model: The model in service.
        name: What was asked for.
        version: What was asked for; empty for any.
        prefix: Of the fields' names.

    Raises:
        InvalidInputError: ``not_served`` if it is another one; if the version is no number.
    """
    if name != model.name:
        raise InvalidInputError(f"{prefix}name", model.name, _quoted(name), not_served=True)
    if version in ("", model.version):
        return
    if not (version.isascii() and version.isdecimal()):
        raise InvalidInputError(f"{prefix}version", "a number or nothing", _quoted(version))
    expected, got = f"{model.version}, which is in service", version[:MAX_QUOTED]
    raise InvalidInputError(f"{prefix}version", expected, got, not_served=True)


def read_infer(message: bytes, model: ServedModel, max_images: int) -> Infer:
    """Reads a request.

    Args:
        message: Serialised ModelInferRequest.
        model: The model in service.
        max_images: Images in one request at most.

    Raises:
        InvalidInputError: Naming what is wrong.
    """
    request = parse(inference_pb2.ModelInferRequest, message)
    check_model(model, request.model_name, request.model_version, "model_")
    if len(request.inputs) != 1:
        raise InvalidInputError("inputs", "1 tensor", str(len(request.inputs)))
    (tensor,) = request.inputs
    if tensor.name != IMAGE:
        raise InvalidInputError(f"{INPUT}.name", IMAGE, _quoted(tensor.name))
    _check_no_parameters(INPUT, tensor.parameters)
    if tensor.datatype not in INPUTS:
        raise InvalidInputError(f"{INPUT}.datatype", " or ".join(INPUTS), _quoted(tensor.datatype))
    datatype, ink = INPUTS[tensor.datatype]
    count = _count(tensor.shape, max_images)
    outputs = _outputs(request.outputs) if request.outputs else ALL_OUTPUTS
    return Infer(
        pixels=_pixels(_values(request, tensor, datatype, count), ink),
        count=count,
        version=request.model_version,
        outputs=outputs,
        is_raw=bool(request.raw_input_contents),
        echoed=_echoed(request) if request.id or request.parameters else b"",
    )


def _echoed(request: Any) -> bytes:
    """The response's fields that repeat the request's, within a bound: answers may wait long."""
    response = inference_pb2.ModelInferResponse(id=request.id)
    for key, value in request.parameters.items():
        response.parameters[key].CopyFrom(value)
    echoed = response.SerializeToString()
    if len(echoed) > MAX_ECHOED_BYTES:
        expected = f"at most {MAX_ECHOED_BYTES} bytes together"
        raise InvalidInputError("id, parameters", expected, f"{len(echoed)} bytes")
    return echoed


def infer_response(infer: Infer, result: Predictions, first: int) -> bytes:
    """The serialised ModelInferResponse to a request.

    Args:
        infer: The request.
        result: Holds its predictions.
        first: Where they begin.

    Raises:
        InvalidInputError: If another version was asked for, which went out of service meanwhile.
    """
    model = result.model
    check_model(model, model.name, infer.version, "model_")
    head = _response_head(model.name, model.version, infer.outputs, infer.count)
    last = first + infer.count
    values = [output.values(result)[first:last] for output in infer.outputs]
    if infer.is_raw:
        raw = [as_field(RAW_OUTPUT_CONTENTS, value.tobytes()) for value in values]
        return b"".join((head, infer.echoed, *raw))
    response = inference_pb2.ModelInferResponse.FromString(head + infer.echoed)
    for output, tensor, value in zip(infer.outputs, response.outputs, values, strict=True):
        getattr(tensor.contents, output.datatype.field).extend(value.ravel().tolist())
    return response.SerializeToString()


@functools.lru_cache(maxsize=256)
def _response_head(name: str, version: str, outputs: tuple[Output, ...], count: int) -> bytes:
    """What answers to as many images of a model have in common."""
    response = inference_pb2.ModelInferResponse(model_name=name, model_version=version)
    for output in outputs:
        response.outputs.add(
            name=output.name, datatype=output.datatype.name, shape=(count, *output.dims)
        )
    return response.SerializeToString()


def _count(shape: Sequence[int], max_images: int) -> int:
    if tuple(shape[1:]) not in FORMS:
        expected = "[N,28,28], [N,1,28,28] or [N,784]"
        raise InvalidInputError(f"{INPUT}.shape", expected, str(list(shape[:8])))
    if not 1 <= shape[0] <= max_images:
        raise InvalidInputError(f"{INPUT}.shape", f"1 to {max_images} images", str(shape[0]))
    return shape[0]


def _outputs(requested: Sequence[Any]) -> tuple[Output, ...]:
    outputs: list[Output] = []
    for index, tensor in enumerate(requested):
        output = OUTPUTS.get(tensor.name)
        if output is None or output in outputs:
            expected = f"{' or '.join(OUTPUTS)}, once"
            raise InvalidInputError(f"outputs[{index}].name", expected, _quoted(tensor.name))
        _check_no_parameters(f"outputs[{index}]", tensor.parameters)
        outputs.append(output)
    return tuple(outputs)


def _check_no_parameters(field: str, parameters: Any) -> None:
    """Rejects parameters, which would change the meaning of the tensor: shared memory, for one."""
    for key in parameters:
        raise InvalidInputError(f"{field}.parameters", "none", _quoted(key))


def _values(request: Any, tensor: Any, datatype: Datatype, count: int) -> npt.NDArray[Any]:
    """The tensor's values, flat, from where they are."""
    wanted = count * IMAGE_BYTES
    raw = request.raw_input_contents
    if not raw:
        return _typed_values(tensor.contents, datatype, wanted)
    if tensor.HasField("contents"):
        raise InvalidInputError(f"{INPUT}.contents", "none beside raw_input_contents", "some")
    if len(raw) != 1:
        raise InvalidInputError("raw_input_contents", "1 element, as of inputs", str(len(raw)))
    size = wanted * datatype.raw.itemsize
    if len(raw[0]) != size:
        expected, got = f"{size} bytes by datatype and shape", f"{len(raw[0])} bytes"
        raise InvalidInputError("raw_input_contents[0]", expected, got)
    return np.frombuffer(raw[0], datatype.raw)


def _typed_values(contents: Any, datatype: Datatype, wanted: int) -> npt.NDArray[Any]:
    for field, _ in contents.ListFields():
        if field.name != datatype.field:
            raise InvalidInputError(f"{INPUT}.contents", datatype.field, field.name)
    typed = getattr(contents, datatype.field)
    if len(typed) != wanted:
        expected, got = f"{wanted} values by shape", str(len(typed))
        raise InvalidInputError(f"{INPUT}.contents.{datatype.field}", expected, got)
    return np.fromiter(typed, datatype.typed, wanted)


def _pixels(values: npt.NDArray[Any], ink: int) -> bytes:
    """One byte a value, 255 where it is ``ink``."""
    if values.dtype == np.uint8:
        return values.tobytes()
    is_sound = (values >= 0) & (values <= ink)  # not of NaN
    if not is_sound.all():
        index = int(is_sound.argmin())
        expected = f"values from 0 (background) to {ink} (ink)"
        raise InvalidInputError(INPUT, expected, f"{values[index]:g} at {index}")
    if ink == 1:
        values = np.rint(values * np.float32(255))
    return values.astype(np.uint8).tobytes()


def _quoted(text: str) -> str:
    return repr(text[:MAX_QUOTED])
