"""What a caller is given time for, and what is answered only once it has come."""

from __future__ import annotations

import pytest

from service.http2 import Limits
from service.http2.frames import DATA, END_HEADERS, HEADERS, PING, frame
from service.http2.messages import prefixed
from tests.http2.echo import ROUTES
from tests.http2.wire import Caller, call, data, headers, running

# More than is ignored of the body of what is no gRPC, in frames of the size that is agreed on.
MUCH = b"".join(data(1, bytes(2**14), end=False) for _ in range(2))


@pytest.mark.parametrize(
    "body", [data(1, b""), data(1, b"name=value"), MUCH], ids=["none", "some", "too much"]
)
def test_what_is_no_grpc_is_refused_at_its_end_or_when_too_much_comes(body: bytes) -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        caller.send(frame(HEADERS, END_HEADERS, 1, headers(kind=b"text/plain")) + body)
        refused = caller.until(lambda kind, _flags, stream, _: (kind, stream) == (HEADERS, 1))
        assert refused is not None
        assert b"415" in refused[3]
        why = caller.until(lambda kind, _flags, stream, _: (kind, stream) == (DATA, 1))
        assert why is not None
        assert b"expected application/grpc" in why[3]


def test_caller_that_was_pinged_has_its_time_to_answer() -> None:
    limits = Limits(keepalive_s=0.05, keepalive_timeout_s=600)
    with running(ROUTES, limits=limits) as server, Caller(server) as caller:
        assert caller.until(lambda kind, *_: kind == PING)
        for _ in range(2):  # each is pinged later, so the server has looked at the first again
            with Caller(server) as later:
                assert later.until(lambda kind, *_: kind == PING)
        caller.send(call())
        answer = caller.until(lambda kind, _flags, stream, _: (kind, stream) == (DATA, 1))
        assert answer is not None
        assert answer[3] == prefixed(b"hello")
