"""Image files of a request to pixels, within bounds; how a picture is normalised is ``digits``'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from digits.files import grey, opened
from digits.images import Normalised, PictureError, examine_grey
from service.status import InvalidRequestError

# Of all files of a request together: a few kilobytes can unfold into as many as one file may have,
# and the files of others wait meanwhile.
MAX_REQUEST_PIXELS = 2**26


@dataclass(frozen=True)
class Decoded:
    """The images of a request.

    Attributes:
        pixels: N * 784 bytes, as in ``ClassifyRequest.pixels``.
        plausibility: float32[N], see ``digits.images.Normalised``.
    """

    pixels: bytes
    plausibility: npt.NDArray[np.float32]


class FileReader:
    """Reads the files of one request."""

    def __init__(self) -> None:
        self._images: list[Normalised] = []
        self._pixels_left = MAX_REQUEST_PIXELS

    def read(self, data: bytes, field: str) -> None:
        """Decodes and normalises one file.

        Args:
            data: A PNG, JPEG, WebP or BMP file.
            field: What to call it in errors.

        Raises:
            InvalidRequestError: If it is no such file or damaged, or if it is too large, by itself
                or with those before it; that is decided by its header, before memory is taken.
        """
        try:
            with opened(data) as image:
                self._pixels_left -= image.width * image.height
                if self._pixels_left < 0:
                    expected = f"at most {MAX_REQUEST_PIXELS:,} pixels in all files together"
                    raise PictureError(expected, "more")
                levels = grey(image)
        except PictureError as error:
            raise InvalidRequestError(field, error.expected, error.got) from None
        self._images.append(examine_grey(levels))

    def decoded(self) -> Decoded:
        """What was read so far."""
        pixels = b"".join(image.pixels.tobytes() for image in self._images)
        plausibility = [image.plausibility for image in self._images]
        return Decoded(pixels, np.array(plausibility, np.float32))
