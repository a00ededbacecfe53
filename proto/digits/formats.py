"""What is taken as a picture: formats of files, ranges of grey values, and the error of the rest.

Needs numpy alone.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# What is rejected by its name: how its files begin, and what to convert them to.
OTHERS = {
    "GIF": (re.compile(rb"GIF8"), "PNG"),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), "PNG"),
    "AVIF": (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "JPEG"),
    "HEIC": (re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL), "JPEG"),
    "SVG": (re.compile(rb"(\xef\xbb\xbf)?\s*<(svg|(\?|!--|!DOCTYPE)(?s:.{0,2000}?)<svg)"), "PNG"),
    "PDF": (re.compile(rb"%PDF-"), "PNG"),
}


class PictureError(ValueError):
    """Something that is no picture, or none that is taken.

    Attributes:
        expected: What would have been.
        got: What came.
        name: What it is about, such as the path of a file.
    """

    def __init__(self, expected: str, got: str, name: str = "picture") -> None:
        super().__init__(expected, got, name)  # what it is made from again by pickle
        self.expected = expected
        self.got = got
        self.name = name

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, got {self.got}"


def unknown_file(data: bytes) -> PictureError:
    """The error of a file of another format, which is named if it is a common one."""
    got = f"{len(data)} bytes of "
    for name, (mark, better) in OTHERS.items():
        if mark.match(data):
            got += f"{name}; convert it to {better}"
            break
    else:
        got += "something else"
    return PictureError("a PNG, JPEG, WebP or BMP file", got)


def levels(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Grey values [h, w] of any type as levels of 0 to 255, of uint8 or float32.

    Values of more than 8 bits fill the bits that the largest of them needs: scanners write 10 or 12
    bits into 16.

    Raises:
        PictureError: If there are none, they are no numbers, negative, not finite, or floats above
            255.
    """
    if not array.size:
        raise PictureError("at least one pixel", f"an array of shape {list(array.shape)}")
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "iuf":
        raise PictureError("numbers", f"dtype {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not low >= 0:  # NaN, too
        raise PictureError("values of at least 0", f"{low:g}")
    if array.dtype.kind == "f":
        if high > 255:
            raise PictureError("floats of 0 to 1 or 0 to 255", f"{high:g}")
        most = 1 if high <= 1 else 255
    else:
        most = 2 ** max(8, int(array.max()).bit_length()) - 1
    scaled: npt.NDArray[np.float32] = array.astype(np.float32) * np.float32(255 / most)
    return scaled
