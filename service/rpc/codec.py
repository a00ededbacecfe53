"""The hot path's messages, read from and written to protobuf's wire format in bulk.

A ``ClassifyRequest`` of raw pixels is one length-delimited field, and a ``Prediction`` has the
same 56 bytes of layout whatever it says, so neither needs a message object. Everything else goes
through the generated classes. Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from digits.v1 import digits_pb2
from service.serving.model import Predictions
from service.serving.request import InvalidInputError, Request

# The tag of field 1, length-delimited.
_FIELD_1 = 0x0A
# Of a message and of those in it: an image file is one field, and 784 numbers that are not packed
# are as many.
MAX_FIELDS = 2**17
_MAX_VARINT_BYTES = 10
# A length that fits 32 bits takes at most 5 bytes as a varint.
_MAX_LENGTH_BYTES = 5

# One element of ClassifyResponse.predictions, whole: field 1, then a Prediction of 54 bytes.
PREDICTION = np.dtype(
    [
        ("header", "u1", 2),
        ("digit_tag", "u1"),
        ("digit", "u1"),
        ("confidence_tag", "u1"),
        ("confidence", "<f4"),
        ("probabilities_header", "u1", 2),
        ("probabilities", "<f4", 10),
        ("score_tag", "u1"),
        ("score", "<f4"),
    ]
)
_BLANK = np.zeros((), PREDICTION)
_BLANK["header"] = (0x0A, PREDICTION.itemsize - 2)
_BLANK["digit_tag"] = 0x08
_BLANK["confidence_tag"] = 0x15
_BLANK["probabilities_header"] = (0x1A, 40)
_BLANK["score_tag"] = 0x25
_BLANK_BYTES = _BLANK.tobytes()

# ClassifyResponse.timing: field 3, then three fixed32 fields. The one that differs between the
# calls of a batch, queue_us (field 1), comes last, so that everything before it is made once.
_TIMING_HEAD = struct.Struct("<BBBIBIB")
_TIMING_BYTES = 15
_UINT32_MAX = 2**32 - 1


def sole_field(message: bytes | memoryview) -> memoryview | None:
    """Field 1 of a message that holds nothing else, without a copy.

    That is the pixels of a ``ClassifyRequest`` and the request of a ``ClassifyStreamRequest``.

    Returns:
        A view into ``message``, or None when it is anything but one length-delimited field 1: then
        the generated class must decide.
    """
    if not message or message[0] != _FIELD_1:
        return None
    length = 0
    for position in range(1, min(len(message), 1 + _MAX_LENGTH_BYTES)):
        byte = message[position]
        length |= (byte & 0x7F) << (7 * (position - 1))
        if byte < 0x80:
            start = position + 1
            return memoryview(message)[start:] if start + length == len(message) else None
    return None


def parse(kind: type[Any], message: bytes) -> Any:
    """A request of any kind that does not hold itself.

    Raises:
        InvalidInputError: If it is malformed, or has too many fields.
    """
    _check_fields(message, kind.DESCRIPTOR)
    try:
        return kind.FromString(message)
    # The second one: text that is not UTF-8, where protobuf runs in pure Python.
    except (DecodeError, UnicodeDecodeError):
        expected = f"a serialised {kind.DESCRIPTOR.name}"
        raise InvalidInputError("request", expected, "malformed bytes") from None


def _check_fields(message: bytes, descriptor: Any) -> None:
    """Counts fields before a message is parsed: millions of empty ones hold the process a second.

    Raises:
        InvalidInputError: If there are too many.
    """
    if len(message) > MAX_FIELDS:
        try:
            left = _fields_left(message, 0, len(message), descriptor, MAX_FIELDS)
        except IndexError:  # malformed from there on: whoever parses it gets no further
            return
        if left < 0:
            expected = f"at most {MAX_FIELDS:,} fields, with repeated numbers packed"
            raise InvalidInputError("request", expected, "more")


def _fields_left(data: bytes, position: int, end: int, descriptor: Any, left: int) -> int:
    """How many of ``left`` fields are left after those of a message and of what it holds."""
    inner = {field.number: field.message_type for field in descriptor.fields if field.message_type}
    while position < end and left >= 0:
        left -= 1
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(data, position)
        elif kind == 2:
            length, position = _varint(data, position)
            held = inner.get(tag >> 3)
            if held is not None:
                left = _fields_left(data, position, min(end, position + length), held, left)
            position += length
        else:
            position += {1: 8, 5: 4}.get(kind, 0)
    return left


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends.

    Raises:
        IndexError: If it does not end.
    """
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise IndexError("a number that does not end")


