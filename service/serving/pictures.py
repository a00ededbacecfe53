"""From image files to the images of a request."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from digits.files import grey, opened, pixels_claimed
from digits.images import Judge, Normalised, PictureError, by_shape, examine_grey
from service.serving.request import InvalidInputError, Request

# Process-wide: callers' pictures are bounded below, and Pillow's warning about large ones would
# only be logged for files that are rejected anyway.
Image.MAX_IMAGE_PIXELS = None
# Likewise: pictures are small when OpenCV gets them, and the other cores are for inference.
cv2.setNumThreads(1)
# It would write past the log and its limit, to standard error; what it rejects it raises, too.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# In all files of a request: a few kilobytes can unfold into as many as one file may have, while the
# files of other callers wait.
MAX_REQUEST_PIXELS = 2**26


class Pictures:
    """The files of one request: the ``Work`` that decodes and normalises them, one a step.

    Args:
        files: PNG, JPEG, WebP or BMP files.
        judge: Chooses between readings of a picture that is not clean: see ``examine_grey``.
        name: What they are called in errors, without their index.
    """

    def __init__(
        self, files: Sequence[bytes], judge: Judge = by_shape, name: str = "encoded.files"
    ) -> None:
        self.size = sum(len(data) for data in files)
        self.steps = len(files)
        self._files = files
        self._judge = judge
        self._name = name
        self._images: list[Normalised] = []
        self._pixels_left = MAX_REQUEST_PIXELS

    def costs(self) -> list[int]:
        """Pixels of each file by its header; files beyond the request's bound cost nothing."""
        left, costs = MAX_REQUEST_PIXELS, []
        for data in self._files:
            pixels = min(left, pixels_claimed(data))
            left -= pixels
            costs.append(pixels)
        return costs

    def do(self, index: int) -> None:
        """Decodes and normalises one file.

        Raises:
            InvalidInputError: If it is damaged, of another format, or too large by itself or with
                the files before it, which its header decides before memory is taken.
        """
        try:
            with opened(self._files[index]) as image:
                self._pixels_left -= image.width * image.height
                if self._pixels_left < 0:
                    expected = f"at most {MAX_REQUEST_PIXELS:,} pixels in all files together"
                    raise PictureError(expected, "more")
                levels = grey(image)
        except PictureError as error:
            name = f"{self._name}[{index}]"
            raise InvalidInputError(name, error.expected, error.got) from None
        self._images.append(examine_grey(levels, self._judge))

    def give_to(self, request: Request) -> None:
        """Sets images, count and plausibility of the request."""
        request.images = b"".join(image.pixels.tobytes() for image in self._images)
        request.count = len(self._images)
        request.plausibility = np.array([image.plausibility for image in self._images], np.float32)
