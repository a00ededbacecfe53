"""The files of a model version, and their verification.

A version is a folder ``<repository>/<N>/`` with the files below; ``manifest.json`` holds the
SHA-256 of every other one, and a detached signature may stand beside it. See docs/artifact.md.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.artifact.reference import BOUNDS, Counts, Reference
from service.host.files import read_regular

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
PARITY = "parity.json"
SIGNATURE = "manifest.sig"
FILES = (MODEL, GOLDEN, PARITY)

OPSET = 20
INPUT: dict[str, Any] = {"name": "image", "dtype": "uint8", "shape": ["batch", 28, 28]}
OUTPUTS = ("logits", "probabilities")
PRECISIONS = ("fp32", "int8")
LABELS = [str(digit) for digit in range(10)]
MIN_GOLDEN = 32
# Unpacked, many times what the exporter writes. A small zip can unfold into any size.
MAX_GOLDEN_BYTES = 4 * 2**20
# Many times what the exporter writes: whoever can write to the repository must not be able to fill
# the memory of the servers that read it.
MAX_BYTES = {
    MODEL: 256 * 2**20,
    GOLDEN: MAX_GOLDEN_BYTES,
    PARITY: 16 * 2**20,
    MANIFEST: 4 * 2**20,
    SIGNATURE: 4096,
}
# How an entry of TensorProto.external_data begins in a serialised model: {key: "location", value:
EXTERNAL_DATA = b"\n\x08location\x12"
# Kernels differ between CPUs (AVX2, AVX-512) in the last bits; far below what a caller can see.
# In int8 such a bit can round an activation to the next integer.
GOLDEN_TOLERANCE = {"fp32": 1e-5, "int8": 0.02}
# Reading fails with one of these because of the file. All other errors, such as of too many open
# files, of the disk or of a network volume, say nothing about the version.
ERRORS_OF_A_FILE = (
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG,
)  # fmt: skip
MANIFEST_FIELDS = (
    "name", "version", "precision", "files", "labels", "input", "opset", "training", "dataset",
    "accuracy", "parity", "tools", "source_commit", "created",
)  # fmt: skip


class ArtifactError(RuntimeError):
    """An artifact does not hold what it promises; the message says which and why."""


class KeyFileError(RuntimeError):
    """A key for signatures can not be used; the message says which and why."""


@dataclass(frozen=True)
class Golden:
    """Digits whose answers are known.

    Attributes:
        images: uint8[N, 28, 28].
        labels: int64[N], the digits that must be predicted.
        probabilities: float32[N, 10], what the exported model answered.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]

    def check(self, answered: npt.NDArray[np.float32], precision: str) -> None:
        """Compares probabilities float32[N, 10] with the expected ones.

        Args:
            answered: What a model says.
            precision: Its precision, which decides how near is near enough.

        Raises:
            ArtifactError: If a label differs, or a probability by more than the tolerance.
        """
        wrong = int((answered.argmax(axis=1) != self.labels).sum())
        if wrong:
            raise ArtifactError(f"golden digits: {wrong} of {len(self.labels)} labels are wrong")
        with np.errstate(invalid="ignore"):  # infinity expected and got: not a number, refused
            error = float(np.abs(answered - self.probabilities).max())
        tolerance = GOLDEN_TOLERANCE[precision]
        if not error <= tolerance:
            raise ArtifactError(
                f"golden digits: expected probabilities within {tolerance:g}, "
                f"got a difference of {error:g}"
            )


@dataclass(frozen=True)
class Artifact:
    """One verified version.

    Attributes:
        manifest: The parsed manifest.
        manifest_json: The same, word for word.
        model: The bytes of model.onnx.
        golden: The golden digits.
        reference: What drift is measured against; None when the version was written without.
    """

    manifest: dict[str, Any]
    manifest_json: str
    model: bytes
    golden: Golden
    reference: Reference | None

    @property
    def version(self) -> str:
        """The version, a number in text."""
        return str(self.manifest["version"])

    @property
    def precision(self) -> str:
        """One of ``PRECISIONS``."""
        return str(self.manifest["precision"])


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def load_artifact(folder: Path, public_key: Path | None = None) -> Artifact:
    """Reads a version and verifies all that can be verified without running it.

    Args:
        folder: The version.
        public_key: PEM file of the key that must have signed it; None asks for no signature.

    Raises:
        ArtifactError: Naming the first thing that does not hold.
        KeyFileError: If the key itself can not be used.
        OSError: If a file can not be read for a reason that is not its own.
    """
    signed = _read(folder / MANIFEST)
    if public_key is not None:
        _check_signature(signed, folder, public_key)
    manifest_json = signed.decode("utf-8", errors="replace")
    try:
        manifest = json.loads(manifest_json, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST}: not JSON: {error}") from None
    _check_manifest(manifest, folder.name)
    contents = {name: _read(folder / name) for name in FILES}
    for name, data in contents.items():
        expected, got = manifest["files"].get(name), sha256(data)
        if got != expected:
            raise ArtifactError(f"{name}: expected sha256 {expected}, got {got}")
    if EXTERNAL_DATA in contents[MODEL]:
        raise ArtifactError(f"{MODEL}: external data: expected all weights in the file")
    golden = read_golden(contents[GOLDEN])
    reference = read_reference(manifest["reference"]) if "reference" in manifest else None
    return Artifact(manifest, manifest_json, contents[MODEL], golden, reference)


