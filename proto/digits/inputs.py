"""Arrays, PIL images, paths and contents of files as requests of bounded size."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy.typing as npt

from digits.arrays import is_array, raw_pixels
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
# second bound keeps a few photos under the pixels that a request may unfold to.
MAX_FILES = 64
MAX_FILE_BYTES = 2**20
# Modes that PNG has; a PIL image of another one is sent in colours.
PNG_MODES = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}


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
        ValueError: If an array has another shape or range; see ``raw_pixels``.
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
        yield False, bytes(pictures)
    elif isinstance(pictures, (str, Path)):
        yield False, Path(pictures).read_bytes()
    elif _is_pil(pictures):
        yield False, _as_png(pictures)
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
        raise TypeError(f"images: expected arrays, PIL images, paths or bytes, got {got}")


def _is_pil(picture: Any) -> bool:
    """Whether it is a PIL image. Who has one has imported Pillow, which nobody else needs."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(picture, pillow.Image)


def _as_png(picture: Any) -> bytes:
    """A file of the picture, turned as its EXIF data says, which PNG files are not asked for."""
    from PIL import ImageOps  # noqa: PLC0415 - as above

    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I":
        picture = picture.convert("I;16")
    if picture.mode not in PNG_MODES:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # the way to the server is short
    return file.getvalue()
