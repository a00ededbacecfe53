"""A model repository: numbered folders of versions, and the note that says which one serves.

Without a note the highest version that holds serves. ``PROMOTED`` holds one number: that version
serves, or when it does not hold the next lower one; what is higher was staged, or rolled back from,
and is tried last.
"""

from __future__ import annotations

from pathlib import Path

from service.artifact.format import ArtifactError

PROMOTED = "PROMOTED"
MAX_DIGITS = 10


def versions(repository: Path) -> list[Path]:
    """Folders of the repository with a number for a name, the highest first.

    Raises:
        ArtifactError: If the repository can not be read.
    """
    try:
        if not repository.is_dir():
            raise ArtifactError(f"model_repository: {repository} is not a folder")
        entries = repository.iterdir()
        numbered = [path for path in entries if path.name.isdecimal() and path.is_dir()]
    except OSError as error:
        raise ArtifactError(f"model_repository: {repository}: {error.strerror}") from None
    return sorted(numbered, key=lambda path: int(path.name), reverse=True)


def promoted(repository: Path) -> int | None:
    """The version that was promoted; None without a note.

    Raises:
        ArtifactError: If the note is no number.
    """
    try:
        text = (repository / PROMOTED).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{PROMOTED}: unreadable: {error}") from None
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise ArtifactError(f"{PROMOTED}: expected the number of a version, got {text[:40]!r}")
    return int(text)


def in_serving_order(repository: Path, pinned: int = 0) -> list[Path]:
    """The versions a server tries, the first one first.

    Args:
        repository: Folder of versions.
        pinned: The only version to consider, or 0 for any.

    Raises:
        ArtifactError: If the repository or its note can not be read.
    """
    found = versions(repository)
    if pinned:
        return [folder for folder in found if int(folder.name) == pinned]
    first = promoted(repository)
    return sorted(found, key=lambda folder: first is not None and int(folder.name) > first)