def as_field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a message, of a number below 16."""
    length, varint = len(content), bytearray((number << 3 | 2,))
    while length >= 0x80:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    varint.append(length)
    return bytes(varint) + content


def encode_predictions(
    probabilities: npt.NDArray[np.float32], is_digit: npt.NDArray[np.float32]
) -> bytes:
    """Serialised predictions, 56 bytes an image; any run of them is a valid response body.

    Args:
        probabilities: float32[N, 10].
        is_digit: float32[N], the probability that the image is a digit at all.
    """
    buffer = bytearray(_BLANK_BYTES * len(probabilities))
    records = np.frombuffer(buffer, PREDICTION)
    confidence = np.maximum.reduce(probabilities, axis=1)
    records["digit"] = probabilities.argmax(axis=1)
    records["confidence"] = confidence
    records["probabilities"] = probabilities
    records["score"] = confidence * is_digit
    return bytes(buffer)


def with_plausibility(predictions: bytes, plausibility: npt.NDArray[np.float32]) -> bytes:
    """The same predictions with a ``digit_score`` that takes the picture's shape into account.

    Args:
        predictions: As ``encode_predictions`` made them.
        plausibility: float32[N], see ``digits.images.Normalised``.
    """
    records = np.frombuffer(predictions, PREDICTION).copy()
    records["score"] *= plausibility
    return records.tobytes()


@functools.lru_cache(maxsize=8)  # a server has one model, and two for a moment
def encode_model_ref(name: str, version: str, sha256: str, precision: str, provider: str) -> bytes:
    """``ClassifyResponse.model``, ready to be appended to predictions."""
    ref = digits_pb2.ModelRef(
        name=name,
        version=version,
        sha256=sha256,
        precision=precision,
        execution_provider=provider,
    )
    return digits_pb2.ClassifyResponse(model=ref).SerializeToString()


def encode_tail(model_ref: bytes, inference_s: float, batch_images: int) -> bytes:
    """What follows the predictions in a response, up to the queue time that ends it."""
    inference_us = min(int(inference_s * 1e6), _UINT32_MAX)
    return model_ref + _TIMING_HEAD.pack(
        0x1A, _TIMING_BYTES, 0x15, inference_us, 0x1D, batch_images, 0x0D
    )


def encode_queue_time(queue_s: float) -> bytes:
    """The last four bytes of a response, from seconds."""
    return min(int(queue_s * 1e6), _UINT32_MAX).to_bytes(4, "little")


def encode_response(request: Request) -> bytes:
    """The serialised ClassifyResponse to a request that has its result.

    What the requests of a batch have in common is made once, and kept with its predictions.
    """
    result = request.result
    assert result is not None
    records = result.encoded.get("records")
    if records is None:
        records = result.encoded["records"] = encode_predictions(
            result.probabilities, result.is_digit
        )
    # Of a request that was split, times are sums over several batches.
    key = (request.inference_s, request.batch_images)
    tail = result.encoded.get(key)
    if tail is None:
        tail = result.encoded[key] = encode_tail(_model_ref(result), *key)
    start = request.first * PREDICTION.itemsize
    predictions = records[start : start + request.count * PREDICTION.itemsize]
    if request.plausibility is not None:
        predictions = with_plausibility(predictions, request.plausibility)
    return b"".join((predictions, tail, encode_queue_time(request.started - request.enqueued)))


def _model_ref(result: Predictions) -> bytes:
    model = result.model
    return encode_model_ref(
        model.name, model.version, model.sha256, model.precision, model.provider
    )
