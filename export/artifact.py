"""Writes releases, complete or not at all, and the note that says which one serves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.artifact.format import MANIFEST, SIGNATURE, sha256
from service.artifact.repository import NUMBER, PROMOTED, promotion

TEMPORARY = ".export-"


def next_release(repository: Path) -> int:
    """One more than the highest release there is."""
    taken = [int(path.name) for path in repository.glob("*") if NUMBER.fullmatch(path.name)]
    return max(taken, default=0) + 1


def write_release(
    repository: Path,
    models: dict[str, bytes],
    files: dict[str, bytes],
    manifest: dict[str, Any],
    signing_key: Path | None = None,
) -> Path:
    """Adds a release to the repository.

    The files are written to a hidden folder in it, synced, and renamed in one step, so a reader,
    or a crash at any moment, sees the whole release or none of it.

    Args:
        repository: Folder of releases; made when it is not there.
        models: The model of each variant in the manifest, by its file's name.
        files: Content of the other files.
        manifest: All of it but the number and the hashes of ``files``, which are added here.
        signing_key: PEM file of the Ed25519 key that signs it.

    Returns:
        The new release's folder.

    Raises:
        KeyFileError: If the key can not be used.
    """
    repository.mkdir(parents=True, exist_ok=True)
    with locked(repository):
        _remove_abandoned(repository)
        number = next_release(repository)
        hashes = {name: sha256(data) for name, data in files.items()}
        complete = {**manifest, "version": number, "files": hashes}
        signed = (json.dumps(complete, indent=2, ensure_ascii=False) + "\n").encode()
        contents = {**models, **files, MANIFEST: signed}
        if signing_key is not None:
            contents[SIGNATURE] = sign(signing_key, signed)
        folder = repository / str(number)
        _write_folder(folder, contents)
    return folder


def sign(signing_key: Path, content: bytes) -> bytes:
    """See ``service.artifact.signature``."""
    from service.artifact import signature  # noqa: PLC0415 - needs cryptography

    return signature.sign(signing_key, content)


def check_signing_key(signing_key: Path) -> None:
    """Raises KeyFileError if a key can not sign."""
    sign(signing_key, b"")


def sign_release(folder: Path, signing_key: Path) -> None:
    """Adds a signature to a release that has none, or replaces it, atomically."""
    signature = sign(signing_key, (folder / MANIFEST).read_bytes())
    with locked(folder.parent):
        _replace(folder / SIGNATURE, signature, folder.parent)


def promote(repository: Path, number: int | None, signing_key: Path | None = None) -> None:
    """Notes which release serves.

    Args:
        repository: Folder of releases.
        number: The release; None removes the note, so that the highest one serves.
        signing_key: PEM file of the Ed25519 key that signs the note.

    Raises:
        KeyFileError: If the key can not be used.
    """
    note = f"{number}\n"
    if number is not None and signing_key is not None:
        note += f"{sign(signing_key, promotion(repository, number)).hex()}\n"
    with locked(repository):
        if number is None:
            (repository / PROMOTED).unlink(missing_ok=True)
            _sync_folder(repository)
        else:
            _replace(repository / PROMOTED, note.encode(), repository)


@contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Keeps other writers out until the block ends; a dead writer's lock is gone with it."""
    descriptor = os.open(repository, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(repository: Path) -> None:
    """What writers left that were killed; nobody else writes while the lock is held."""
    for path in repository.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
    try:
        for name, data in contents.items():
            _write_synced(temporary / name, data)
        temporary.chmod(0o755)  # mkdtemp makes it private; a server may run as another user
        _sync_folder(temporary)
        temporary.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(path: Path, data: bytes, repository: Path) -> None:
    temporary = repository / f"{TEMPORARY}{path.name}"  # where the next writer would clean up
    _write_synced(temporary, data)
    temporary.replace(path)
    _sync_folder(path.parent)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
