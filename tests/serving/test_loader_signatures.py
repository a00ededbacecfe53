"""Releases and promotions that must be signed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.artifact import promote, sign_release
from service.artifact.errors import ArtifactError, KeyFileError
from service.artifact.format import (
    MANIFEST,
    SIGNATURE,
)
from service.artifact.repository import PROMOTED, promoted
from service.artifact.signature import load_private_key
from service.config import ServerConfig, wanted_releases
from tests.releases import FP32, copy_release, write_keys
from tests.serving.loading import load, load_one


@pytest.fixture
def key(tmp_path: Path) -> tuple[Any, Path]:
    """A new private key, and the PEM file of its public half."""
    folder = write_keys(tmp_path)
    return load_private_key(folder / "private.pem"), folder / "public.pem"


def test_required_signature_admits_what_the_key_signed(
    repository: Path, key: tuple[Any, Path]
) -> None:
    private, public_key = key
    manifest = (repository / "1" / MANIFEST).read_bytes()
    (repository / "1" / SIGNATURE).write_bytes(private.sign(manifest))
    assert load(repository, public_key=public_key)[0].version == "1"


@pytest.fixture
def signed(repository: Any, key: tuple[Any, Path], tmp_path: Path) -> tuple[Path, Any, Any]:
    """Three releases of one owner, and what opens a server's view of them."""
    signing_key, public_key = tmp_path / "private.pem", key[1]
    for number in (2, 3):
        copy_release(repository, number, repository / "1")
    for name in "123":
        sign_release(repository / name, signing_key)
    return repository, signing_key, public_key


def test_promotion_needs_its_owners_signature(signed: tuple[Path, Any, Any]) -> None:
    """Who can write to the repository can not turn a server back to an older signed release."""
    repository, signing_key, public_key = signed
    assert load(repository, public_key=public_key)[0].version == "3"
    promote(repository, 1)
    with pytest.raises(ArtifactError, match="PROMOTED: expected a signature of the required key"):
        load(repository, public_key=public_key)
    promote(repository, 1, signing_key)
    assert load(repository, public_key=public_key)[0].version == "1"
    assert load(repository)[0].version == "1", "who asks for no signature reads the number"


def test_signature_of_one_promotion_is_none_of_another(
    signed: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    repository, signing_key, public_key = signed
    promote(repository, 2, signing_key)
    number, signature = (repository / PROMOTED).read_text().split()
    of_the_manifest = (repository / "1" / SIGNATURE).read_bytes().hex()
    for note in (f"1\n{signature}", f"1\n{of_the_manifest}", f"{number}\n{64 * '00'}"):
        (repository / PROMOTED).write_text(note)
        with pytest.raises(ArtifactError, match="PROMOTED: not made by the required key"):
            load(repository, public_key=public_key)
    other = tmp_path / "fashion-mnist"
    other.mkdir()
    (other / PROMOTED).write_text(f"{number}\n{signature}\n")
    with pytest.raises(ArtifactError, match="PROMOTED: not made by the required key"):
        promoted(other, public_key)


def test_nothing_below_the_lowest_release_that_is_wanted_serves(
    signed: tuple[Path, Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is removed from the repository, or put back into it."""
    repository, signing_key, public_key = signed
    wanted = wanted_releases(ServerConfig(model_version="2+"))
    promote(repository, 1, signing_key)  # from before the owner raised the bound
    assert load(repository, wanted=wanted)[0].version == "3"
    promote(repository, 2, signing_key)
    assert load(repository, wanted=wanted, public_key=public_key)[0].version == "2"
    for number in "23":
        shutil.rmtree(repository / number)
    with pytest.raises(ArtifactError, match="expected a valid release from 2 on, found none"):
        load(repository, wanted=wanted, public_key=public_key)


def test_required_signature_refuses_everything_else(
    repository: Path, key: tuple[Any, Path]
) -> None:
    private, public_key = key
    with pytest.raises(ArtifactError, match=r"manifest\.sig: No such file"):
        load_one(repository / "1", public_key=public_key)
    manifest = (repository / "1" / MANIFEST).read_bytes()
    stranger = Ed25519PrivateKey.generate()
    for signature in (stranger.sign(manifest), private.sign(manifest + b" "), b"", bytes(64)):
        (repository / "1" / SIGNATURE).write_bytes(signature)
        with pytest.raises(ArtifactError, match="not made by the required key"):
            load_one(repository / "1", public_key=public_key)


def test_file_behind_a_signed_manifest_can_not_be_exchanged(
    repository: Path, key: tuple[Any, Path]
) -> None:
    private, public_key = key
    manifest = (repository / "1" / MANIFEST).read_bytes()
    (repository / "1" / SIGNATURE).write_bytes(private.sign(manifest))
    (repository / "1" / FP32).write_bytes(b"another model")
    with pytest.raises(ArtifactError, match=r"model\.fp32\.onnx: expected sha256"):
        load_one(repository / "1", public_key=public_key)


@pytest.mark.parametrize("content", [b"", b"no key", None])
def test_key_that_can_not_be_used_is_an_error_of_its_own(
    repository: Path, tmp_path: Path, content: bytes | None
) -> None:
    """Not a refusal of the version: with a broken key nothing may serve."""
    path = tmp_path / "broken.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"broken\.pem"):
        load(repository, public_key=path)
