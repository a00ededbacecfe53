"""A caller that says it is going."""

from __future__ import annotations

import pytest

from service.http2.frames import GOAWAY, frame
from tests.http2.peer import greeted


@pytest.mark.parametrize("reason", [b"", b"x" * 100])
def test_goaway_may_come_without_a_reason_and_with_one(reason: bytes) -> None:
    connection = greeted()
    connection.receive(frame(GOAWAY, 0, 0, bytes(8) + reason), 0.0)
    assert not connection.closed
