"""HTTP bodies to pixels or files: ClassifyRequest as JSON, a form of files, or one image file."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from email.message import Message
from typing import Any

from aiohttp import web

from service.ops_http.app import MAX_BODY_BYTES
from service.serving.request import IMAGE_BYTES, IMAGE_SIDE, InvalidInputError

# JSON is read on the event loop, a few milliseconds for this much, unless most of it is empty lists
# and objects. The largest request that is taken has 64 images of 28 rows.
MAX_JSON_BYTES = 512 * 2**10
MAX_JSON_LISTS, MAX_JSON_OBJECTS = 4096, 64
# This port is for trying; gRPC takes thousands.
MAX_IMAGES = 64
# Of one part of a form, and the header that makes it a file.
MAX_HEADER_BYTES = 2048
FILE = re.compile(
    rb"^content-disposition:[^\r\n]*;[ \t]*filename\*?=", re.IGNORECASE | re.MULTILINE
)
EXPECTED_TYPES = "application/json, multipart/form-data or image/*"


@dataclass(frozen=True)
class Images:
    """What a request holds: one of the two.

    Attributes:
        pixels: 784 bytes an image.
        files: Image files.
    """

    pixels: bytes = b""
    files: tuple[bytes, ...] = ()


async def read_request(request: web.Request) -> Images:
    """The images of an HTTP request.

    Raises:
        InvalidInputError: If the body is not what its content type says.
        web.HTTPException: If there is too much of it, or its content type is none of ours.
    """
    kind = request.content_type
    is_json = kind == "application/json"
    if not (is_json or kind == "multipart/form-data" or kind.startswith("image/")):
        got = request.headers.get("Content-Type", "none")[:100]
        text = f"Content-Type: expected {EXPECTED_TYPES}, got {got}"
        raise web.HTTPUnsupportedMediaType(text=text)
    if "Content-Encoding" in request.headers:
        raise web.HTTPUnsupportedMediaType(text="Content-Encoding: expected none, got one")
    limit = MAX_JSON_BYTES if is_json else MAX_BODY_BYTES
    if (request.content_length or 0) > limit:
        raise too_large(limit)
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(limit) from None
    except web.RequestPayloadError:
        raise InvalidInputError("body", "a body in HTTP's framing", "a broken one") from None
    if len(body) > limit:  # its length was not declared
        raise too_large(limit)
    if is_json:
        return _from_json(body)
    if kind == "multipart/form-data":
        return Images(files=tuple(_form_files(body, request.headers["Content-Type"])))
    return Images(files=(body,))


def too_large(limit: int) -> web.HTTPRequestEntityTooLarge:
    """413, which names the limit."""
    text = f"body: expected at most {limit} bytes, got more"
    return web.HTTPRequestEntityTooLarge(limit, text=text)


def _form_files(body: bytes, content_type: str) -> list[bytes]:
    """The files of a form, whatever their fields are called.

    Found by searching for the boundary: to read such a body line by line, as libraries do, takes
    seconds for lines that are empty. Nothing may be before the first boundary.
    """
    delimiter = b"\r\n--" + _boundary(content_type)
    files: list[bytes] = []
    position = len(delimiter) - 2
    is_sound = len(delimiter) > 4 and body.startswith(delimiter[2:])
    while is_sound and not body.startswith(b"--", position):
        _check_count("encoded.files", len(files) + 1)
        head_end = body.find(b"\r\n\r\n", position, position + MAX_HEADER_BYTES)
        end = body.find(delimiter, head_end + 2)
        is_sound = head_end >= 0 and end >= 0 and body.startswith(b"\r\n", position)
        if is_sound and not FILE.search(body, position + 2, head_end):
            raise InvalidInputError("body", "a form of files only", "another field")
        files.append(body[head_end + 4 : end])
        position = end + len(delimiter)
    if not is_sound:
        raise InvalidInputError("body", "multipart/form-data", "a malformed form")
    return files


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["Content-Type"] = content_type
    return (message.get_boundary() or "").encode("utf-8", "replace")


def _from_json(body: bytes) -> Images:
    """The proto3 JSON mapping of ClassifyRequest; pixels may be numbers as well as base64."""
    if body.count(b"[") > MAX_JSON_LISTS or body.count(b"{") > MAX_JSON_OBJECTS:
        expected = f"JSON of at most {MAX_JSON_LISTS} lists and {MAX_JSON_OBJECTS} objects"
        raise InvalidInputError("body", expected, "more")
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidInputError("body", "JSON", "something else") from None
    if not isinstance(message, dict) or len(message) != 1:
        expected = 'an object with either "pixels" or "encoded"'
        raise InvalidInputError("body", expected, _named(message))
    field, value = next(iter(message.items()))
    if field == "pixels":
        return Images(pixels=_pixels(value))
    if field != "encoded":
        raise InvalidInputError("body", '"pixels" or "encoded"', "another field")
    files = value.get("files") if isinstance(value, dict) and len(value) == 1 else None
    if not isinstance(files, list):
        raise InvalidInputError("encoded", 'an object with a list "files"', _named(value))
    _check_count("encoded.files", len(files))
    return Images(
        files=tuple(_decoded(f"encoded.files[{i}]", text) for i, text in enumerate(files))
    )


def _pixels(value: Any) -> bytes:
    """Raw pixels from base64, or from rows of numbers of one image or of several."""
    pixels = _decoded("pixels", value) if isinstance(value, str) else _numbers(value)
    # What is not a multiple is refused with every other request of the kind.
    _check_count("pixels", max(1, len(pixels) // IMAGE_BYTES))
    return pixels


def _numbers(value: Any) -> bytes:
    """Rows of numbers, each of them checked: what a list holds may be anything, of any size."""
    expected = "images of 28 rows of 28 whole numbers from 0 to 255, or base64"
    if not isinstance(value, list):
        raise InvalidInputError("pixels", expected, _named(value))
    is_one = bool(value) and _is_row(value[0])
    images = [value] if is_one else value
    _check_count("pixels", len(images))
    pixels = bytearray()
    for image in images:
        if not isinstance(image, list) or len(image) != IMAGE_SIDE:
            raise InvalidInputError("pixels", expected, "something else")
        for row in image:
            if not _is_row(row) or len(row) != IMAGE_SIDE:
                raise InvalidInputError("pixels", expected, "something else")
            if min(row) < 0 or max(row) > 255:
                raise InvalidInputError("pixels", expected, "a number out of bounds")
            pixels += bytes(row)
    return bytes(pixels)


def _is_row(value: Any) -> bool:
    """Whether a value is a list of whole numbers."""
    return isinstance(value, list) and all(type(number) is int for number in value)


def _decoded(field: str, text: Any) -> bytes:
    if not isinstance(text, str):
        raise InvalidInputError(field, "base64", _named(text))
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise InvalidInputError(field, "base64", "something else") from None


def _check_count(field: str, count: int) -> None:
    if not 1 <= count <= MAX_IMAGES:
        raise InvalidInputError(field, f"1 to {MAX_IMAGES} images over HTTP", str(count))


def _named(value: Any) -> str:
    """What a JSON value is, as JSON calls it; never the value itself, which may be an image."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if isinstance(value, dict):
        return f"an object with {len(value)} fields"
    return "null" if value is None else names.get(type(value), "a number")
