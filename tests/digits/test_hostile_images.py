"""Files that are hostile or damaged, and memory that runs out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile

from digits.client import DigitClient, DigitError
from digits.files import grey, opened
from digits.images import PictureError, normalise
from service.serving.pictures import Pictures
from service.serving.request import InvalidInputError
from tests import presentations as p
from tests.conftest import SAMPLES, RunningServer


def huge(kind: Any, **options: Any) -> Any:
    """30,000 x 20,000 pixels in a few kilobytes."""
    return p.saved(Image.new("1" if kind == "PNG" else "L", (30_000, 20_000)), kind, **options)


def saved_twice(side: Any, **options: Any) -> Any:
    """A JPEG that says it has a further picture (MPO), as some cameras and phones write them."""
    picture = Image.new("L", (side, side), 99)
    return p.saved(picture, "MPO", save_all=True, append_images=[picture], **options)


def many_scans(data: Any, scans: Any) -> Any:
    """A progressive JPEG whose first picture's last scan comes again and again."""
    end = data.index(b"\xff\xd9")
    last = data.rindex(b"\xff\xda", 0, end)
    return data[:last] + data[last:end] * scans + data[end:]


def many_chunks(data: Any, chunks: Any) -> Any:
    """A PNG with empty chunks of text behind its header, which is 33 bytes with the signature."""
    empty = bytes(4) + b"tEXt" + zlib.crc32(b"tEXt").to_bytes(4, "big")
    return data[:33] + empty * chunks + data[33:]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            many_chunks(p.png(Image.new("L", (90, 90))), 20_000),
            "expected a PNG of at most 16,384 chunks, got more",
        ),
        (huge("PNG"), "expected an image of at most 16,777,216 pixels, got 30000x20000"),
        (
            many_scans(p.saved(Image.new("L", (64, 64), 99), "JPEG", progressive=True), 200),
            r"expected a JPEG of at most 64 scans, got 2\d\d scans",
        ),
        (
            many_scans(saved_twice(64, progressive=True), 200),
            r"expected a JPEG of at most 64 scans, got 2\d\d scans",
        ),
        (b"GIF89a" + bytes(100), "expected a PNG, JPEG, WebP or BMP file, got 106 bytes of GIF"),
        (bytes(4) + b"ftypheic" + bytes(9), "expected a PNG, .* file, got 21 bytes of HEIC"),
        (b"<svg xmlns=''/>", "expected a PNG, .* file, got 15 bytes of SVG"),
        (p.png(Image.new("L", (90, 90)))[:-40], "expected a readable image file, got a damaged"),
    ],
)
def test_hostile_file_is_refused_by_its_place(
    server: RunningServer, file: Any, expected: str
) -> None:
    good = (SAMPLES / "7.png").read_bytes()
    with DigitClient(server.address) as client:
        with pytest.raises(DigitError) as caught:
            client.classify_files([good, file])
        assert client.classify_files([good]).digits == [7]
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(r"encoded\.files\[1\]: " + expected, caught.value.message)
    assert list(caught.value.violations) == ["encoded.files[1]"]


def test_pillows_settings_are_the_processs() -> None:
    """Whoever uses the client may have other pictures to read."""
    script = (
        "from PIL import Image, PngImagePlugin\n"
        "def settings():\n"
        "    return [{k: v for k, v in vars(m).items() if k.startswith('MAX_')}\n"
        "            for m in (Image, PngImagePlugin)]\n"
        "before = settings()\n"
        "import digits.client, digits.files\n"
        "from digits.images import normalise\n"
        f"normalise({str(SAMPLES / '7.png')!r})\n"
        "assert settings() == before and all(before)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100, 2**28, None])
def test_own_bound_of_pixels_holds_under_any_setting_of_pillow(
    monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(PictureError, match="expected an image of at most 16,777,216 pixels, got"):
        normalise(huge("PNG"))


SEVEN = (SAMPLES / "7.png").read_bytes()
# Where memory may run out, or a bug be, while a picture is read.
STEPS = {
    "open": "digits.files.Image.open",
    "load": "PIL.ImageFile.ImageFile.load",
    "transpose": "PIL.Image.Image.transpose",
    "convert": "PIL.Image.Image.convert",
    "array": "digits.files.np.asarray",
}


def failing(error: Any) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("step", STEPS)
def test_lack_of_memory_is_not_the_fault_of_the_file(
    monkeypatch: pytest.MonkeyPatch, sample: dict[str, np.ndarray], step: str
) -> None:
    turned = p.turned_by_exif(sample["images"][0], None)
    with monkeypatch.context() as patched:
        patched.setattr(STEPS[step], failing(MemoryError))
        with pytest.raises(MemoryError):
            normalise(turned)


def test_lack_of_memory_that_a_decoder_met_is_not_the_fault_of_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pillow gives decoders a number to say so, and makes this of it."""
    error = ImageFile._get_oserror(-9, encoder=False)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", failing(error))
    with pytest.raises(MemoryError, match="out of memory"):
        normalise(SEVEN)


@pytest.mark.parametrize("step", ["digits.files._upright", "PIL.Image.Image.convert"])
def test_bug_is_not_the_fault_of_the_file(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(step, failing(TypeError("a bug of ours")))
        with pytest.raises(TypeError, match="a bug of ours"):
            normalise(SEVEN)


def test_lack_of_memory_for_an_array_of_colours_is_not_its_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("digits.files.Image.fromarray", failing(MemoryError))
        with pytest.raises(MemoryError):
            normalise(np.zeros((9, 9, 3), np.uint8))


def test_pixels_of_a_request_are_bounded_together() -> None:
    file = p.saved(Image.new("1", (4096, 4096)), "PNG")  # 2 kilobytes
    work = Pictures([file] * 5)
    for index in range(4):
        work.do(index)
    with pytest.raises(InvalidInputError, match=r"files\[4\]: expected at most 67,108,864 pixel"):
        work.do(4)


def test_jpeg_of_several_pictures_is_decoded_small_like_any_other() -> None:
    with opened(saved_twice(2400)) as image:
        assert image.format == "JPEG"
        assert grey(image).shape == (600, 600)


def test_image_that_claims_more_pixels_than_allowed_takes_no_memory() -> None:
    """In a process of its own, which may have little more memory than it starts with."""
    script = (
        "import resource, sys\n"
        "from digits.images import PictureError, normalise\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try:\n    normalise(sys.stdin.buffer.read())\n"
        "except PictureError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=huge("PNG"), capture_output=True, check=True, timeout=60,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert b"at most 16,777,216 pixels, got more" in done.stdout


def test_photo_of_24_megapixels_is_read() -> None:
    photo = Image.new("L", (6000, 4000), 230)
    ImageDraw.Draw(photo).line((3000, 1000, 3000, 3000), fill=20, width=300)
    assert normalise(p.saved(photo, "JPEG"))[8:20, 13:15].min() > 200


def test_damaged_exif_is_no_reason_to_refuse(sample: dict[str, np.ndarray]) -> None:
    good = p.turned_by_exif(sample["images"][0], None)
    place = good.index(b"Exif\0\0") + 6
    damaged = good[:place] + b"\xff" * 16 + good[place + 16 :]
    assert normalise(damaged).any()


def test_line_of_transparent_pixels_stays_a_line() -> None:
    """Paper around it, a tenth of its length on all sides, was 64 million pixels."""
    with opened(p.png(Image.new("RGBA", (16_384, 1)))) as image:
        assert grey(image).size < 4 * 16_384
