"""The HTTP port in the process of a test, in front of a core that does what a test says."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from service.ops_http.server import HttpServer, Ops
from service.playground.app import Offer, add_playground


@contextlib.asynccontextmanager
async def port(
    *, registry: Any = None, is_alive: Any = lambda: True, **offer: Any
) -> AsyncIterator[tuple[str, Any]]:
    ops = Ops(registry=registry or CollectorRegistry(), is_ready=lambda: True, is_alive=is_alive)
    defaults = {"is_ready": lambda: True, "describe": dict, "requests_per_s": 1000.0}
    extend = partial(add_playground, offer=Offer(**{**defaults, **offer}))
    server = HttpServer("127.0.0.1", 0, ops, extend)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.port}", server.port
    finally:
        await server.close()


class FakeGate:
    """Takes requests of any form, and does with them what a test says."""

    def __init__(self, submit: Any) -> None:
        self.submit = submit

    def count_images(self, field: Any, size: Any) -> int:
        return 1
