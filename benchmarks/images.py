"""What an image file costs before inference, on one thread: decoding by Pillow, and normalising."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks.figures import Figure
from benchmarks.harness import served_artifact
from digits.files import grey, opened
from digits.images import examine_grey

CALLS = 200
SIDE = 280
TARGET_US = 300.0


def measure(rounds: int, scale: float) -> list[Figure]:
    """Drawings of 280x280 pixels as they are saved most often, and a file in the form already."""
    calls = max(10, int(CALLS * scale))
    digit = Image.fromarray(255 - served_artifact().golden.images[0])
    large = digit.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    drawn = large.point(lambda level: 255 if level > 127 else 0)
    return [
        _figure("PNG 280x280, grey, two tones", _saved(drawn, "PNG"), rounds, calls, TARGET_US),
        _figure("PNG 280x280, grey, soft edges", _saved(large, "PNG"), rounds, calls, TARGET_US),
        _figure("PNG 280x280, RGB", _saved(large.convert("RGB"), "PNG"), rounds, calls, None),
        _figure("JPEG 280x280, grey", _saved(large, "JPEG"), rounds, calls, None),
        _figure("PNG 28x28, in the network's form", _saved(digit, "PNG"), rounds, calls, None),
    ]


def _saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _figure(name: str, file: bytes, rounds: int, calls: int, target: float | None) -> Figure:
    levels = _decode(file)
    decoding = [_fastest_us(lambda: _decode(file), calls) for _ in range(rounds)]
    normalising = [_fastest_us(lambda: examine_grey(levels), calls) for _ in range(rounds)]
    sums = [one + other for one, other in zip(decoding, normalising, strict=True)]
    details = {
        "decoding_us": float(np.median(decoding)),
        "normalising_us": float(np.median(normalising)),
    }
    return Figure(f"file to pixels, {name}", sums, target, False, "us", details)


def _decode(file: bytes) -> np.ndarray:
    with opened(file) as image:
        return grey(image)


def _fastest_us(call: Callable[[], object], calls: int) -> float:
    """The fastest of many: what others do on the machine can only add to it."""
    fastest = float("inf")
    for _ in range(calls):
        began = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest * 1e6
