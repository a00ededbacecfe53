"""Arrays, PIL images, paths and contents of files as requests of bounded size."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeGuard, TypeVar

import numpy.typing as npt

from digits.arrays import is_array, raw_pixels
from digits.formats import PictureError
from digits.v1 import digits_pb2

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

# Raw pixels, one image or several: see ``arrays.raw_pixels``.
Image: TypeAlias = npt.NDArray[Any]
# Raw pixels, or a picture of one digit that the server is to find: a path, the content of a file,
# or a PIL image.
Picture: TypeAlias = "Image | str | Path | bytes | bytearray | memoryview | PilImage"
Pictures: TypeAlias = "Picture | Iterable[Picture]"

T = TypeVar("T")

IMAGE_BYTES = 784
# Files are decoded on the server one after another: many small requests keep more of it busy. The
# second bound keeps a few photos under the pixels that a request may unfold to, and is for one file
# as well: a server takes so much whatever its settings, and larger ones are shrunk.
MAX_FILES = 64
MAX_FILE_BYTES = 2**20


class ErrorsLast(Generic[T]):
    """An iterator whose failure ends it like its end, and is raised when the consumer is ready.

    Requests are taken ahead of the answers to earlier ones, which come first.

    Attributes:
        failure: What ended it, if it was not its end.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self._source)
        except StopIteration:
            raise
        except Exception as error:  # whatever the caller's pictures raise
            self.failure = error
            raise StopIteration from None

    def finish(self) -> None:
        """Raises the failure, if there was one."""
        if self.failure is not None:
            raise self.failure


def classify_requests(pictures: Pictures, images: int) -> Iterator[digits_pb2.ClassifyRequest]:
    """Requests for the pictures, in order; a path is read when it is its turn.

    Args:
        pictures: See ``DigitClient.classify``.
        images: How many a request holds at most. Files are 64 at most, and a request of several
            has at most 1 MiB of them.

    Yields:
        At least one request: nothing at all is for the server to refuse.

    Raises:
        TypeError: If something is no picture, or an array holds no numbers.
        ValueError: If an array has another shape or range, see ``raw_pixels``; or if an image or a
            large file can not be read.
        OSError: If a file can not be read.
    """
    held: list[bytes] = []
    held_size, held_raw, sent = 0, True, False
    contents = ErrorsLast(_contents(pictures))
    for raw, content in contents:
        full = len(held) == (images if raw else min(images, MAX_FILES))
        heavy = not raw and held_size + len(content) > MAX_FILE_BYTES
        if held and (full or heavy or raw != held_raw):
            yield _request(held, raw=held_raw)
            held, held_size, sent = [], 0, True
        held.append(content)
        held_size, held_raw = held_size + len(content), raw
    if held or not (sent or contents.failure):
        yield _request(held, raw=held_raw)
    contents.finish()


def one_request(images: Image) -> digits_pb2.ClassifyRequest:
    """One request of raw pixels, however many; see ``DigitClient.classify`` for the errors."""
    return digits_pb2.ClassifyRequest(pixels=raw_pixels(images).tobytes())


def several_files(files: Sequence[str | Path | bytes]) -> Sequence[str | Path | bytes]:
    """The same.

    Raises:
        TypeError: If one path or content is given in place of a sequence of them.
    """
    if isinstance(files, (str, bytes, Path)):
        raise TypeError(
            f"files: expected a sequence of paths or bytes, got one {type(files).__name__}"
        )
    return files


def _request(contents: list[bytes], *, raw: bool) -> digits_pb2.ClassifyRequest:
    if raw:
        return digits_pb2.ClassifyRequest(pixels=b"".join(contents))
    return digits_pb2.ClassifyRequest(encoded=digits_pb2.EncodedImages(files=contents))


def _contents(pictures: Pictures) -> Iterator[tuple[bool, bytes]]:
    """Each picture as bytes, and whether these are raw pixels."""
    if isinstance(pictures, (bytes, bytearray, memoryview)):
        yield False, _sendable(bytes(pictures), "images")
    elif isinstance(pictures, (str, Path)):
        yield False, _sendable(Path(pictures).read_bytes(), str(pictures))
    elif _is_pil(pictures):
        from digits import files  # noqa: PLC0415 - who has a PIL image has Pillow

        yield False, files.as_png(files.as_image(pictures))
    elif is_array(pictures):
        pixels = memoryview(raw_pixels(pictures).tobytes())
        for start in range(0, len(pixels), IMAGE_BYTES):
            yield True, bytes(pixels[start : start + IMAGE_BYTES])
    elif isinstance(pictures, Iterable) and not isinstance(pictures, (io.IOBase, Mapping)):
        for picture in pictures:
            yield from _contents(picture)
    else:
        got = type(pictures).__name__
        got += "; its read() gives bytes" if isinstance(pictures, io.IOBase) else ""
        got += "; numpy.array(list(...)) takes numbers" if isinstance(pictures, Number) else ""
        raise TypeError(f"images: expected arrays, PIL images, paths or bytes, got {got}")


def _is_pil(picture: Any) -> TypeGuard[PilImage]:
    """Whether it is a PIL image. Who has one has imported Pillow, which nobody else needs."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(picture, pillow.Image)


def _sendable(data: bytes, name: str) -> bytes:
    """A file, or in place of a large one what the server would make of it first.

    Without Pillow that is left to the server, which may take files of this size.

    Raises:
        PictureError: If a large file can not be read.
    """
    if len(data) <= MAX_FILE_BYTES:
        return data
    try:
        from digits import files  # noqa: PLC0415 - Pillow is optional
    except ImportError:
        return data
    try:
        with files.opened(data) as image:
            return files.as_png(image)
    except PictureError as error:
        raise PictureError(error.expected, error.got, name) from None
