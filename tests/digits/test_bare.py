"""Metadata never reaches Pillow; memory and time that one small file can cost."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from digits.bare import bare, orientation
from digits.files import MAX_DECODED_BYTES, grey, opened
from digits.images import PictureError, examine, examine_grey
from digits.v1 import digits_pb2, digits_pb2_grpc
from tests.conftest import RunningServer
from tests.memory import MIB, PeakMemory
from tests.presentations import saved
from tests.releases import check_answers

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
BIG = 4096  # a side, of the most pixels that are taken


def exif_of(tags: Any, size: Any) -> bytes:
    """A block of Exif whose tags each claim nearly all of it."""
    claimed = size - 32 - 12 * tags
    entries = b"".join(struct.pack("<HHII", 0x9000 + n, 1, claimed, 8) for n in range(tags))
    block = b"II*\0" + struct.pack("<IH", 8, tags) + entries
    return b"Exif\0\0" + block.ljust(size, b"\0")


def chunk(kind: Any, body: Any) -> Any:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(data: Any, *chunks: Any) -> Any:
    """A PNG with more behind its header, which is 33 bytes with the signature."""
    return data[:33] + b"".join(chunks) + data[33:]


def with_segments(data: Any, *segments: Any) -> Any:
    """A JPEG with more before its first header: pairs of a marker and a body."""
    more = [struct.pack(">BBH", 255, marker, len(body) + 2) + body for marker, body in segments]
    return data[:2] + b"".join(more) + data[2:]


def picture(kind: Any, **options: Any) -> bytes:
    tones = np.arange(64 * 48, dtype=np.uint8).reshape(64, 48)
    return saved(Image.fromarray(tones), kind, **options)


def test_nothing_but_the_picture_of_a_png_is_kept() -> None:
    plain = picture("PNG")
    body = b"key\0\0" + zlib.compress(bytes(9999))
    full = with_chunks(plain, chunk(b"zTXt", body), chunk(b"eXIf", b"MM"), chunk(b"iCCP", body))
    assert bare(full + b"behind") == (plain, b"MM")
    assert bare(plain[:50]) == (plain[:50], b"")


def test_nothing_but_the_picture_of_a_jpeg_is_kept() -> None:
    plain = picture("JPEG")
    exif = exif_of(3, 500)
    full = with_segments(
        plain, (0xE1, exif), (0xFE, b"a comment"), (0xE2, b"MPF\0II"), (0xE1, b"http://ns.adobe")
    )
    assert bare(full) == (plain, exif)
    assert bare(full[:2] + b"junk\xff\x00\xff\xff\xff" + full[3:]) == (plain, exif)
    for end in range(len(plain)):  # never more than came, whatever is missing
        assert len(bare(plain[:end])[0]) <= end


def test_colours_of_adobe_are_kept() -> None:
    """Its segment says that a CMYK picture is stored inverted."""
    ink = Image.new("CMYK", (40, 40), (0, 0, 0, 200))
    with opened(saved(ink, "JPEG")) as image:
        assert abs(int(grey(image).mean()) - 55) < 4


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_found_wherever_it_is(order: str) -> None:
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 20)
    tags = [struct.pack(f"{order}HHIHH", tag, 3, 1, tag % 9, 0) for tag in (0x0100, 0x0112)]
    block = head.ljust(20, b"\0") + struct.pack(f"{order}H", 2) + b"".join(tags)
    assert orientation(block) == orientation(b"Exif\0\0" + block) == 0x0112 % 9
    for end in range(len(block) - 3):
        assert orientation(block[:end]) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_large_picture_is_seen_like_a_small_one(mode: str, sample: dict[str, np.ndarray]) -> None:
    """It is shrunk in strips; the last of them and of its pixels are parts."""
    seven = np.zeros((28, 28), np.uint8)
    seven[:] = sample["images"][0]
    small = Image.fromarray(255 - seven).resize((560, 560))
    tones = np.asarray(small.resize((2501, 2501))).astype(np.uint16)
    large = Image.fromarray(tones * 257 if mode == "I;16" else tones.astype(np.uint8))
    if mode != "I;16":
        large = large.convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    with Image.open(io.BytesIO(saved(large, kind))) as image:
        seen = grey(image)
    assert seen.shape[0] * seen.shape[1] < 4 * 576**2
    difference = examine_grey(seen).pixels.astype(int) - examine(np.asarray(small)).pixels
    assert np.abs(difference).mean() < 8


def run_lengths(side: Any) -> bytes:
    """A BMP of a few bytes that skips over all of its pixels."""
    skips = b"\0\2\xff\xff" * 200 + b"\0\1"
    size = 54 + 1024 + len(skips)
    head = b"BM" + struct.pack("<IHHI", size, 0, 0, 54 + 1024)
    return (
        head
        + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
        + (bytes(1024) + skips)
    )


def blank(mode: Any, size: Any = (BIG, BIG)) -> Any:
    return Image.new(mode, size)


def excess() -> Any:
    """Data of a PNG that go on for 256 MiB."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(2**24)) for _ in range(16)]
    return chunk(b"IDAT", b"".join([*parts, packer.flush()]))


