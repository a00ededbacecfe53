"""A line for each RPC that ended, or for a sample of them when there are many.

A line never holds an image, a token or any metadata but the request id.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from grpc import StatusCode

from service.serving.request import Request
from service.telemetry.allowance import Allowance
from service.telemetry.listener import EndedCall, Method

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
# What of a caller's own id may go into a log: nothing that could pass for another line or field.
SOUND_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")


class RequestLog:
    """Logs how RPCs ended. Thread-safe.

    RPCs that ended well and those that did not have an allowance each, so that a flood of one does
    not hide the other. A line tells how many were suppressed since the line before.

    Args:
        lines_per_s: Lines of each kind a second, on average and as the largest burst.
    """

    def __init__(self, lines_per_s: float) -> None:
        self._well, self._badly = Allowance(lines_per_s), Allowance(lines_per_s)

    def began(self, method: Method, count: int) -> None:
        """See ``RpcListener``."""

    def ended(
        self, method: Method, calls: Sequence[EndedCall], code: StatusCode, message: str, now: float
    ) -> None:
        """See ``RpcListener``."""
        allowance = self._well if code is StatusCode.OK else self._badly
        lines, suppressed = allowance.take(len(calls), now)
        for call in calls[:lines]:
            fields = {
                "request_id": request_id(call.metadata),
                "peer": call.peer,
                **({"caller": call.caller} if call.caller else {}),
                "total_ms": _ms(now - call.received),
                **_details(call.state),
                **({"error": message} if message else {}),
                "suppressed": suppressed,
            }
            logger.info("%s %s", method.name, code.name, extra={"fields": fields})


def _details(state: object) -> dict[str, object]:
    """What is known of a call that came as far as the core."""
    if not isinstance(state, Request):
        return {}
    if state.result is None:
        return {"images": state.count}
    return {
        "images": state.count,
        "queue_ms": _ms(state.started - state.enqueued),
        "inference_ms": _ms(state.inference_s),
        "batch_images": state.batch_images,
    }


def request_id(metadata: Iterable[Any]) -> str:
    """The caller's ``x-request-id`` if it can stand in a log line, else one made up here."""
    for key, value, *_ in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str) and SOUND_ID.fullmatch(value):
            return value
    return secrets.token_hex(8)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
