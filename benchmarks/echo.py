"""A server whose handler answers every call with the same bytes, without looking at it.

``python -m benchmarks.echo native|grpcio`` prints its address and runs until it is killed.
"""

from __future__ import annotations

import sys
import threading

import grpc
import grpc.aio

from benchmarks.harness import CLASSIFY_PATH
from digits.v1 import digits_pb2

# As long as the answer to one image.
ANSWER = digits_pb2.ClassifyResponse(
    predictions=[digits_pb2.Prediction(digit=7, probabilities=[0.1] * 10)]
).SerializeToString()


def serve_native() -> None:
    """Calls are taken over in bursts, as the server does it."""
    from pygrpc_native import EVENT_CANCEL, NativeGrpcFront  # noqa: PLC0415 - may be absent

    front = NativeGrpcFront(
        "127.0.0.1:0", [(CLASSIFY_PATH, False)], io_threads=1, call_details=True
    )

    def answer() -> None:
        while (events := front.recv_batch_details(1024)) is not None:
            for kind, call_id, *_ in events:
                if kind != EVENT_CANCEL:
                    front.respond(call_id, ANSWER)

    threading.Thread(target=answer, daemon=True).start()
    front.start()
    print(f"127.0.0.1:{front.bound_port}", flush=True)
    threading.Event().wait()


async def serve_grpcio() -> None:
    """An aio handler that passes bytes."""

    async def answer(_request: bytes, _context: object) -> bytes:
        return ANSWER

    service, _, method = CLASSIFY_PATH.strip("/").partition("/")
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    if sys.argv[1] == "native":
        serve_native()
    else:
        import uvloop

        uvloop.run(serve_grpcio())