frames = [Image.new("RGBA", (1000, 1000), (number, 0, 0, 255)) for number in range(30)]
EXIF_TAGS = 2_000
# Files, and what of each is expected instead; None of those that are taken.
BOMBS = {
    "webp": (lambda: saved(blank("RGBA"), "WEBP", lossless=True), "a WEBP of this kind of at most"),
    "webp of most": (lambda: saved(blank("RGBA", (2590, 2590)), "WEBP", lossless=True), None),
    "one column": (lambda: saved(blank("L", (1, 2**24)), "PNG"), "at most 16,384 pixels a side"),
    "one row": (lambda: saved(blank("L", (2**24, 1)), "PNG"), "at most 16,384 pixels a side"),
    "narrow": (lambda: saved(blank("RGBA", (1024, 2**14)), "PNG"), None),
    "rgba": (lambda: saved(blank("RGBA"), "PNG"), None),
    "grey and alpha": (lambda: saved(blank("LA"), "PNG"), None),
    "palette": (lambda: saved(blank("P"), "PNG", transparency=0), None),
    "16 bits": (lambda: saved(blank("I;16"), "PNG"), None),
    "cmyk": (lambda: saved(blank("CMYK"), "JPEG", progressive=True), "a JPEG of this kind of at"),
    "scans": (lambda: saved(blank("RGB"), "JPEG", progressive=True), None),
    "exif of png": (
        lambda: with_chunks(picture("PNG"), chunk(b"eXIf", exif_of(EXIF_TAGS, 2 * MIB))),
        None,
    ),
    "exif of jpeg": (
        lambda: with_segments(picture("JPEG"), *[(0xE1, exif_of(EXIF_TAGS, 65_000))] * 60),
        None,
    ),
    "run lengths": (lambda: run_lengths(BIG), "a BMP without run lengths"),
    "more data than pixels": (lambda: with_chunks(picture("PNG"), excess()), None),
    "frames": (lambda: saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]), None),
}
# In a process of its own, whose peak is this file's. What is imported late is there before.
DECODE = """if True:
    import re, sys, time
    from digits.images import PictureError, examine, examine_grey
    data, small = sys.stdin.buffer.read(), open(sys.argv[1], "rb").read()
    examine(small)
    def peak():
        # Not ru_maxrss, which begins with that of the process that started this one.
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
    before, began, said = peak(), time.process_time(), ""
    try:
        examine(data)
    except PictureError as error:
        said = str(error)
    print(peak() - before, time.process_time() - began, said)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_one_file_takes_is_bounded(bomb: str, tmp_path: Path) -> None:
    make, expected = BOMBS[bomb]
    small = tmp_path / "small"
    small.write_bytes(picture("PNG"))
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(small)],
        input=make(), capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    grown, seconds, said = done.stdout.decode().split(" ", 2)
    assert (expected or "") in said
    assert bool(said.strip()) == (expected is not None)
    assert int(grown) < MAX_DECODED_BYTES // MIB + 16
    assert float(seconds) < 5  # of this process's own time; a tenth of it is usual
    assert not done.stderr  # no warning of Pillow's on what is no part of the picture


def test_bombs_leave_a_server_within_its_memory(start_server: Callable[..., RunningServer]) -> None:
    """Sent at once, and through the server itself; what is taken and what is not."""
    from digits.client import DigitClient, DigitError

    server = start_server()
    files = [make() for make, _ in BOMBS.values()]
    taken = 0
    with DigitClient(server.address, timeout_s=120) as client:
        client.classify_files([picture("PNG")])
        with PeakMemory(server) as peak:
            for file in files:
                with contextlib.suppress(DigitError):
                    client.classify_files([file])
                    taken += 1
    assert taken == sum(expected is None for _, expected in BOMBS.values())
    assert peak.grown < MAX_DECODED_BYTES + 32 * MIB
    check_answers(server)
    assert b"arning" not in server.log.read_bytes()


def test_pictures_that_wait_are_answered_and_hold_the_exit_no_longer_than_that(
    start_server: Callable[..., RunningServer],
) -> None:
    """Two callers fill the lane with the dearest files; a third has run lengths."""
    server = start_server("--grace-s=60")
    dear = saved(blank("RGBA"), "PNG")
    with grpc.insecure_channel(server.address) as channel:
        classify = digits_pb2_grpc.DigitClassifierServiceStub(channel).Classify
        requests = [
            digits_pb2.ClassifyRequest(encoded=digits_pb2.EncodedImages(files=files))
            for files in ([dear] * 4, [run_lengths(BIG)] * 64, [dear] * 4)
        ]
        calls = [classify.future(request, timeout=60) for request in requests]
        assert calls[1].code() is grpc.StatusCode.INVALID_ARGUMENT
        assert server.stop(timeout_s=60) == 0  # 1 is for what was cut off
        assert {calls[0].code(), calls[2].code()} <= {OK, UNAVAILABLE}


def test_indices_without_a_palette_are_damaged() -> None:
    data = saved(Image.new("P", (40, 40)), "PNG")
    start = data.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    with pytest.raises(PictureError, match="got a damaged one"):
        examine(data[:start] + data[end:])


@pytest.mark.parametrize("length", [0, 1, 2, 3, 10])
def test_beginning_of_a_file_is_no_file(length: int) -> None:
    for kind in ("PNG", "JPEG"):
        with pytest.raises(PictureError):
            examine(picture(kind)[:length])
