"""LitServe: pixels as base64 in JSON, probabilities as JSON, over HTTP/1.1."""

from __future__ import annotations

import base64
import os
import sys

import litserve as ls
import numpy as np
from digits_model import DigitsModel


class Digits(ls.LitAPI):
    def setup(self, device: str) -> None:
        self._model = DigitsModel()

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        pixels = base64.b64decode(request["pixels"])
        return np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return inputs  # of several sizes

    def predict(self, x):  # one request, or a list where it batches
        return self._model.of_many(x) if isinstance(x, list) else self._model(x)

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output: np.ndarray) -> dict[str, list[list[float]]]:
        return {"probabilities": output.tolist()}


if __name__ == "__main__":
    batch = int(os.environ["PEER_BATCH"])
    api = Digits(max_batch_size=batch, batch_timeout=0.001 if batch > 1 else 0.0)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=2)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), log_level="error", generate_client_file=False
    )
