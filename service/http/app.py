"""What is served under which path, and what every request has in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from grpc import StatusCode

from service.http import Offer, pages
from service.http.classify import ClassifyHandler
from service.http.connections import Connections
from service.http.errors import HTTP_STATUS, error_response, harden, invalid_response
from service.http.metrics import MetricsHandler
from service.http.requests import MAX_BODY_BYTES
from service.serving.request import InvalidInputError

__all__ = ["Connections", "make_runner"]  # what the port is made of

CLASSIFY = "/v1/classify"
# Of a request whose caller left; it reaches nobody.
LEFT = HTTP_STATUS[StatusCode.CANCELLED]
# What answers get to leave once the server stops.
SHUTDOWN_S = 1.0


def make_runner(offer: Offer) -> web.AppRunner:
    """The application, ready to be set up on the running event loop."""
    app = web.Application(middlewares=[_answer_errors], client_max_size=MAX_BODY_BYTES)
    app.on_response_prepare.append(_harden)
    app.router.add_get("/metrics", MetricsHandler(offer.registry).handle)
    app.router.add_get("/healthz", _health(offer.is_ready, "SERVING", "NOT_SERVING"))
    app.router.add_get("/livez", _health(offer.is_alive, "ALIVE", "STALLED"))
    pages.add_status_page(app, offer)
    if offer.classify is not None:
        handler = ClassifyHandler(
            offer.classify,
            refusal=offer.refusal,
            is_draining=offer.is_draining,
            requests_per_s=offer.requests_per_s,
        )
        app.router.add_post(CLASSIFY, handler.handle)
        app.middlewares.insert(0, _counted(offer.count))
    if offer.playground:
        pages.add_playground(app)
    # A caller that leaves costs no inference: its handler is cancelled.
    return web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)


def _health(holds: Callable[[], bool], yes: str, no: str) -> Handler:
    async def health(_: web.Request) -> web.Response:
        if holds():
            return web.Response(text=f"{yes}\n")
        return web.Response(status=503, text=f"{no}\n")

    return health


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors in the one form, whoever raised them."""
    try:
        return await handler(request)
    except InvalidInputError as error:
        return invalid_response(error.violation)
    except web.HTTPMethodNotAllowed as error:
        expected = " or ".join(sorted(error.allowed_methods))
        message = f"method: expected {expected}, got {error.method}"
        return error_response(405, message, headers={"Allow": error.headers["Allow"]})
    except web.HTTPNotFound:
        paths = ", ".join(_paths(request.app))
        return error_response(404, f"path: expected one of {paths}, got another")
    except web.HTTPException as error:
        return error_response(error.status, error.text or error.reason)


def _counted(count: Callable[[int], None]) -> Middleware:
    """Counts what becomes of the requests for ``CLASSIFY``."""

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


def _paths(app: web.Application) -> list[str]:
    return sorted({resource.canonical for resource in app.router.resources()})


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    harden(response)
