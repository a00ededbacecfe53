"""Image files to grey levels. Needs Pillow, unlike the rest of what a client installs.

What a file claims is checked before its pixels are decoded: see MAX_PIXELS and what follows it.
Pillow sees nothing but the picture (``bare.py``); its own settings are the process's and stay.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile

from digits.bare import ORIENTATION, bare, orientation
from digits.formats import FORMATS, PictureError, levels, unknown_file

# A photograph of 16 million pixels. Pillow's own guard warns of more than 89 million.
MAX_PIXELS = 2**24
# Nothing that is drawn is this long: each row costs memory of its own.
MAX_SIDE = 2**14
# What decoding may take. A pixel takes four bytes; of a WebP, whose decoder keeps two canvases
# beside its own and Pillow's, twenty; of a JPEG in DRAFTED, one. A JPEG of several scans keeps its
# coefficients, too.
MAX_DECODED_BYTES = 2**27
PIXEL_BYTES, WEBP_PIXEL_BYTES, COEFFICIENT_BYTES = 4, 20, 2
DRAFTED = ("L", "RGB", "YCbCr")
# A progressive JPEG is decoded once more for each scan. Encoders write about ten.
MAX_SCANS = 64
START_OF_SCAN = b"\xff\xda"
# Run lengths of a BMP are unfolded in Python: a kilobyte would take seconds.
RUN_LENGTHS = "bmp_rle"
SMALLER = f"an image of at most {MAX_PIXELS:,} pixels"
DAMAGED = "a readable image file", "a damaged one"
# What Pillow's decoders say where an allocation failed.
OUT_OF_MEMORY = "out of memory"
# No more than so many pixels a side are of use. A JPEG is decoded to a half, a quarter or an eighth
# at a fraction of the cost; what else is larger is shrunk in strips of so many pixels.
USEFUL_SIDE = 576
MOST_DRAFTED = 8
STRIP_PIXELS = 2**18
# What is transparent is looked at on at most so many pixels a side.
SAMPLE_SIDE = 128
# What is drawn in tones that differ by less than this, of 255, shows nothing but its outline.
FLAT = 16
# Of its longer side, the part that is added around it.
MARGIN = 10


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An image whose header was read and found harmless; its pixels are not decoded yet.

    Raises:
        PictureError: If it is no such file, damaged, or too large.
    """
    data, exif = bare(data)
    try:
        with _reading():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise unknown_file(data) from None
    with image:
        _check_cost(image, data)
        if exif:
            image.info["exif"] = exif
        yield image


