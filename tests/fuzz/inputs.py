"""Where inputs come from: valid ones, and ways to spoil them."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from digits.oip import inference_pb2
from digits.v1 import digits_pb2
from service.artifact.format import Artifact, load_artifact, sha256
from service.artifact.golden import GOLDEN, PROBABILITIES
from service.artifact.repository import in_serving_order
from tests.conftest import REPOSITORY, SAMPLES

CLASSIFY_PATH = b"/digits.v1.DigitClassifierService/Classify"
STREAM_PATH = b"/digits.v1.DigitClassifierService/ClassifyStream"
INFER_PATH = b"/inference.GRPCInferenceService/ModelInfer"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# HTTP/2 frame types and flags, RFC 9113 section 6.
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EDGES = (0, 1, 0x0A, 0x12, 0x7F, 0x80, 0xFF)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Spoils a few places of ``data``."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(spoilt) + 1)
        end = min(len(spoilt), at + rng.choice((1, 2, 8, 64)))
        match rng.randrange(6):
            case 0:
                spoilt[at:end] = rng.randbytes(end - at)
            case 1:
                spoilt[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
            case 2:
                del spoilt[at:end]
            case 3:
                spoilt[at:at] = spoilt[at:end]
            case 4:
                spoilt[at:end] = bytes((rng.choice(EDGES),)) * (end - at)
            case _:
                del spoilt[at:]
    return bytes(spoilt)


def request(*images: bytes, files: tuple[bytes, ...] = ()) -> bytes:
    """A serialised ClassifyRequest of raw pixels or of image files."""
    if files:
        encoded = digits_pb2.EncodedImages(files=files)
        return digits_pb2.ClassifyRequest(encoded=encoded).SerializeToString()
    return digits_pb2.ClassifyRequest(pixels=b"".join(images)).SerializeToString()


def requests() -> list[bytes]:
    """Serialised ClassifyRequests of each kind, good and refused ones."""
    image, sample = bytes(784), (SAMPLES / "7.png").read_bytes()
    unknown_field = b"\x98\x06\x01"
    both = request(image) + request(files=(sample,))
    return [
        request(image), request(image, image), request(files=(sample,)),
        request(files=(sample, b"GIF89a")), request(b"bad"), b"", request(image) + unknown_field,
        unknown_field + request(image), both, request(*[image] * 5),
    ]  # fmt: skip


def stream_requests() -> list[bytes]:
    """Serialised ClassifyStreamRequests around the same."""
    wrapped = []
    for content in requests():
        inner = digits_pb2.ClassifyRequest.FromString(content)
        wrapped.append(digits_pb2.ClassifyStreamRequest(request=inner).SerializeToString())
    return [*wrapped, wrapped[0] + wrapped[2], wrapped[0] + b"\x98\x06\x01"]


def infer_requests() -> list[bytes]:
    """Serialised ModelInferRequests of each datatype, raw and typed, good and refused ones."""
    messages = []
    for datatype, dtype, field in (
        ("UINT8", "u1", "uint_contents"), ("FP32", "<f4", "fp32_contents"),
        ("INT8", "i1", "int_contents"),
    ):  # fmt: skip
        values = np.zeros((2, 28, 28), dtype)
        for is_raw in (True, False):
            request = inference_pb2.ModelInferRequest(model_name="digits", id="7")
            tensor = request.inputs.add(name="image", datatype=datatype, shape=values.shape)
            if is_raw:
                request.raw_input_contents.append(values.tobytes())
            else:
                getattr(tensor.contents, field).extend(values.ravel().tolist())
            request.outputs.add(name="digit")
            messages.append(request.SerializeToString())
    return messages


def image_files() -> list[bytes]:
    """A digit in every format and mode that the server reads, and one of another size."""
    seven = Image.open(SAMPLES / "7.png").convert("L")
    kinds: list[tuple[str, str, dict[str, object]]] = [
        *(("PNG", mode, {}) for mode in ("L", "1", "P", "LA", "RGB", "RGBA", "I;16")),
        *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
        ("JPEG", "RGB", {"progressive": True}),
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [seven.convert("RGB")]}),
        *(("BMP", mode, {}) for mode in ("L", "1", "P", "RGB")),
    ]  # fmt: skip
    return [
        *(_file(seven.convert(mode), kind, options) for kind, mode, options in kinds),
        _file(seven.resize((56, 40)), "PNG", {}),
    ]


def _file(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def repair_png(data: bytes) -> bytes:
    """The same with right checksums, so that what is wrong gets past them; other files as given."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    repaired, at = bytearray(data), len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data):
            break
        struct.pack_into(">I", repaired, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(repaired)


def served_artifact() -> Artifact:
    """The committed artifact that serves."""
    return load_artifact(in_serving_order(REPOSITORY)[0])


def manifest_with(artifact: Artifact, **contents: bytes) -> bytes:
    """Its manifest, with the hashes of other contents of ``model`` and ``golden``."""
    manifest = json.loads(artifact.manifest_json)
    if "model" in contents:
        manifest["variants"]["fp32"]["sha256"] = sha256(contents["model"])
    if "golden" in contents:
        manifest["files"][GOLDEN] = sha256(contents["golden"])
    return json.dumps(manifest).encode()


def npy_members(artifact: Artifact) -> dict[str, bytes]:
    """The members of its golden.npz, as .npy files."""
    golden, members = artifact.golden, {}
    answers = {PROBABILITIES.format(name): each for name, each in golden.probabilities.items()}
    arrays: dict[str, np.ndarray] = {"images": golden.images, "labels": golden.labels, **answers}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        members[f"{name}.npy"] = buffer.getvalue()
    return members


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload


def conversation(path: bytes, messages: list[bytes], *, zipped: bool = False) -> list[bytes]:
    """The frames of a connection that makes one call with the given messages."""
    fields = (
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"fuzz"),
        (b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"grpc-timeout", b"5S"),
        (b"grpc-encoding", b"gzip" if zipped else b"identity"),
    )  # fmt: skip
    # HPACK literals without indexing, RFC 7541 section 6.2.2.
    block = b"".join(
        b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields
    )
    contents = [gzip.compress(message) for message in messages] if zipped else messages
    parts = [bytes((zipped,)) + len(part).to_bytes(4, "big") + part for part in contents]
    return [
        frame(SETTINGS, 0, 0, b""),
        frame(HEADERS, END_HEADERS, 1, block),
        *(frame(DATA, 0, 1, part) for part in parts[:-1]),
        frame(DATA, END_STREAM, 1, parts[-1]),
    ]


