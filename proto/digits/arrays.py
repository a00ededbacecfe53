"""Arrays of other libraries, types and shapes as raw pixels; what is ambiguous is rejected."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

SIDE = 28
# Ink is far brighter. What stays below was probably meant to be of 0 to 1, or of 0 to 15.
FAINT = 16


def is_array(thing: Any) -> bool:
    """Recognises arrays, tensors, rows of tables, and lists of numbers or of rows of an image."""
    if isinstance(thing, (list, tuple)):
        while isinstance(thing, (list, tuple)) and thing:
            thing = thing[0]
        return isinstance(thing, (int, float)) or getattr(thing, "shape", None) in ((), (SIDE,))
    return hasattr(thing, "__array__")


def raw_pixels(images: Any) -> npt.NDArray[np.uint8]:
    """Raw pixels of one or several images.

    Args:
        images: [28, 28], [784], [N, 784] or [N, 28, 28], also with a channel axis of 1; bool,
            integers of 0 to 255, or floats of 0 to 1 or 0 to 255; light ink on a dark ground.

    Returns:
        uint8[N, 28, 28]. An image with a maximum of 1 to 15 is warned of.

    Raises:
        TypeError: If it holds no numbers.
        ValueError: If it has another shape or range, or numpy can not read it.
    """
    return _as_bytes(_shaped(_as_numpy(images)))


def _as_numpy(images: Any) -> npt.NDArray[Any]:
    try:
        if hasattr(images, "detach"):  # a torch tensor, perhaps on a GPU, of a type numpy lacks
            images = images.detach().cpu()
            images = (images.float() if images.is_floating_point() else images).numpy(force=True)
        array = np.asarray(images)
    except MemoryError:
        raise
    except Exception as error:  # whatever the library of the array raises
        raise ValueError(
            f"images: expected numbers in equally long rows, got a {type(images).__name__} that "
            f"numpy can not read: {error}"
        ) from error
    if array.dtype.kind not in "buif":
        raise TypeError(
            f"images: expected numbers, got dtype {array.dtype}; convert with .astype('uint8')"
        )
    return array


def _shaped(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    shape, side = array.shape, (SIDE, SIDE)
    if shape[-1:] == (SIDE * SIDE,) and len(shape) <= 2:
        return array.reshape(-1, *side)
    if shape[-2:] == side and (len(shape) <= 3 or (len(shape) == 4 and shape[1] == 1)):
        return array.reshape(-1, *side)
    if shape[-3:] == (*side, 1) and len(shape) <= 4:
        return array.reshape(-1, *side)
    raise ValueError(
        "images: expected shape [28, 28], [784], [N, 28, 28], [N, 784] or [N, 1, 28, 28], got "
        f"{list(shape)}; drop a label column; digits.images.normalise brings pictures of any size "
        "to [28, 28]"
    )


def _as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if not array.size:
        return array.astype(np.uint8)
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # NaN, too
        raise ValueError(
            f"images: expected values of 0 to 1 or 0 to 255, got {low:g} to {high:g}; undo a "
            "normalisation (x * std + mean), or divide by the largest value"
        )
    if array.dtype.kind == "f":
        array = np.rint(array.astype(np.float32) * (255 if high <= 1 else 1))
    largest = array.max(axis=(1, 2))
    faint = largest[(largest > 0) & (largest < FAINT)]
    if faint.size:
        warnings.warn(
            f"images: expected pixels up to 255, got {faint.max():g} at most in {faint.size} of "
            f"{len(array)}; multiply 0 and 1 by 255, 0 to 15 by 17",
            stacklevel=2,
        )
    return array.astype(np.uint8)
