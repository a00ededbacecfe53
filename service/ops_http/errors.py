"""Errors as JSON, the one table from gRPC status to HTTP status, and headers of every answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web
from grpc import StatusCode

from service.rpc.status import Status
from service.serving.request import Violation

# Source: google/rpc/code.proto, which names the HTTP status of each code.
HTTP_STATUS: dict[StatusCode, int] = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.CANCELLED: 499,
    StatusCode.INTERNAL: 500,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}
# Pages load what comes with them from this port, and nothing else; nobody frames them.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "digits-serving",  # the framework would name itself, Python, and their versions
}


def harden(response: web.StreamResponse) -> None:
    """Sets the headers that every answer has."""
    response.headers.update(HEADERS)


def status_response(status: Status) -> web.Response:
    """The answer to a call that ended with a gRPC status other than OK."""
    return error_response(
        HTTP_STATUS.get(status.code, 500),
        status.message,
        code=status.code.name,
        retry_after_s=status.retry_after_s,
    )


def invalid_response(violation: Violation) -> web.Response:
    """The answer to a request that no retry can help."""
    details = {"field": violation.field, "expected": violation.expected, "got": violation.got}
    code = StatusCode.INVALID_ARGUMENT
    return error_response(HTTP_STATUS[code], str(violation), code=code.name, details=details)


def error_response(
    http_status: int,
    message: str,
    *,
    code: str | None = None,
    retry_after_s: float | None = None,
    details: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """``{"error": {"code": ..., "message": ...}}``, with what else is known.

    Args:
        http_status: The status of the answer.
        message: For people; never holds internals.
        code: gRPC's name of the error, or None for HTTP's own.
        retry_after_s: When to come back; also a header, there in whole seconds.
        details: More for the error object.
        headers: More headers.
    """
    error = {"code": code or HTTPStatus(http_status).name, "message": message, **(details or {})}
    headers = dict(headers or {})
    if retry_after_s is not None:
        error["retry_after_s"] = round(retry_after_s, 3)
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return web.json_response({"error": error}, status=http_status, headers=headers)
