"""ModelInfer's messages: from a request to pixels, and from predictions to a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from digits.oip import inference_pb2
from digits.v1 import digits_pb2
from service import wire
from service.oip.tensors import IMAGE, INPUTS, OUTPUTS, Datatype, Output
from service.status import InvalidRequestError, NotServedError

# What of a caller's own words goes into a message.
MAX_QUOTED = 64
FORMS = ((28, 28), (1, 28, 28), (784,))
INPUT = "inputs[0]"


@dataclass(frozen=True)
class Infer:
    """A ModelInfer request that holds what it should.

    Attributes:
        pixels: 784 bytes an image.
        count: Number of images.
        version: The one asked for; empty for any.
        outputs: What is asked for, in this order.
        is_raw: Whether the answer's values are to be raw, as the request's are.
        response: Has what comes back as it came.
    """

    pixels: bytes
    count: int
    version: str
    outputs: Sequence[Output]
    is_raw: bool
    response: inference_pb2.ModelInferResponse


def parse(kind: type[Any], message: bytes) -> Any:
    """A request of any kind.

    Raises:
        InvalidRequestError: If it is malformed.
    """
    try:
        return kind.FromString(message)
    except DecodeError:
        expected = f"a serialised {kind.DESCRIPTOR.name}"
        raise InvalidRequestError("request", expected, "malformed bytes") from None


def check_model(ref: digits_pb2.ModelRef, name: str, version: str, prefix: str = "") -> None:
    """Holds a request to the model in service.

    Args:
        ref: The model in service.
        name: What was asked for.
        version: What was asked for; empty for any.
        prefix: Of the fields' names.

    Raises:
        NotServedError: If it is another one.
        InvalidRequestError: If the version is no number.
    """
    if name != ref.name:
        raise NotServedError(f"{prefix}name", ref.name, _quoted(name))
    if version in ("", ref.version):
        return
    if not (version.isascii() and version.isdecimal()):
        raise InvalidRequestError(f"{prefix}version", "a number or nothing", _quoted(version))
    raise NotServedError(
        f"{prefix}version", f"{ref.version}, which is in service", version[:MAX_QUOTED]
    )


def read_infer(message: bytes, ref: digits_pb2.ModelRef, max_images: int) -> Infer:
    """Reads a request.

    Args:
        message: Serialised ModelInferRequest.
        ref: The model in service.
        max_images: Images in one request at most.

    Raises:
        InvalidRequestError: Naming what is wrong.
    """
    request = parse(inference_pb2.ModelInferRequest, message)
    check_model(ref, request.model_name, request.model_version, "model_")
    if len(request.inputs) != 1:
        raise InvalidRequestError("inputs", "1 tensor", str(len(request.inputs)))
    (tensor,) = request.inputs
    if tensor.name != IMAGE:
        raise InvalidRequestError(f"{INPUT}.name", IMAGE, _quoted(tensor.name))
    _check_no_parameters(INPUT, tensor.parameters)
    if tensor.datatype not in INPUTS:
        raise InvalidRequestError(
            f"{INPUT}.datatype", " or ".join(INPUTS), _quoted(tensor.datatype)
        )
    datatype, ink = INPUTS[tensor.datatype]
    count = _count(tensor.shape, max_images)
    outputs = _outputs(request.outputs)
    response = inference_pb2.ModelInferResponse(id=request.id)
    for key, value in request.parameters.items():
        response.parameters[key].CopyFrom(value)
    return Infer(
        pixels=_pixels(_values(request, tensor, datatype, count), ink),
        count=count,
        version=request.model_version,
        outputs=outputs,
        is_raw=bool(request.raw_input_contents),
        response=response,
    )


def infer_response(
    infer: Infer, predictions: npt.NDArray[np.void], ref: digits_pb2.ModelRef
) -> inference_pb2.ModelInferResponse:
    """The answer to a request.

    Args:
        infer: The request.
        predictions: wire.PREDICTION[N].
        ref: What made them.

    Raises:
        NotServedError: If another version was asked for: it went out of service meanwhile.
    """
    check_model(ref, ref.name, infer.version, "model_")
    response = infer.response
    response.model_name, response.model_version = ref.name, ref.version
    for output in infer.outputs:
        datatype, shape = output.datatype, (infer.count, *output.dims)
        tensor = response.outputs.add(name=output.name, datatype=datatype.name, shape=shape)
        values = predictions[output.source].astype(datatype.raw)
        if infer.is_raw:
            response.raw_output_contents.append(values.tobytes())
        else:
            getattr(tensor.contents, datatype.field).extend(values.ravel().tolist())
    return response


def _count(shape: Sequence[int], max_images: int) -> int:
    if tuple(shape[1:]) not in FORMS:
        expected = "[N,28,28], [N,1,28,28] or [N,784]"
        raise InvalidRequestError(f"{INPUT}.shape", expected, str(list(shape[:8])))
    if not 1 <= shape[0] <= max_images:
        raise InvalidRequestError(f"{INPUT}.shape", f"1 to {max_images} images", str(shape[0]))
    return shape[0]


def _outputs(requested: Sequence[Any]) -> Sequence[Output]:
    outputs = []
    for index, tensor in enumerate(requested):
        output = OUTPUTS.get(tensor.name)
        if output is None or output in outputs:
            expected = f"{' or '.join(OUTPUTS)}, once"
            raise InvalidRequestError(f"outputs[{index}].name", expected, _quoted(tensor.name))
        _check_no_parameters(f"outputs[{index}]", tensor.parameters)
        outputs.append(output)
    return outputs or list(OUTPUTS.values())


def _check_no_parameters(field: str, parameters: Any) -> None:
    """Refuses what would mean something else were it heeded, such as shared memory."""
    for key in parameters:
        raise InvalidRequestError(f"{field}.parameters", "none", _quoted(key))


def _values(request: Any, tensor: Any, datatype: Datatype, count: int) -> npt.NDArray[Any]:
    """The tensor's values, flat, from where they are."""
    wanted = count * wire.IMAGE_BYTES
    raw = request.raw_input_contents
    if not raw:
        return _typed_values(tensor.contents, datatype, wanted)
    if tensor.HasField("contents"):
        raise InvalidRequestError(f"{INPUT}.contents", "none beside raw_input_contents", "some")
    if len(raw) != 1:
        raise InvalidRequestError("raw_input_contents", "1 element, as of inputs", str(len(raw)))
    size = wanted * datatype.raw.itemsize
    if len(raw[0]) != size:
        expected, got = f"{size} bytes by datatype and shape", f"{len(raw[0])} bytes"
        raise InvalidRequestError("raw_input_contents[0]", expected, got)
    return np.frombuffer(raw[0], datatype.raw)


def _typed_values(contents: Any, datatype: Datatype, wanted: int) -> npt.NDArray[Any]:
    for field, _ in contents.ListFields():
        if field.name != datatype.field:
            raise InvalidRequestError(f"{INPUT}.contents", datatype.field, field.name)
    typed = getattr(contents, datatype.field)
    if len(typed) != wanted:
        expected, got = f"{wanted} values by shape", str(len(typed))
        raise InvalidRequestError(f"{INPUT}.contents.{datatype.field}", expected, got)
    return np.fromiter(typed, datatype.typed, wanted)


def _pixels(values: npt.NDArray[Any], ink: int) -> bytes:
    """One byte a value, 255 where it is ``ink``."""
    if values.dtype == np.uint8:
        return values.tobytes()
    is_sound = (values >= 0) & (values <= ink)  # not of NaN
    if not is_sound.all():
        index = int(is_sound.argmin())
        expected = f"values from 0 (background) to {ink} (ink)"
        raise InvalidRequestError(INPUT, expected, f"{values[index]:g} at {index}")
    if ink == 1:
        values = np.rint(values * np.float32(255))
    return values.astype(np.uint8).tobytes()


def _quoted(text: str) -> str:
    return repr(text[:MAX_QUOTED])
