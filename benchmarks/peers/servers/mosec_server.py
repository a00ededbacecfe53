"""mosec: raw pixels in, raw probabilities out, over HTTP/1.1."""

from __future__ import annotations

import os

import numpy as np
from digits_model import DigitsModel
from mosec import Server, Worker


class Digits(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._model = DigitsModel()
        self._batches = int(os.environ["PEER_BATCH"]) > 1

    def deserialize(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(-1, 28, 28)

    def forward(self, data):  # one request, or a list where it batches
        return self._model.of_many(data) if self._batches else self._model(data)

    def serialize(self, data: np.ndarray) -> bytes:
        return data.tobytes()


if __name__ == "__main__":
    server = Server()
    # 1 ms is the shortest wait that it knows.
    server.append_worker(
        Digits, num=2, max_batch_size=int(os.environ["PEER_BATCH"]), max_wait_time=1
    )
    server.run()
