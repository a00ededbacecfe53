"""Runs on device memory that stays allocated: what a session on CUDA needs to be fast.

Every new batch shape makes cuDNN choose its kernels again, and every plain ``run`` allocates and
copies through pageable memory. Here batches are padded to a few sizes, all of them run at warm-up,
and each thread keeps one pair of buffers on the device for each size.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

# Sizes are powers of this: at worst three rows in four are padding, which a GPU hardly notices.
BUCKET_BASE = 4
INPUT, OUTPUT = "image", "probabilities"


def bucket_of(count: int) -> int:
    """The padded size of a batch: 1, 4, 16, 64, 256, ..."""
    size = 1
    while size < count:
        size *= BUCKET_BASE
    return size


@dataclass(frozen=True)
class _Buffers:
    """One thread's memory for one size, on the host and on the device."""

    staging: npt.NDArray[np.uint8]
    device_input: ort.OrtValue
    device_output: ort.OrtValue
    binding: ort.IOBinding


class BoundRunner:
    """Runs a session through I/O binding, padded to buckets. Thread-safe.

    Args:
        session: From ``image`` uint8[batch, 28, 28] to ``probabilities`` float32[batch, 10].
        device: Memory the session computes in, as ``OrtValue`` names it: ``cuda`` or ``cpu``.
    """

    def __init__(self, session: ort.InferenceSession, device: str) -> None:
        self._session = session
        self._device = device
        self._local = threading.local()

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Classifies images uint8[N, 28, 28]; returns probabilities float32[N, 10]."""
        buffers = self._buffers(bucket_of(len(images)))
        buffers.staging[: len(images)] = images
        buffers.staging[len(images) :] = 0
        buffers.device_input.update_inplace(buffers.staging)
        self._session.run_with_iobinding(buffers.binding)
        answered: npt.NDArray[np.float32] = buffers.device_output.numpy()[: len(images)]
        # On the CPU that is a view of memory which the next run writes to.
        return answered.copy()

    def warm_up(self, max_batch_size: int) -> None:
        """Runs every bucket that batches of up to ``max_batch_size`` images fall into."""
        size = 1
        while size <= bucket_of(max_batch_size):
            self.run(np.zeros((size, 28, 28), np.uint8))
            size *= BUCKET_BASE

    def _buffers(self, size: int) -> _Buffers:
        kept: dict[int, _Buffers] = self._local.__dict__.setdefault("buffers", {})
        if size not in kept:
            kept[size] = self._allocate(size)
        return kept[size]

    def _allocate(self, size: int) -> _Buffers:
        staging = np.zeros((size, 28, 28), np.uint8)
        device_input = ort.OrtValue.ortvalue_from_numpy(staging, self._device, 0)
        device_output = ort.OrtValue.ortvalue_from_shape_and_type(
            (size, 10), np.float32, self._device, 0
        )
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT, device_input)
        binding.bind_ortvalue_output(OUTPUT, device_output)
        return _Buffers(staging, device_input, device_output, binding)