def _check_signature(manifest: bytes, folder: Path, public_key: Path) -> None:
    # Here, because it needs an extra.
    from service.artifact.signature import check_signature, load_public_key  # noqa: PLC0415

    key = load_public_key(public_key)
    check_signature(key, manifest, _read(folder / SIGNATURE))


def _check_manifest(manifest: Any, version: str) -> None:
    def require(field: str, expected: Any, got: Any) -> None:
        if got != expected:
            raise ArtifactError(f"{MANIFEST}: {field}: expected {expected!r}, got {got!r}")

    if not isinstance(manifest, dict):
        raise ArtifactError(f"{MANIFEST}: expected an object, got {type(manifest).__name__}")
    require("schema_version", SCHEMA_VERSION, manifest.get("schema_version"))
    missing = [field for field in MANIFEST_FIELDS if field not in manifest]
    if missing:
        raise ArtifactError(f"{MANIFEST}: missing {', '.join(missing)}")
    require("version", version, str(manifest["version"]))
    if manifest["precision"] not in PRECISIONS:
        expected = ", ".join(PRECISIONS)
        got = manifest["precision"]
        raise ArtifactError(f"{MANIFEST}: precision: expected one of {expected}, got {got!r}")
    require("opset", OPSET, manifest["opset"])
    require("input", INPUT, manifest["input"])
    require("labels", LABELS, manifest["labels"])
    if not isinstance(manifest["files"], dict):
        raise ArtifactError(f"{MANIFEST}: files: expected an object")


def write_reference(counts: Counts, images: str) -> dict[str, Any]:
    """The manifest's ``reference``.

    Args:
        counts: Images in each bucket of each feature.
        images: Which they were.
    """
    features = {
        name: {"bounds": list(BOUNDS[name]), "counts": counts[name].tolist()} for name in BOUNDS
    }
    return {"images": images, **features}


def read_reference(section: Any) -> Reference:
    """The inverse of ``write_reference``.

    Raises:
        ArtifactError: If a feature is missing, its bounds do not ascend, or it counts no images.
    """
    if not isinstance(section, dict):
        raise ArtifactError(f"{MANIFEST}: reference: expected an object")
    bounds, counts = {}, {}
    for name in BOUNDS:
        where = f"{MANIFEST}: reference: {name}"
        feature = section.get(name)
        if not isinstance(feature, dict):
            raise ArtifactError(f"{where}: expected an object")
        found: Any = feature.get("bounds")
        if not _numbers(found, (int, float)) or not found or sorted(set(found)) != found:
            raise ArtifactError(f"{where}: bounds: expected ascending numbers")
        bounds[name] = tuple(found)
        found = feature.get("counts")
        if not _numbers(found, (int,)) or len(found) != len(bounds[name]) + 1 or not sum(found):
            raise ArtifactError(f"{where}: counts: expected {len(bounds[name]) + 1}, of images")
        counts[name] = np.array(found, np.int64)
    return Reference(bounds, counts)


def _numbers(found: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(found, list) and all(
        type(number) in kinds and 0 <= number < 2**53 for number in found
    )


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_BYTES[path.name])
    except OSError as error:
        if error.errno in ERRORS_OF_A_FILE:
            raise ArtifactError(f"{path.name}: {error.strerror}") from None
        raise


def write_golden(golden: Golden) -> bytes:
    """The bytes of golden.npz; equal content gives equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, images=golden.images, labels=golden.labels, probabilities=golden.probabilities)
    return buffer.getvalue()


def read_golden(data: bytes) -> Golden:
    """Parses golden.npz.

    Raises:
        ArtifactError: If arrays are missing, or of another type, shape or number.
    """
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "images": (np.uint8, (28, 28)),
        "labels": (np.int64, ()),
        "probabilities": (np.float32, (10,)),
    }
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            unpacked = sum(member.file_size for member in arrays.zip.infolist())
            if unpacked > MAX_GOLDEN_BYTES:
                raise ValueError(f"expected {MAX_GOLDEN_BYTES} bytes at most, got {unpacked}")
            # A member that is no array comes as its bytes.
            loaded = {name: np.asarray(arrays[name]) for name in expected}
        count = len(loaded["labels"])
    # numpy and zipfile raise many types on damaged files, MemoryError for too large a shape.
    except Exception as error:
        raise ArtifactError(f"{GOLDEN}: unreadable: {error}") from None
    for name, (dtype, shape) in expected.items():
        array = loaded[name]
        if array.dtype != dtype or array.shape != (count, *shape):
            got = f"{array.dtype}{list(array.shape)}"
            raise ArtifactError(f"{GOLDEN}: {name}: expected {dtype.__name__}, got {got}")
    if count < MIN_GOLDEN:
        raise ArtifactError(f"{GOLDEN}: expected at least {MIN_GOLDEN} digits, got {count}")
    return Golden(loaded["images"], loaded["labels"], loaded["probabilities"])
