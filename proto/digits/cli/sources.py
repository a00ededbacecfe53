"""The input of ``digits classify``: files, folders, patterns, standard input."""

from __future__ import annotations

import glob
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp"}
STDIN = "-"


class PicturesError(ValueError):
    """Something that was named holds no pictures; the message says what."""


@dataclass(frozen=True)
class Item:
    """One picture, by name.

    Attributes:
        name: To tell it by.
        picture: A path, or the content of a file.
    """

    name: str
    picture: Path | bytes


def items_of(names: Iterable[str]) -> tuple[list[Item], Counter[str]]:
    """The pictures that the arguments of the command mean, in order.

    Returns:
        Them, and how many others the folders hold, by suffix, or ``folder``.

    Raises:
        PicturesError: If a folder or a pattern holds none.
        OSError: If a folder or standard input can not be read.
    """
    passed_over = Counter[str]()
    return [item for name in names for item in _items(name, passed_over)], passed_over


def _items(name: str, passed_over: Counter[str]) -> Iterator[Item]:
    path = Path(name)
    if name == STDIN:
        yield Item(name, sys.stdin.buffer.read())
    elif path.is_dir():
        for file in _pictures_in(path, passed_over):
            yield Item(str(file), file)
    elif not path.exists() and glob.has_magic(name):
        matches = glob.glob(name, recursive=True)  # noqa: PTH207 - absolute patterns, too
        found = sorted(match for match in matches if Path(match).is_file())
        if not found:
            raise PicturesError(f"{name}: no file has such a name")
        for one in found:
            yield Item(one, Path(one))
    else:
        yield Item(name, path)


def _pictures_in(folder: Path, passed_over: Counter[str]) -> list[Path]:
    files, others = [], Counter[str]()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        suffix = path.suffix.lower()
        if suffix in SUFFIXES and not path.is_dir():
            files.append(path)
        else:
            others["folder" if path.is_dir() else suffix or "without suffix"] += 1
    if not files:
        got = listed(others) or "none"
        raise PicturesError(f"{folder}: expected PNG, JPEG, WebP or BMP files in it, got {got}")
    passed_over.update(others)
    return files


def listed(counts: Mapping[str, int]) -> str:
    """Such as ``2 .txt, 1 .heic``."""
    return ", ".join(
        f"{count} {kind}{'s' if kind == 'folder' and count > 1 else ''}"
        for kind, count in counts.items()
    )
