"""The front with a handler that answers every call with the same bytes.

``python -m benchmarks.echo`` prints its address and runs until it is killed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import CLASSIFY_PATH
from digits.v1 import digits_pb2
from service import http2
from service.rpc.call import UnaryRoute

# As long as the answer to one image.
ANSWER = digits_pb2.ClassifyResponse(
    predictions=[digits_pb2.Prediction(digit=7, probabilities=[0.1] * 10)]
).SerializeToString()


def answer(calls: Sequence[Any]) -> None:
    """A burst at a time, as the server does it."""
    calls[0].respond_all([(call, ANSWER) for call in calls])


def main() -> None:
    """Serves on a free port."""
    routes = {CLASSIFY_PATH: UnaryRoute(answer, max_message_bytes=2**16)}
    server = http2.Server("127.0.0.1", 0, routes, hooks=None, limits=http2.Limits(), tls=None)
    server.start()
    print(f"127.0.0.1:{server.port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
