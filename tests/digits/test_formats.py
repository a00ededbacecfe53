"""What is rejected is named, with what to convert it to."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, features

from digits.formats import OTHERS, PictureError
from digits.images import normalise

BRAND = b"\0\0\0\x20ftyp"
HEADS = {
    "GIF": [b"GIF87a", b"GIF89a"],
    "TIFF": [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"],
    "AVIF": [BRAND + b"avif", BRAND + b"avis"],
    "HEIC": [BRAND + brand for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")],
    "SVG": [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- by hand -->\n<svg/>',
        b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd"><svg/>',
    ],
    "PDF": [b"%PDF-1.7\n%\xe2\xe3"],
    "something else": [b"", b"<!DOCTYPE html><p>", b"<?xml version='1.0'?><kml/>", bytes(784)],
}


@pytest.mark.parametrize("kind", HEADS)
def test_it_is_named(kind: str) -> None:
    better = OTHERS[kind][1] if kind in OTHERS else ""
    for head in HEADS[kind]:
        with pytest.raises(PictureError) as caught:
            normalise(head)
        got = f"{len(head)} bytes of {kind}" + (f"; convert it to {better}" if better else "")
        assert str(caught.value) == f"picture: expected a PNG, JPEG, WebP or BMP file, got {got}"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "AVIF"])
def test_file_of_an_encoder_is_named(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    file = io.BytesIO()
    Image.fromarray(np.eye(64, dtype=np.uint8)).convert("RGB").save(file, kind)
    with pytest.raises(PictureError, match=f"bytes of {kind}; convert it to"):
        normalise(file.getvalue())


def test_every_name_has_its_heads() -> None:
    assert HEADS.keys() == {*OTHERS, "something else"}
