"""The files of a release, and their verification.

A release is a folder ``<repository>/<N>/`` with a model for each precision, golden digits and the
gate's report. ``manifest.json`` holds the SHA-256 of all of them, and a detached signature may
stand beside it. See docs/artifact.md.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.artifact.errors import ArtifactError
from service.artifact.golden import GOLDEN, MAX_GOLDEN_BYTES, Golden, read_golden
from service.artifact.reference import Reference, read_reference
from service.host.files import read_regular

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
PARITY = "parity.json"
SIGNATURE = "manifest.sig"
PRECISIONS = ("fp32", "int8")

OPSET = 20
INPUT: dict[str, Any] = {"name": "image", "dtype": "uint8", "shape": ["batch", 28, 28]}
# The last one only of models that were trained to tell what is no digit.
OUTPUTS = ("logits", "probabilities", "is_digit")
LABELS = 10
MAX_LABEL = 64
# Many times what the exporter writes: whoever can write to the repository must not be able to fill
# the memory of the servers that read it.
MAX_MODEL_BYTES = 256 * 2**20
MAX_BYTES = {
    GOLDEN: MAX_GOLDEN_BYTES,
    PARITY: 16 * 2**20,
    MANIFEST: 4 * 2**20,
    SIGNATURE: 4096,
}
# The key without which no tensor has its data in another file, however the entry is serialised.
EXTERNAL_DATA = b"location"
# Reading fails with one of these because of the file. All other errors, such as of too many open
# files, of the disk or of a network volume, say nothing about the release.
ERRORS_OF_A_FILE = (
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG,
)  # fmt: skip
MANIFEST_FIELDS = (
    "name", "version", "variants", "files", "labels", "input", "opset", "training", "dataset",
    "comparison", "tools", "source_commit", "created",
)  # fmt: skip
VARIANT_FIELDS = ("sha256", "accuracy", "parity", "reference")


def model_file(precision: str) -> str:
    """The name of a variant's file."""
    return f"model.{precision}.onnx"


@dataclass(frozen=True)
class Variant:
    """The model of a release in one precision.

    Attributes:
        precision: One of ``PRECISIONS``.
        model: The bytes of its file.
        sha256: Their digest.
        accuracy: What the manifest says of it.
        reference: What drift is measured against.
    """

    precision: str
    model: bytes
    sha256: str
    accuracy: dict[str, Any]
    reference: Reference


@dataclass(frozen=True)
class Artifact:
    """One verified release.

    Attributes:
        manifest: The parsed manifest.
        manifest_json: The same, word for word.
        variants: By precision.
        golden: The golden digits.
    """

    manifest: dict[str, Any]
    manifest_json: str
    variants: Mapping[str, Variant]
    golden: Golden

    @property
    def version(self) -> str:
        """The number of the release, in text."""
        return str(self.manifest["version"])

    @property
    def labels(self) -> tuple[str, ...]:
        """The class labels, in the order of the probabilities."""
        return tuple(self.manifest["labels"])

    @property
    def is_published(self) -> bool:
        """Whether it was judged fit to serve; otherwise it serves only where it is asked for."""
        return bool(self.manifest["comparison"]["publish"])

    def first_of(self, precisions: Sequence[str]) -> Variant:
        """The variant in the first of these precisions that there is one of."""
        return next(self.variants[name] for name in precisions if name in self.variants)


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def load_artifact(folder: Path, public_key: Path | None = None) -> Artifact:
    """Reads a release and verifies all that can be verified without running it.

    Args:
        folder: The release.
        public_key: PEM file of the key that must have signed it; None asks for no signature.

    Raises:
        ArtifactError: Naming the first thing that is wrong.
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
    contents = {name: _read_hashed(folder / name, manifest["files"]) for name in (GOLDEN, PARITY)}
    variants = {
        precision: _read_variant(folder, precision, manifest["variants"][precision])
        for precision in PRECISIONS
        if precision in manifest["variants"]
    }
    golden = read_golden(contents[GOLDEN], list(variants))
    return Artifact(manifest, manifest_json, variants, golden)


def _check_signature(manifest: bytes, folder: Path, public_key: Path) -> None:
    # Here, because it needs an extra.
    from service.artifact.signature import check_signature, load_public_key  # noqa: PLC0415

    key = load_public_key(public_key)
    check_signature(key, manifest, _read(folder / SIGNATURE), SIGNATURE)


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
    require("opset", OPSET, manifest["opset"])
    require("input", INPUT, manifest["input"])
    _check_labels(manifest["labels"])
    if not isinstance(manifest["files"], dict):
        raise ArtifactError(f"{MANIFEST}: files: expected an object")
    _check_variants(manifest["variants"])
    _check_comparison(manifest["comparison"])


def _check_labels(labels: Any) -> None:
    """Labels reach callers' terminals and pages: short, printable, and told apart."""
    if (
        not isinstance(labels, list)
        or len(labels) != LABELS
        or not all(isinstance(label, str) and label.isprintable() for label in labels)
        or not all(0 < len(label) <= MAX_LABEL for label in labels)
        or len(set(labels)) != LABELS
    ):
        expected = f"{LABELS} different printable texts of 1 to {MAX_LABEL} characters"
        raise ArtifactError(f"{MANIFEST}: labels: expected {expected}")


def _check_variants(variants: Any) -> None:
    expected = f"an object of one or both of {', '.join(PRECISIONS)}"
    if not isinstance(variants, dict) or not variants or not variants.keys() <= set(PRECISIONS):
        got = list(variants) if isinstance(variants, dict) else type(variants).__name__
        raise ArtifactError(f"{MANIFEST}: variants: expected {expected}, got {got}")
    for precision, variant in variants.items():
        fields = variant if isinstance(variant, dict) else {}
        if missing := [field for field in VARIANT_FIELDS if field not in fields]:
            raise ArtifactError(f"{MANIFEST}: variants: {precision}: missing {', '.join(missing)}")


def _check_comparison(comparison: Any) -> None:
    fields = comparison if isinstance(comparison, dict) else {}
    kinds = {"publish": bool, "reasons": list, "measures": list}
    if wrong := [name for name, kind in kinds.items() if not isinstance(fields.get(name), kind)]:
        raise ArtifactError(f"{MANIFEST}: comparison: missing or malformed: {', '.join(wrong)}")


def _read_variant(folder: Path, precision: str, section: dict[str, Any]) -> Variant:
    name = model_file(precision)
    model = _read_hashed(folder / name, {name: section["sha256"]})
    if EXTERNAL_DATA in model:
        raise ArtifactError(f"{name}: external data: expected all weights in the file")
    reference = read_reference(section["reference"], f"{MANIFEST}: {precision}: reference")
    return Variant(precision, model, section["sha256"], section["accuracy"], reference)


def _read_hashed(path: Path, hashes: dict[str, Any]) -> bytes:
    data = _read(path)
    expected, got = hashes.get(path.name), sha256(data)
    if got != expected:
        raise ArtifactError(f"{path.name}: expected sha256 {expected}, got {got}")
    return data


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_BYTES.get(path.name, MAX_MODEL_BYTES))
    except OSError as error:
        if error.errno in ERRORS_OF_A_FILE:
            raise ArtifactError(f"{path.name}: {error.strerror}") from None
        raise