def spoilt_conversation(rng: random.Random) -> bytes:
    """The bytes of a connection: frames of the right form that say wrong things, or garbage."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(200))
    path, seeds = rng.choice(
        (
            (CLASSIFY_PATH, requests),
            (STREAM_PATH, stream_requests),
            (INFER_PATH, infer_requests),
        )
    )
    message = rng.choice(seeds())
    copies = [message] * rng.choice((1, 1, 3))
    frames = conversation(path, copies, zipped=rng.random() < 0.2)
    spoil: list[Callable[[random.Random, list[bytes]], None]] = [
        _spoil_header, _spoil_payload, _shuffle, _insert_frame
    ]  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 5))):
        rng.choice(spoil)(rng, frames)
    data = PREFACE + b"".join(frames)
    return mutate(rng, data) if rng.random() < 0.2 else data


def _spoil_header(rng: random.Random, frames: list[bytes]) -> None:
    at = rng.randrange(len(frames))
    frames[at] = mutate(rng, frames[at][:9])[:9].ljust(9, b"\0") + frames[at][9:]


def _spoil_payload(rng: random.Random, frames: list[bytes]) -> None:
    at = rng.randrange(len(frames))
    kind, flags = frames[at][3:5]
    stream = int.from_bytes(frames[at][5:9], "big")
    frames[at] = frame(kind, flags, stream, mutate(rng, frames[at][9:]))


def _shuffle(rng: random.Random, frames: list[bytes]) -> None:
    frames.append(rng.choice(frames))
    rng.shuffle(frames)


def _insert_frame(rng: random.Random, frames: list[bytes]) -> None:
    payload = rng.randbytes(rng.choice((0, 4, 5, 8, 100)))
    odd = frame(rng.randrange(12), rng.randrange(256), rng.choice((0, 1, 2, 3)), payload)
    frames.insert(rng.randrange(len(frames) + 1), odd)
