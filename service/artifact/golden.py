"""Golden digits: real images whose answers are known, with which every model is tried."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.artifact.errors import ArtifactError

GOLDEN = "golden.npz"
MIN_GOLDEN = 32
# Unpacked, many times what the exporter writes. A small zip can unfold into any size.
MAX_GOLDEN_BYTES = 4 * 2**20
# Kernels differ between CPUs (AVX2, AVX-512) in the last bits; far below what a caller can see.
# In int8 such a bit can round an activation to the next integer.
GOLDEN_TOLERANCE = {"fp32": 1e-5, "int8": 0.02}
# The names of a precision's arrays in the file.
PROBABILITIES, IS_DIGIT = "probabilities_{}", "is_digit_{}"


@dataclass(frozen=True)
class Golden:
    """Digits whose answers are known.

    Attributes:
        images: uint8[N, 28, 28].
        labels: int64[N], the digits that must be predicted.
        probabilities: By precision: float32[N, 10], what the exported model answered.
        is_digit: By precision: float32[N], likewise.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    probabilities: Mapping[str, npt.NDArray[np.float32]]
    is_digit: Mapping[str, npt.NDArray[np.float32]]

    def check(
        self,
        probabilities: npt.NDArray[np.float32],
        is_digit: npt.NDArray[np.float32],
        precision: str,
    ) -> None:
        """Compares answers with the expected ones.

        Args:
            probabilities: float32[N, 10], what a model answered.
            is_digit: float32[N], likewise.
            precision: Of that model; decides what is expected, and how near is near enough.

        Raises:
            ArtifactError: If a label differs, or a probability by more than the tolerance.
        """
        wrong = int((probabilities.argmax(axis=1) != self.labels).sum())
        if wrong:
            raise ArtifactError(f"golden digits: {wrong} of {len(self.labels)} labels are wrong")
        expected = np.column_stack([self.probabilities[precision], self.is_digit[precision]])
        with np.errstate(invalid="ignore"):  # infinity minus infinity is not a number: rejected
            error = float(np.abs(np.column_stack([probabilities, is_digit]) - expected).max())
        tolerance = GOLDEN_TOLERANCE[precision]
        if not error <= tolerance:
            raise ArtifactError(
                f"golden digits: expected probabilities within {tolerance:g}, "
                f"got a difference of {error:g}"
            )


def write_golden(golden: Golden) -> bytes:
    """The bytes of golden.npz; equal content gives equal bytes."""
    buffer = io.BytesIO()
    arrays = {}
    for name in GOLDEN_TOLERANCE:
        if name in golden.probabilities:
            arrays[PROBABILITIES.format(name)] = golden.probabilities[name]
            arrays[IS_DIGIT.format(name)] = golden.is_digit[name]
    np.savez(buffer, images=golden.images, labels=golden.labels, **arrays)  # type: ignore[arg-type] # numpy takes arrays by any name
    return buffer.getvalue()


def read_golden(data: bytes, precisions: list[str]) -> Golden:
    """Parses golden.npz.

    Args:
        data: Its bytes.
        precisions: Whose answers it must hold.

    Raises:
        ArtifactError: If arrays are missing, or of another type, shape or number.
    """
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "images": (np.uint8, (28, 28)),
        "labels": (np.int64, ()),
        **{PROBABILITIES.format(name): (np.float32, (10,)) for name in precisions},
        **{IS_DIGIT.format(name): (np.float32, ()) for name in precisions},
    }
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            unpacked = sum(member.file_size for member in arrays.zip.infolist())
            if unpacked > MAX_GOLDEN_BYTES:
                raise ValueError(f"expected {MAX_GOLDEN_BYTES} bytes at most, got {unpacked}")
            # A member that is no array comes as its bytes.
            loaded = {name: np.asarray(arrays[name]) for name in expected}
        count = len(loaded["labels"])
    # numpy and zipfile raise many types on damaged files, MemoryError for too large a shape.
    except Exception as error:
        raise ArtifactError(f"{GOLDEN}: unreadable: {error}") from None
    for name, (dtype, shape) in expected.items():
        array = loaded[name]
        if array.dtype != dtype or array.shape != (count, *shape):
            got = f"{array.dtype}{list(array.shape)}"
            raise ArtifactError(f"{GOLDEN}: {name}: expected {dtype.__name__}, got {got}")
    if count < MIN_GOLDEN:
        raise ArtifactError(f"{GOLDEN}: expected at least {MIN_GOLDEN} digits, got {count}")
    probabilities, is_digit = (
        {name: loaded[array.format(name)] for name in precisions}
        for array in (PROBABILITIES, IS_DIGIT)
    )
    return Golden(loaded["images"], loaded["labels"], probabilities, is_digit)
