"""Ed25519 signatures of releases, over the bytes of the manifest, and of promotions.

The manifest holds the SHA-256 of every other file, so signing it signs the release.
Nothing imports this module, which needs ``cryptography``, unless a key is given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.artifact.errors import ArtifactError, KeyFileError
from service.host.extras import not_installed

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )
    from cryptography.hazmat.primitives.serialization import (
        load_pem_private_key,
        load_pem_public_key,
    )
except ImportError as error:
    raise KeyFileError(f"signatures: {not_installed(error, 'signing')}") from None


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Reads a PEM file.

    Raises:
        KeyFileError: If it can not be read or holds anything but an Ed25519 public key.
    """
    key = _load(path, load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path}: expected an Ed25519 public key, got {type(key).__name__}")
    return key


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Reads an unencrypted PEM file.

    Raises:
        KeyFileError: If it can not be read or holds anything but an Ed25519 private key.
    """
    key = _load(path, lambda pem: load_pem_private_key(pem, password=None))
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: expected an Ed25519 private key, got {type(key).__name__}")
    return key


def _load(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise KeyFileError(f"{path}: not a usable PEM key: {error}") from None


def check_signature(key: Ed25519PublicKey, signed: bytes, signature: bytes, file: str) -> None:
    """Refuses what the key's owner has not signed.

    Args:
        key: Its public half.
        signed: What must be signed.
        signature: 64 bytes, if it is one.
        file: That holds it, for errors.

    Raises:
        ArtifactError: If the signature is another one.
    """
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        raise ArtifactError(f"{file}: not made by the required key") from None


def sign(signing_key: Path, content: bytes) -> bytes:
    """The 64 bytes of a signature.

    Args:
        signing_key: PEM file.
        content: What is signed.

    Raises:
        KeyFileError: If the key can not be used.
    """
    return load_private_key(signing_key).sign(content)
