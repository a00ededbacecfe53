"""What ``digits classify`` is asked about: files, folders, patterns, standard input, idx files."""

from __future__ import annotations

import contextlib
import glob
import gzip
import math
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
STDIN = "-"
# Source: LeCun, Cortes and Burges, The MNIST database (yann.lecun.com/exdb/mnist): two zero bytes,
# the type (8 = uint8), the number of dimensions, each dimension as big-endian int32, the data.
IDX_BYTES = b"\x00\x00\x08"
GZIP_MAGIC = b"\x1f\x8b"
IMAGE_SHAPE = (28, 28)


class PicturesError(ValueError):
    """Something that was named holds no pictures; the message says what."""


@dataclass(frozen=True)
class Item:
    """One picture, by name.

    Attributes:
        name: To tell it by.
        picture: A path, the content of a file, or raw pixels uint8[28, 28].
    """

    name: str
    picture: Path | bytes | npt.NDArray[np.uint8]


def items_of(names: Iterable[str]) -> list[Item]:
    """The pictures that the arguments of the command mean, in order.

    Raises:
        PicturesError: If a folder, a pattern or an idx file holds none.
        OSError: If something can not be read.
    """
    return [item for name in names for item in _items(name)]


def pictures_in(folder: Path) -> list[Path]:
    """The image files of a folder, by their suffix, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _items(name: str) -> Iterator[Item]:
    path = Path(name)
    if name == STDIN:
        content = sys.stdin.buffer.read()
        yield from _from_file(name, content, content)
    elif path.is_dir():
        files = pictures_in(path)
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
            yield from _items(one)
    else:
        with path.open("rb") as opened:
            head = opened.read(len(IDX_BYTES))
            rest = opened.read() if _may_be_idx(head) else b""
        yield from _from_file(name, head + rest, path)


def _may_be_idx(head: bytes) -> bool:
    return head.startswith((IDX_BYTES, GZIP_MAGIC))


def _from_file(name: str, content: bytes, picture: Path | bytes) -> Iterator[Item]:
    """The images of an idx file, or one picture."""
    if not _may_be_idx(content):
        yield Item(name, picture)
        return
    for index, image in enumerate(read_idx(name, content)):
        yield Item(f"{name}[{index}]", image)


def read_idx(name: str, content: bytes) -> npt.NDArray[np.uint8]:
    """The images uint8[N, 28, 28] of an idx file, compressed or not.

    Raises:
        PicturesError: If there are none, or the file is damaged.
    """
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise PicturesError(f"{name}: expected a gzip file, got a damaged one") from None
    if not content.startswith(IDX_BYTES) or len(content) < 4 + 4 * content[3]:
        raise PicturesError(f"{name}: expected an idx file of bytes, got something else")
    ndim = content[3]
    shape = tuple(np.frombuffer(content, ">u4", ndim, offset=4).tolist())
    if ndim != 3 or shape[1:] != IMAGE_SHAPE or not shape[0]:
        raise PicturesError(f"{name}: expected images [N, 28, 28], got {list(shape)}")
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    if pixels.size != math.prod(shape):
        raise PicturesError(f"{name}: expected {math.prod(shape)} pixels, got {pixels.size}")
    return pixels.reshape(shape)


class Watched:
    """A folder whose pictures are taken when they appear or change, and have stopped growing.

    Raises:
        OSError: If the folder can not be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last_look = self._look()
        self._done = dict(self._last_look)

    def ready(self) -> list[Path]:
        """Files that are not done and are as they were at the last look; raises OSError."""
        before, self._last_look = self._last_look, self._look()
        return [
            path
            for path, state in self._last_look.items()
            if before.get(path) == state != self._done.get(path)
        ]

    def done(self, path: Path) -> None:
        """This file has been taken as it was at the last look."""
        self._done[path] = self._last_look[path]

    def _look(self) -> dict[Path, tuple[int, int]]:
        states = {}
        for path in pictures_in(self._folder):
            with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                stat = path.stat()
                states[path] = (stat.st_mtime_ns, stat.st_size)
        return states
