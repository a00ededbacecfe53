"""The paths for people: the status page, /draw and POST /v1/classify."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from grpc import StatusCode

from service.ops_http.errors import HTTP_STATUS
from service.playground import pages
from service.playground.classify import ClassifyHandler

if TYPE_CHECKING:
    from service.rpc.status import Status
    from service.serving.gate import Gate

CLASSIFY = "/v1/classify"
# Of a request whose caller left; it reaches nobody.
LEFT = HTTP_STATUS[StatusCode.CANCELLED]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The content of the pages, and the way into the core.

    Attributes:
        is_ready: What the status page says.
        describe: The facts on it, by name.
        gate: POST /v1/classify and /draw feed it; None serves neither.
        refusal: How to answer a POST by its metadata, before its body is read, or None to read it;
            None where everybody may call.
        count: Gets the HTTP status of each answer to a POST.
        is_draining: Whether a POST is refused because the server is shutting down.
        requests_per_s: POSTs that one address may send.
    """

    is_ready: Callable[[], bool]
    describe: Callable[[], Mapping[str, str]]
    gate: Gate | None = None
    refusal: Callable[[Sequence[tuple[str, str | bytes]]], Status | None] | None = None
    count: Callable[[int], None] = lambda _: None
    is_draining: Callable[[], bool] = lambda: False
    requests_per_s: float


def add_playground(app: web.Application, offer: Offer) -> None:
    """Adds the paths."""
    pages.add_status_page(
        app, is_ready=offer.is_ready, describe=offer.describe, has_draw=offer.gate is not None
    )
    if offer.gate is None:
        return
    handler = ClassifyHandler(
        offer.gate,
        refusal=offer.refusal,
        is_draining=offer.is_draining,
        requests_per_s=offer.requests_per_s,
    )
    app.router.add_post(CLASSIFY, handler.handle)
    app.middlewares.insert(0, _counted(offer.count))
    pages.add_draw_page(app)


def _counted(count: Callable[[int], None]) -> Middleware:
    """Counts the answers to requests for ``CLASSIFY``, by status."""

    @web.middleware
    async def counted(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != CLASSIFY:
            return await handler(request)
        status = 500
        try:
            response = await handler(request)
            status = response.status
        except asyncio.CancelledError:
            status = LEFT
            raise
        finally:
            count(status)
        return response

    return counted
