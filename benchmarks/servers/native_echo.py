"""pygrpc-native with a handler that answers every call with the same bytes.

    native_echo.py PATH ANSWER_IN_HEX

It prints its address, and runs until it is killed.
"""

from __future__ import annotations

import sys
import threading

from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

if __name__ == "__main__":
    path, answer = sys.argv[1], bytes.fromhex(sys.argv[2])
    front = NativeGrpcFront("127.0.0.1:0", [(path, False)], io_threads=1, call_details=True)

    def respond() -> None:
        while (events := front.recv_batch_details(1024)) is not None:
            for kind, call_id, *_ in events:
                if kind != EVENT_CANCEL:
                    front.respond(call_id, answer)

    threading.Thread(target=respond, daemon=True).start()
    front.start()
    print(f"127.0.0.1:{front.bound_port}", flush=True)
    threading.Event().wait()
