"""The input of ``digits classify``: files, folders, patterns, standard input."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
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


def items_of(names: Iterable[str]) -> list[Item]:
    """The pictures that the arguments of the command mean, in order.

    Raises:
        PicturesError: If a folder or a pattern holds none.
        OSError: If a folder or standard input can not be read.
    """
    return [item for name in names for item in _items(name)]


def _items(name: str) -> Iterator[Item]:
    path = Path(name)
    if name == STDIN:
        yield Item(name, sys.stdin.buffer.read())
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise PicturesError(f"{name}: expected PNG, JPEG, WebP or BMP files in it, got none")
        for file in files:
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
