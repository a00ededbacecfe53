"""Releases that tests copy, change and damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from digits.client import DigitClient
from service.artifact.format import MANIFEST, load_artifact, model_file, sha256
from service.artifact.repository import in_serving_order
from service.serving.loader import ON_CPU
from tests.conftest import REPOSITORY

FP32, INT8 = model_file("fp32"), model_file("int8")


def change_manifest(folder: Path, **fields: Any) -> None:
    """Exchanges fields of a manifest."""
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file and makes the manifest agree with it."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    for precision, variant in manifest["variants"].items():
        if name == model_file(precision):
            variant["sha256"] = sha256(data)
    if name in manifest["files"]:
        manifest["files"][name] = sha256(data)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def copy_release(repository: Path, number: int, source: Path | str = "1") -> Path:
    """Adds a release with the content of another, which readers see whole or not at all.

    Args:
        repository: Where it is added.
        number: Its number.
        source: Its folder, or that of a fixture by its number.
    """
    folder = source if isinstance(source, Path) else REPOSITORY / source
    temporary = repository / f".copy-{number}"
    shutil.copytree(folder, temporary)
    change_manifest(temporary, version=number)
    temporary.rename(repository / str(number))
    return repository / str(number)


def write_keys(folder: Path) -> Path:
    """Ed25519 keys as PEM files: private.pem, its public.pem, and other.pem, public too."""
    private, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "private.pem").write_bytes(pem)
    for name, key in (("public", private), ("other", other)):
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(pem)
    return folder


def check_answers(server: Any) -> None:
    """Every golden digit must get its exact answer from a server of the fixtures."""
    release = load_artifact(in_serving_order(REPOSITORY)[0])
    with DigitClient(server.address) as client:
        answered = client.classify(release.golden.images).predictions
    probabilities = np.stack([prediction.probabilities for prediction in answered])
    precision = release.first_of(ON_CPU).precision
    release.golden.check(probabilities, release.golden.is_digit[precision], precision)
