"""Files that are larger than a server takes: shrunk by the client, or refused by name."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from digits.client import AsyncDigitClient, DigitClient
from digits.formats import PictureError
from digits.images import normalise
from digits.inputs import MAX_FILE_BYTES, classify_requests
from tests.conftest import SAMPLES, RunningServer

ORIENTATION = 0x0112
# More than a server of default settings takes.
TOO_LARGE = 5 * 2**20
WITHOUT_PILLOW = (
    "import sys; sys.modules['PIL'] = None; from digits.cli.main import main; sys.exit(main())"
)


def photo(width: int, height: int, orientation: int = 1) -> Image.Image:
    """A seven in ink on unevenly lit paper with the noise of a sensor, as a phone stores it."""
    rng = np.random.default_rng(5)
    with Image.open(SAMPLES / "7.png") as image:
        digit = image.convert("L").resize((height // 3, height // 3))
    ink = Image.new("L", (width, height))
    ink.paste(digit, (width // 2 - height // 6, height // 3))
    light = np.linspace(215, 160, width, dtype=np.float32)
    tones = light * (1 - np.asarray(ink, np.float32) / 255 * 0.75)
    noise = np.tile(rng.normal(0, 8, (512, 512, 3)).astype(np.float32), (12, 12, 1))
    colours = tones[..., None] + noise[:height, :width]
    picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    return picture.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else picture


@pytest.fixture(scope="module", params=[(3024, 4032, 6), (5712, 4284, 1)], ids=["12", "24"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG of 12 or 24 megapixels, the first on its side with an Exif orientation."""
    width, height, orientation = request.param
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo(width, height, orientation).save(path, quality=95, exif=exif)
    assert path.stat().st_size > TOO_LARGE
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that no server of default settings takes as it is."""
    path = tmp_path_factory.mktemp("scan") / "scan.png"
    photo(1700, 1600).save(path, compress_level=1)
    assert path.stat().st_size > TOO_LARGE
    return path


def sent(picture: Path | bytes | Image.Image) -> bytes:
    """The one file that a client sends for it."""
    (request,) = classify_requests(picture, 9)
    (content,) = request.encoded.files
    return bytes(content)


def test_photo_is_sent_as_what_the_server_would_make_of_it(large: Path) -> None:
    content = sent(large)
    assert len(content) < 2**21
    assert (normalise(content) == normalise(large)).all()
    assert sent(large.read_bytes()) == content
    with Image.open(large) as image:
        assert (normalise(sent(image)) == normalise(image)).all()


def test_photo_is_classified(server: RunningServer, large: Path) -> None:
    async def ask() -> list[int]:
        async with AsyncDigitClient(server.address, timeout_s=60) as client:
            return (await client.classify(large)).digits

    with DigitClient(server.address, timeout_s=60) as client:
        assert client.classify([large, large.read_bytes()]).digits == [7, 7]
    assert asyncio.run(ask()) == [7]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", mode) for mode in ("L", "RGB", "RGBA", "I;16")]
    + [("BMP", "L"), ("BMP", "RGB"), ("WEBP", "RGB")],
)
def test_large_files_of_other_formats_are_shrunk(kind: str, mode: str) -> None:
    picture = photo(1800, 1500)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 16)
    file = io.BytesIO()
    picture.convert(mode).save(file, kind, lossless=True)
    assert len(file.getvalue()) > MAX_FILE_BYTES
    content = sent(file.getvalue())
    assert len(content) < len(file.getvalue())
    assert (normalise(content) == normalise(file.getvalue())).all()


@pytest.mark.parametrize(
    ("head", "got"), [(b"\0\0\0\x18ftypheic", "HEIC; convert it to JPEG"), (b"?", "something else")]
)
def test_large_file_of_another_format_is_refused_by_its_path(
    tmp_path: Path, head: bytes, got: str
) -> None:
    path = tmp_path / "photo.heic"
    path.write_bytes(head.ljust(TOO_LARGE, b"\0"))
    with pytest.raises(PictureError) as caught:
        sent(path)
    expected = f"{path}: expected a PNG, JPEG, WebP or BMP file, got {TOO_LARGE} bytes of {got}"
    assert str(caught.value) == expected


def test_what_pillow_is_told_stays(large: Path) -> None:
    """A process's bound of pixels and its warnings are its own, also while a photo is shrunk."""
    script = (
        "import sys, warnings\n"
        "import grpc, numpy\n"  # which has filters of its own
        "from PIL import Image, ImageFile\n"
        "def settings():\n"
        "    return [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES,\n"
        "            ImageFile.MAXBLOCK, list(warnings.filters), Image.core.get_block_size()]\n"
        "before = settings()\n"
        "from digits.inputs import classify_requests\n"
        "list(classify_requests([sys.argv[1]], 1))\n"
        "assert settings() == before\n"
    )
    subprocess.run([sys.executable, "-c", script, large], check=True, timeout=300)


def command(server: RunningServer, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """``digits classify`` where Pillow is not installed."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_PILLOW, "classify", "--address", server.address, *arguments],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_without_pillow_a_file_that_is_too_large_is_named_and_the_others_classified(
    server: RunningServer, scan: Path
) -> None:
    good = [SAMPLES / f"{digit}.png" for digit in (7, 4)]
    limit = 4096 * 784 + 2**20
    done = command(server, "--json", good[0], scan, good[1], scan)
    assert done.returncode == 1
    printed = json.loads(done.stdout)
    assert [(each["file"], each["digit"]) for each in printed["predictions"]] == [
        (str(good[0]), 7),
        (str(good[1]), 4),
    ]
    failed, again = printed["errors"]
    assert failed == again
    assert failed["file"] == str(scan)
    assert f"expected a file of at most {limit:,} bytes, got 5," in failed["error"]
    assert failed["error"].endswith("pip install pillow")
    assert done.stderr.splitlines() == [f"digits classify: {scan}: {failed['error']}"] * 2


def test_with_pillow_the_same_file_is_classified(server: RunningServer, scan: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "digits", "classify", "--address", server.address, scan],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[1] == "7"


def test_callers_image_keeps_its_size_and_mode() -> None:
    """A JPEG that is not decoded yet is not decoded small in place."""
    file = io.BytesIO()
    Image.new("RGB", (3200, 2400), "white").save(file, "JPEG")
    image = Image.open(file)
    normalise(image)
    list(classify_requests(image, 64))
    assert (image.size, image.mode) == ((3200, 2400), "RGB")
