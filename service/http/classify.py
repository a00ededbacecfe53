"""POST /v1/classify: for quick tries, through the same queue as every gRPC call."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aiohttp import web
from google.protobuf.json_format import MessageToDict
from grpc import StatusCode

from digits.v1 import digits_pb2
from service import wire
from service.call import Call
from service.http.errors import error_response, status_response
from service.http.limits import RateLimiter
from service.http.requests import read_request
from service.status import Status
from service.transports.grpcio import AsyncCall, Mailbox

if TYPE_CHECKING:
    from service.http import Metadata

# Requests that are read or answered at once: what their bodies hold in memory is bounded by it.
MAX_AT_ONCE = 16
# What a body may take to arrive, from its header on.
BODY_S = 5.0
# What an answer may take. A browser has no deadline of its own.
DEADLINE_S = 5.0
BUSY_RETRY_AFTER_S = 1.0
# Headers that stand for the metadata of an RPC.
SHOWN_HEADERS = frozenset({"Authorization"})
EXPIRED = Status(StatusCode.DEADLINE_EXCEEDED, f"no answer within {DEADLINE_S:g} s")


class HttpCall(AsyncCall):
    """A request of the HTTP port, which is not an RPC."""

    is_rpc = False


class ClassifyHandler:
    """Reads a request, feeds the queue, and answers in JSON. Lives on the event loop.

    Args:
        receive: Takes bursts of calls.
        refusal: See ``Offer``.
        requests_per_s: What one address may send.
    """

    def __init__(
        self,
        receive: Callable[[Sequence[Call]], None],
        *,
        refusal: Callable[[Metadata], Status | None] | None,
        requests_per_s: float,
    ) -> None:
        self._receive = receive
        self._refusal = refusal
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self._limiter = RateLimiter(requests_per_s)
        self._at_once = 0

    async def handle(self, request: web.Request) -> web.Response:
        """One request, within its bounds."""
        if _is_from_elsewhere(request.headers):
            # A page from elsewhere may not spend what a visitor's browser can reach.
            raise web.HTTPForbidden(text="origin: expected a page of this server, got another")
        wait_s = self._limiter.take(request.remote or "")
        if wait_s > 0:
            return _exhausted("too many requests from this address", wait_s)
        refused = self._refusal and self._refusal(_metadata(request))
        if refused:
            return status_response(refused)
        if self._at_once >= MAX_AT_ONCE:
            return _exhausted(f"{MAX_AT_ONCE} requests are being answered", BUSY_RETRY_AFTER_S)
        self._at_once += 1
        try:
            message = await _read_in_time(request)
            return await self._classify(message, request)
        finally:
            self._at_once -= 1

    async def _classify(self, message: bytes, request: web.Request) -> web.Response:
        now = time.monotonic()
        call = HttpCall(
            self._mailbox,
            message,
            received=now,
            deadline=now + DEADLINE_S,
            metadata=_metadata(request),
            peer=f"http:{request.remote}",
        )
        has_files = wire.sole_field(message) is None
        self._receive([call])
        try:
            async with asyncio.timeout(DEADLINE_S):
                answer = await call.outcome
        except TimeoutError:
            answer = EXPIRED
        finally:
            call.cancelled = True  # of no effect once it is answered
        if isinstance(answer, Status):
            return status_response(answer)
        return web.json_response(_as_json(answer, call.images if has_files else None))


def _is_from_elsewhere(headers: Mapping[str, str]) -> bool:
    """Whether a browser says that a page of another server sent this.

    Browsers name the site on loopback and over TLS only, the origin with every POST; callers
    without a page name neither. Source: CrossOriginProtection of Go's net/http.
    """
    if site := headers.get("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    origin = headers.get("Origin")
    return origin is not None and origin.partition("://")[2] != headers.get("Host")


def _metadata(request: web.Request) -> list[tuple[str, str]]:
    return [(k.lower(), v) for k, v in request.headers.items() if k in SHOWN_HEADERS]


async def _read_in_time(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_S):
            return await read_request(request)
    except TimeoutError:
        text = f"body: expected all of it within {BODY_S:g} s, got a part"
        raise web.HTTPRequestTimeout(text=text) from None


def _as_json(response: bytes, pixels: memoryview | None) -> dict[str, Any]:
    """ClassifyResponse as JSON.

    Args:
        response: Serialised ClassifyResponse.
        pixels: What the network saw, 784 bytes an image, added to each prediction as base64 where
            that was made from files.
    """
    message = digits_pb2.ClassifyResponse.FromString(response)
    answer: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    if pixels is not None:
        for index, prediction in enumerate(answer["predictions"]):
            first = index * wire.IMAGE_BYTES
            image = pixels[first : first + wire.IMAGE_BYTES]
            prediction["pixels"] = base64.b64encode(image).decode()
    return answer


def _exhausted(message: str, retry_after_s: float) -> web.Response:
    return error_response(
        429, message, code=StatusCode.RESOURCE_EXHAUSTED.name, retry_after_s=retry_after_s
    )
