"""Image files to grey levels. Needs Pillow, unlike the rest of what a client installs.

What a file claims is checked before anything is allocated for it: see MAX_PIXELS, MAX_SCANS,
MAX_CHUNKS and MAX_TEXTS. Pillow's own settings are the process's and stay as they are.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from digits.images import PictureError, levels

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# A photograph of 16 million pixels. Pillow's own guard warns of more than 89 million.
MAX_PIXELS = 2**24
# A progressive JPEG is decoded once more for each scan. Encoders write about ten. One that says it
# has further pictures (MPO) has a class and a format of its own in Pillow, derived from JPEG's.
MAX_SCANS = 64
START_OF_SCAN = b"\xff\xda"
# Every chunk of a PNG is read in Python, and the smallest has 12 bytes. Encoders write a data chunk
# for 8 KiB or more, so a picture of MAX_PIXELS in colour has fewer than this.
MAX_CHUNKS = 2**14
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Text and colour profiles inside a PNG are compressed, too; Pillow expands each to 1 MiB at most.
TEXTS = {b"zTXt", b"iTXt", b"iCCP"}
MAX_TEXTS = 32
SMALLER = f"an image of at most {MAX_PIXELS:,} pixels"
# What Pillow's decoders say where an allocation failed.
OUT_OF_MEMORY = "out of memory"
# JPEG decodes to a half, a quarter or an eighth at a fraction of the cost; no more than this many
# pixels a side are of use.
JPEG_SIDE = 576
# What is transparent is looked at on at most so many pixels a side.
SAMPLE_SIDE = 128

# Source: Exif 2.32, tag 0x0112: how the stored picture must be turned to be upright.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An image whose header was read and found harmless; its pixels are not decoded yet.

    Raises:
        PictureError: If it is no such file, damaged, or too large.
    """
    if data.startswith(PNG_SIGNATURE):
        _check_chunks(data)
    try:
        with _reading():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        got = f"{len(data)} bytes of something else"
        raise PictureError("a PNG, JPEG, WebP or BMP file", got) from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise PictureError(SMALLER, f"{image.width}x{image.height}")
        if isinstance(image, JpegImageFile) and data.count(START_OF_SCAN) > MAX_SCANS:
            scans = f"{data.count(START_OF_SCAN)} scans"
            raise PictureError(f"a JPEG of at most {MAX_SCANS} scans", scans)
        yield image


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Around what Pillow reads a file with, and around nothing else.

    Raises:
        PictureError: In place of what Pillow raises on a damaged file.
        MemoryError: If memory ran out, which Pillow's decoders tell as an OSError.
    """
    try:
        yield
    except (MemoryError, UnidentifiedImageError):
        raise
    except Image.DecompressionBombError:  # by the process's own limit, which may be any
        raise PictureError(SMALLER, "more") from None
    except Exception as error:  # Pillow raises many types on damaged files
        if isinstance(error, OSError) and OUT_OF_MEMORY in str(error):
            raise MemoryError(str(error)) from error
        raise PictureError("a readable image file", "a damaged one") from None


def _check_chunks(data: bytes) -> None:
    """Raises PictureError of a PNG with too many chunks, or too many compressed texts."""
    position, texts = len(PNG_SIGNATURE), 0
    for _ in range(MAX_CHUNKS):
        if position >= len(data):
            return
        texts += data[position + 4 : position + 8] in TEXTS
        if texts > MAX_TEXTS:
            raise PictureError(f"a PNG of at most {MAX_TEXTS} texts and profiles", "more")
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    if position < len(data):
        raise PictureError(f"a PNG of at most {MAX_CHUNKS:,} chunks", "more")


def pixels_claimed(data: bytes) -> int:
    """Pixels that a file's header tells; 0 of a file that is refused by it."""
    try:
        with opened(data) as image:
            return image.width * image.height
    except PictureError:
        return 0


def as_image(picture: Any) -> Image.Image:
    """An image of an array of colours, or the image that it is already.

    Raises:
        PictureError: If it is neither.
    """
    if isinstance(picture, Image.Image):
        return picture
    try:
        return Image.fromarray(picture)
    except (AttributeError, TypeError, ValueError):
        expected = "a path, bytes, a PIL image, or an array [h, w], or uint8[h, w, 3 or 4]"
        shape = f" of shape {list(picture.shape)}" if isinstance(picture, np.ndarray) else ""
        raise PictureError(expected, f"{type(picture).__name__}{shape}") from None


def grey(image: Image.Image) -> npt.NDArray[Any]:
    """Grey levels [h, w] of 0 to 255 of an image in any mode, upright.

    A JPEG's come smaller where it is much larger than needed.

    Raises:
        PictureError: If the file that the image is of is damaged.
    """
    image = _upright(image)
    if image.mode in ("L", "RGBA"):
        return np.asarray(_on_paper(image).convert("L") if image.mode == "RGBA" else image)
    return levels(np.asarray(image))


def _upright(image: Image.Image) -> Image.Image:
    """Decodes an image and turns it upright.

    Returns:
        Grey levels, an RGBA image if it has transparency, or grey values of another range.
    """
    if isinstance(image, JpegImageFile) and image.mode in ("L", "RGB", "YCbCr"):
        image.draft("L", (JPEG_SIDE, JPEG_SIDE))
    with _reading():
        image.load()
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode == "CMYK":
        image = image.convert("RGB")
    return image.convert("L")


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # Pillow raises many types on damaged Exif, which is no part of the picture
        return 1


def _on_paper(image: Image.Image) -> Image.Image:
    """An RGBA image on an opaque background that what is drawn can be told from.

    Where most is opaque, the holes get its mean grey; else it is ink on nothing, and gets
    white below dark ink and black below light ink.
    """
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image
    step = 1 + max(image.size) // SAMPLE_SIDE
    weights = np.asarray(alpha)[::step, ::step].astype(np.float64)
    tones = np.asarray(image.convert("L"))[::step, ::step]
    mean = float((weights * tones).sum() / max(1.0, weights.sum()))
    light = 0 if mean >= 128 else 255
    level = round(mean) if weights.mean() > 128 else light
    paper = Image.new("RGBA", image.size, (level, level, level, 255))
    return Image.alpha_composite(paper, image)
