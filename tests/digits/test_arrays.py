"""Arrays of other libraries, and what a person may take for one."""

from __future__ import annotations

import array
import warnings
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from digits.formats import PictureError
from digits.images import normalise
from digits.inputs import classify_requests
from tests.conftest import SAMPLES

with Image.open(SAMPLES / "7.png") as opened:
    SEVEN: npt.NDArray[np.uint8] = np.array(opened.convert("L"))
UNIT = SEVEN / 255
TENSOR = torch.from_numpy(SEVEN.copy())


def pixels(images: Any) -> npt.NDArray[np.uint8]:
    """What is sent for them, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (request,) = classify_requests(images, 9999)
    assert not request.encoded.files
    return np.frombuffer(request.pixels, np.uint8).reshape(-1, 28, 28)


SAME: dict[str, Callable[[], Any]] = {
    "big-endian integers": lambda: SEVEN.astype(">u2"),
    "big-endian floats": lambda: UNIT.astype(">f4"),
    "half": lambda: UNIT.astype(np.float16),
    "long double": lambda: UNIT.astype(np.longdouble),
    "unsigned 64 bits": lambda: SEVEN.astype(np.uint64),
    "not contiguous": lambda: np.repeat(SEVEN, 2, axis=1)[:, ::2],
    "backwards": lambda: SEVEN[::-1].copy()[::-1],
    "columns first": lambda: np.asfortranarray(SEVEN),
    "read-only": lambda: np.frombuffer(SEVEN.tobytes(), np.uint8).reshape(28, 28),
    "both channel axes": lambda: SEVEN[None, ..., None],
    "list of arrays": lambda: [SEVEN, SEVEN],
    "list of rows": lambda: list(SEVEN),
    "list of lists of numpy's floats": lambda: [list(row) for row in UNIT.astype(np.float32)],
    "list of numpy's integers": lambda: list(SEVEN.ravel()),
    "list of tensors": lambda: [TENSOR, TENSOR],
    "list of numbers in tensors": lambda: list(TENSOR.ravel()),
    "tuples of rows": lambda: [tuple(SEVEN.ravel().tolist())] * 2,
    "several as lists": lambda: [SEVEN.tolist(), SEVEN.tolist()],
    "tensor of integers": lambda: TENSOR.to(torch.int16),
    "tensor with channels last": lambda: torch.stack([TENSOR, TENSOR])[..., None],
    "tensor with channels first": lambda: torch.stack([TENSOR, TENSOR])[:, None],
    "transposed tensor": lambda: TENSOR.T.contiguous().T,
    "negative view": lambda: torch._neg_view(-TENSOR.double()),
    "tensor of bfloat16 with gradient": lambda: TENSOR.bfloat16().requires_grad_(),
}


@pytest.mark.parametrize("kind", SAME)
def test_same_pixels(kind: str) -> None:
    got = pixels(SAME[kind]())
    assert all((image == SEVEN).all() for image in got)
    assert 1 <= len(got) <= 2


REJECTED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "inf": (lambda: np.where(SEVEN > 9, np.inf, 0), ValueError, "got 0 to inf"),
    "nan": (lambda: np.where(SEVEN > 9, np.nan, 0), ValueError, "got nan to nan"),
    "label in front": (lambda: np.r_[7, SEVEN.ravel()], ValueError, "drop a label column"),
    "columns": (lambda: np.stack([SEVEN.ravel()] * 3, axis=1), ValueError, r"got \[784, 3\]"),
    "colours": (lambda: np.stack([SEVEN] * 3, axis=-1), ValueError, "images.normalise brings"),
    "a number": (lambda: np.array(5), ValueError, r"got \[\]"),
    "objects": (lambda: SEVEN.astype(object), TypeError, r"object; convert with .astype\('uint8'"),
    "text": (lambda: SEVEN.astype(str), TypeError, r"convert with .astype\('uint8'"),
    "complex": (lambda: TENSOR.to(torch.complex64), TypeError, "dtype complex64"),
    "ragged": (lambda: [[1] * 784, [2] * 783], ValueError, "numbers in equally long rows"),
    "sparse": (TENSOR.to_sparse, ValueError, "Tensor that numpy can not read"),
    "no data": (lambda: TENSOR.to("meta"), ValueError, "Tensor that numpy can not read"),
    "bytes of an array": (lambda: array.array("B", SEVEN.tobytes()), TypeError, "takes numbers"),
    "range": (lambda: range(784), TypeError, r"got int; numpy.array\(list\(...\)\) takes numbers"),
    "decimals": (lambda: [Decimal(1)] * 784, TypeError, "got Decimal; numpy.array"),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_rejected_with_a_way_to_convert(kind: str) -> None:
    make, error, says = REJECTED[kind]
    with pytest.raises(error, match=f"^images: expected .*{says}"):
        pixels(make())


@pytest.mark.parametrize("scale", [1 / 255, 1.001 / 255, 15 / 255])
def test_one_faint_image_among_others_is_warned_of(scale: float) -> None:
    """Together with one of 0 to 255 an image of 0 to 1 would be blank without a word."""
    both = np.stack([SEVEN, SEVEN * scale])
    with pytest.warns(UserWarning, match=r"at most in 1 of 2; multiply 0 and 1 by 255"):
        list(classify_requests(both, 9))


def as_float(values: npt.ArrayLike) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.float32))


def file_of(image: Image.Image) -> bytes:
    (request,) = classify_requests(image, 9)
    (content,) = request.encoded.files
    return bytes(content)


@pytest.mark.parametrize(
    "image",
    [
        as_float(SEVEN), as_float(UNIT), Image.fromarray(SEVEN.astype(np.uint16) * 257),
        Image.fromarray(SEVEN.astype(np.int32) * 257), Image.fromarray(SEVEN).convert("CMYK"),
        Image.frombytes("I;16B", (28, 28), (SEVEN.astype(">u2") * 257).tobytes()),
    ],
    ids=["F to 255", "F to 1", "I;16", "I", "CMYK", "I;16B"],
)  # fmt: skip
def test_pil_image_of_more_than_8_bits_is_scaled(image: Image.Image) -> None:
    assert (normalise(file_of(image)) == normalise(SEVEN)).all()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (as_float(SEVEN * 1.5), "expected floats of 0 to 1 or 0 to 255, got 382.5"),
        (as_float(UNIT - 0.5), "expected values of at least 0, got -0.5"),
        (as_float(np.where(SEVEN > 9, np.nan, 0)), "expected values of at least 0, got nan"),
        (Image.fromarray(SEVEN.astype(np.int32) - 5), "expected values of at least 0, got -5"),
        (Image.new("L", (0, 5)), "expected at least one pixel, got 0x5"),
        (Image.new("LAB", (28, 28)), "that Pillow converts to L, got mode LAB"),
    ],
)
def test_pil_image_out_of_range_is_rejected(image: Image.Image, says: str) -> None:
    with pytest.raises(PictureError, match=says):
        file_of(image)


class Table:
    """A row or several of a table, as pandas and polars give them to numpy."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> npt.NDArray[Any]:
        return self.values

    def __iter__(self) -> Any:  # of a DataFrame: the names of its columns
        return iter(["label", "p0", "p1"])


def test_rows_of_a_table() -> None:
    rows = np.stack([SEVEN.ravel()] * 2).astype(np.int64)
    assert (pixels(Table(rows)) == SEVEN).all()
    assert (pixels(Table(rows[0])) == SEVEN).all()
    with pytest.raises(ValueError, match=r"got \[2, 785\]; drop a label column"):
        pixels(Table(np.c_[[7, 7], rows]))


def test_lack_of_memory_is_not_the_fault_of_the_array() -> None:
    class Huge:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise MemoryError

    huge: Any = Huge()
    with pytest.raises(MemoryError):
        list(classify_requests(huge, 9))
