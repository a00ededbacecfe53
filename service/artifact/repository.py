"""A model repository: numbered folders of releases, and the note that says which one serves.

Without a note the highest valid release serves. ``PROMOTED`` holds one number: that release serves,
or the next lower one if it is invalid; higher ones were staged or rolled back from, and come last.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from service.artifact.errors import ArtifactError
from service.host.files import read_regular

PROMOTED = "PROMOTED"
MAX_NOTE_BYTES = 64
# A release's name: ASCII digits without leading zeros. \d would match digits of other scripts.
NUMBER = re.compile(r"[1-9][0-9]{0,9}")


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


def promoted(repository: Path) -> int | None:
    """The release that was promoted; None without a note.

    Raises:
        ArtifactError: If the note is no number.
    """
    try:
        text = read_regular(repository / PROMOTED, MAX_NOTE_BYTES).decode().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{PROMOTED}: unreadable: {error}") from None
    if not NUMBER.fullmatch(text):
        raise ArtifactError(f"{PROMOTED}: expected the number of a release, got {text[:40]!r}")
    return int(text)


def in_serving_order(repository: Path, pinned: int = 0) -> list[Path]:
    """The releases that a server tries, the first one first.

    Args:
        repository: Folder of releases.
        pinned: The only release to consider, or 0 for any.

    Raises:
        ArtifactError: If the repository or its note can not be read.
    """
    found = releases(repository)
    if pinned:
        return [folder for folder in found if int(folder.name) == pinned]
    first = promoted(repository)
    return sorted(found, key=lambda folder: first is not None and int(folder.name) > first)
