"""Image files to pixels."""

from __future__ import annotations

import io

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from service.status import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SIZE = (28, 28)
# The size is checked here, before any pixel is decoded; Pillow's own guard only guesses at bombs.
Image.MAX_IMAGE_PIXELS = None
# Text and colour profiles inside a PNG are compressed, too: no digit needs this much of them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 1024


def decode_image(data: bytes, field: str) -> bytes:
    """Decodes one file to 784 row-major grey values, 0 (background) to 255 (ink).

    Args:
        data: A PNG, JPEG, WebP or BMP file of 28x28 pixels, light ink on a dark background;
            what is transparent is background.
        field: What to call it in errors.

    Raises:
        InvalidRequestError: If it is not such a file. The size is checked before any pixel is
            decoded, so that a small file can not unfold into a large image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size != SIZE:
                got = f"{image.width}x{image.height}"
                raise InvalidRequestError(field, "an image of 28x28 pixels", got)
            if image.has_transparency_data:
                paper = Image.new("RGBA", SIZE, "black")
                return Image.alpha_composite(paper, image.convert("RGBA")).convert("L").tobytes()
            return image.convert("L").tobytes()
    except UnidentifiedImageError:
        got = f"{len(data)} bytes of something else"
        raise InvalidRequestError(field, "a PNG, JPEG, WebP or BMP file", got) from None
    except InvalidRequestError:
        raise
    except Exception:  # Pillow raises many types on damaged files
        raise InvalidRequestError(field, "a readable image file", "a damaged one") from None
