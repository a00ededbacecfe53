"""mosec: raw pixels in, raw probabilities and is_digit out, over HTTP/1.1."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from mosec import Server, Worker

BATCH = int(os.environ["BATCH"])


class Digits(Worker):  # type: ignore[misc] # mosec is installed in an environment of its own
    """onnxruntime on one thread, as this project's own slots run it."""

    def __init__(self) -> None:
        super().__init__()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(
            os.environ["MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self._run(np.zeros((64, 28, 28), np.uint8))

    def deserialize(self, data: bytes) -> npt.NDArray[np.uint8]:
        return np.frombuffer(data, np.uint8).reshape(-1, 28, 28)

    def forward(self, data: Any) -> Any:  # one request, or a list where it batches
        if BATCH == 1:
            return self._run(data)
        ends = np.cumsum([len(images) for images in data])[:-1]
        return np.split(self._run(np.concatenate(data)), ends)

    def _run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        outputs = self._session.run(["probabilities", "is_digit"], {"image": images})
        return np.concatenate(outputs, axis=1)

    def serialize(self, data: npt.NDArray[np.float32]) -> bytes:
        return data.tobytes()


if __name__ == "__main__":
    server = Server()
    # 1 ms is the shortest wait that it knows.
    server.append_worker(Digits, num=2, max_batch_size=BATCH, max_wait_time=1)
    server.run()
