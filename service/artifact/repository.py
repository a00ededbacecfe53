"""A model repository: numbered folders of releases, and the note that says which one serves.

Without a note the highest valid release serves. ``PROMOTED`` holds one number: that release serves,
or the next lower one if it is invalid; higher ones were staged or rolled back from, and come last.
A second line, in hexadecimal, signs the note: a server with a key takes no other.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from service.artifact.errors import ArtifactError
from service.host.files import read_regular

PROMOTED = "PROMOTED"
MAX_NOTE_BYTES = 256
# A release's name: ASCII digits without leading zeros. \d would match digits of other scripts.
NUMBER = re.compile(r"[1-9][0-9]{0,9}")
NOTE = re.compile(rf"({NUMBER.pattern})(?:\n([0-9a-f]{{128}}))?\s*")
ANY = range(1, sys.maxsize)


def name_of(repository: Path) -> str:
    """The name of the model: the last part of the path as it was given, not of a link's target."""
    return Path(os.path.abspath(repository)).name  # noqa: PTH100 - resolve() would follow links


def releases(repository: Path) -> list[Path]:
    """Folders of the repository whose name is a ``NUMBER``, the highest first.

    Raises:
        ArtifactError: If the repository can not be read.
    """
    try:
        if not repository.is_dir():
            raise ArtifactError(f"model_repository: {repository} is not a folder")
        entries = repository.iterdir()
        numbered = [path for path in entries if NUMBER.fullmatch(path.name) and path.is_dir()]
    except OSError as error:
        raise ArtifactError(f"model_repository: {repository}: {error.strerror}") from None
    return sorted(numbered, key=lambda path: int(path.name), reverse=True)


def promoted(repository: Path, public_key: Path | None = None) -> int | None:
    """The release that was promoted; None without a note.

    Args:
        repository: Folder of releases.
        public_key: PEM file of the key that must have signed the note; None asks for no signature.

    Raises:
        ArtifactError: If the note is no number, or not signed.
        KeyFileError: If the key can not be used.
    """
    try:
        text = read_regular(repository / PROMOTED, MAX_NOTE_BYTES).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{PROMOTED}: unreadable: {error}") from None
    note = NOTE.fullmatch(text)
    if note is None:
        raise ArtifactError(f"{PROMOTED}: expected the number of a release, got {text[:40]!r}")
    number = int(note[1])
    if public_key is not None:
        # Here, because it needs an extra.
        from service.artifact.signature import check_signature, load_public_key  # noqa: PLC0415

        key = load_public_key(public_key)
        if note[2] is None:
            raise ArtifactError(f"{PROMOTED}: expected a signature of the required key, got none")
        check_signature(key, promotion(repository, number), bytes.fromhex(note[2]), PROMOTED)
    return number


def promotion(repository: Path, number: int) -> bytes:
    """What the signature of a note signs: the model and its release, and nothing else that is."""
    return f"promoted release\n{name_of(repository)}\n{number}\n".encode(errors="surrogateescape")


def in_serving_order(repository: Path, wanted: range = ANY, note: int | None = None) -> list[Path]:
    """The releases that a server tries, the first one first.

    Args:
        repository: Folder of releases.
        wanted: The numbers to consider.
        note: The release that was promoted, if any.

    Raises:
        ArtifactError: If the repository can not be read.
    """
    found = [folder for folder in releases(repository) if int(folder.name) in wanted]
    return sorted(found, key=lambda folder: note is not None and int(folder.name) > note)