def _check_cost(image: Image.Image, data: bytes) -> None:
    """Raises PictureError of a file that would take too much to decode."""
    size = f"{image.width}x{image.height}"
    pixels = image.width * image.height
    drafted = isinstance(image, JpegImageFile) and image.mode in DRAFTED
    # A JPEG is decoded to a part of its pixels, as ``_upright`` asks for.
    scale = min(MOST_DRAFTED, min(image.size) // USEFUL_SIDE) if drafted else 1
    decoded = pixels // (1 << max(1, scale).bit_length() - 1) ** 2
    if decoded > MAX_PIXELS:
        raise PictureError(SMALLER, size)
    if max(image.size) > MAX_SIDE:
        raise PictureError(f"an image of at most {MAX_SIDE:,} pixels a side", size)
    pixel_bytes = WEBP_PIXEL_BYTES if image.format == "WEBP" else PIXEL_BYTES
    if isinstance(image, JpegImageFile):
        scans = data.count(START_OF_SCAN)
        if scans > MAX_SCANS:
            raise PictureError(f"a JPEG of at most {MAX_SCANS} scans", f"{scans} scans")
        pixel_bytes = 1 if image.mode in DRAFTED else PIXEL_BYTES
        pixel_bytes += COEFFICIENT_BYTES * len(image.getbands()) if scans > 1 else 0
    elif isinstance(image, BmpImageFile) and any(tile[0] == RUN_LENGTHS for tile in image.tile):
        raise PictureError("a BMP without run lengths", "one with them")
    if pixels * pixel_bytes > MAX_DECODED_BYTES:
        most = MAX_DECODED_BYTES // pixel_bytes
        raise PictureError(f"a {image.format} of this kind of at most {most:,} pixels", size)


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
        raise PictureError(*DAMAGED) from None


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
        with _reading():
            picture.load()  # one that is not decoded yet would be decoded small, in place
        return picture
    try:
        return Image.fromarray(picture)
    except (AttributeError, TypeError, ValueError):
        expected = "a path, bytes, a PIL image, or an array [h, w], or uint8[h, w, 3 or 4]"
        shape = f" of shape {list(picture.shape)}" if isinstance(picture, np.ndarray) else ""
        raise PictureError(expected, f"{type(picture).__name__}{shape}") from None


def grey(image: Image.Image) -> npt.NDArray[Any]:
    """Grey levels [h, w] of 0 to 255 of an image in any mode, upright.

    They are fewer where it is much larger than needed.

    Raises:
        PictureError: If the file that the image is of is damaged.
    """
    image = _upright(image)
    if image.mode in ("L", "RGBA"):
        return np.asarray(_on_paper(image).convert("L") if image.mode == "RGBA" else image)
    return levels(np.asarray(image))


def as_png(image: Image.Image) -> bytes:
    """A file of the grey levels of an image; see ``grey``."""
    file = io.BytesIO()
    tones = np.rint(grey(image)).astype(np.uint8)
    Image.fromarray(tones).save(file, "PNG", compress_level=1)  # the way to the server is short
    return file.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    """Decodes an image and turns it upright.

    Returns:
        Grey levels, an RGBA image if it has transparency, or grey values of another range.
    """
    if isinstance(image, JpegImageFile) and image.mode in DRAFTED:
        image.draft("L", (USEFUL_SIDE, USEFUL_SIDE))
    with _reading():
        image.load()
    if 0 in image.size:
        raise PictureError("at least one pixel", f"{image.width}x{image.height}")
    if image.mode == "P" and image.palette is None:
        raise PictureError(*DAMAGED)
    turned = orientation(_exif(image))
    image = _shrunk(image)
    if turned == 1:
        return image
    exif = Image.Exif()  # whose other tags may be anything: see bare.py
    exif[ORIENTATION] = turned
    image = image.copy()  # it may still be the caller's
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def _exif(image: Image.Image) -> bytes:
    exif = image.info.get("exif")
    return exif if isinstance(exif, bytes) else b""


def _shrunk(image: Image.Image) -> Image.Image:
    """An image as ``_plain`` makes it, without a copy of all of it where it is large."""
    width, height = image.size
    factor = math.isqrt(width * height // USEFUL_SIDE**2)
    if factor <= 1:
        return _plain(image)
    rows = factor * max(1, STRIP_PIXELS // (width * factor))
    small = None
    for top in range(0, height, rows):
        strip = _plain(image.crop((0, top, width, min(height, top + rows))))
        if strip.mode.startswith("I;16"):  # which can not be shrunk
            strip = strip.convert("I")
        strip = strip.reduce(factor)
        if small is None:
            size = math.ceil(width / factor), math.ceil(height / factor)
            small = Image.new(strip.mode, size)
        small.paste(strip, (0, top // factor))
    assert small is not None
    return small


def _plain(image: Image.Image) -> Image.Image:
    """Grey levels, RGBA if it has transparency, or grey values of another range."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode == "CMYK":
        image = image.convert("RGB")
    try:
        return image.convert("L")
    except ValueError:
        expected = "an image of a mode that Pillow converts to L"
        raise PictureError(expected, f"mode {image.mode}") from None


def _on_paper(image: Image.Image) -> Image.Image:
    """An RGBA image on an opaque background that what is drawn can be told from.

    The holes of a picture that is mostly opaque get its mean grey. Else it is ink on nothing, and
    gets white below dark ink and black below light ink.
    """
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image
    step = 1 + max(image.size) // SAMPLE_SIDE
    weights = np.asarray(alpha)[::step, ::step].astype(np.float64)
    tones = np.asarray(image.convert("L"))[::step, ::step]
    mean = float((weights * tones).sum() / max(1.0, weights.sum()))
    light = 0 if mean >= 128 else 255
    # Opaque parts of one tone are ink, however much they cover.
    drawn = tones[weights >= 128]
    flat = np.ptp(drawn) < FLAT if drawn.size else True
    level = light if flat or weights.mean() <= 128 else round(mean)
    # Around what was trimmed to its ink there would be no paper to tell that from. No more of it
    # than the picture is narrow: a line of 16,384 pixels must not become an area.
    margin = min(1 + max(image.size) // MARGIN, *image.size)
    paper = Image.new("RGBA", [side + 2 * margin for side in image.size], (level,) * 3 + (255,))
    paper.alpha_composite(image, (margin, margin))
    return paper
