"""The paths for operators, and what every request has in common."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from service.ops_http.connections import Connections
from service.ops_http.errors import error_response, harden, invalid_response
from service.ops_http.metrics import MetricsHandler
from service.ops_http.server import Ops
from service.serving.request import InvalidInputError

__all__ = ["Connections", "make_runner"]  # what the port is made of

# A photo of a phone. Read whole into memory.
MAX_BODY_BYTES = 4 * 2**20
# What answers get to leave once the server stops.
SHUTDOWN_S = 1.0


def make_runner(ops: Ops, extend: Callable[[web.Application], None]) -> web.AppRunner:
    """The application, ready to be set up on the running event loop."""
    app = web.Application(middlewares=[_answer_errors], client_max_size=MAX_BODY_BYTES)
    app.on_response_prepare.append(_harden)
    app.router.add_get("/metrics", MetricsHandler(ops.registry).handle)
    app.router.add_get("/healthz", _health(ops.is_ready, "SERVING", "NOT_SERVING"))
    app.router.add_get("/livez", _health(ops.is_alive, "ALIVE", "STALLED"))
    extend(app)
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


def _paths(app: web.Application) -> list[str]:
    return sorted({resource.canonical for resource in app.router.resources()})


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    harden(response)
