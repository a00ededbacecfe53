"""The HTTP port in the process of a test, in front of a core that does what a test says."""

from __future__ import annotations

import contextlib
from functools import partial

from prometheus_client import CollectorRegistry

from service.ops_http.server import HttpServer, Ops
from service.playground.app import Offer, add_playground


@contextlib.asynccontextmanager
async def port(*, registry=None, is_alive=lambda: True, **offer):
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

    def __init__(self, submit):
        self.submit = submit

    def count_images(self, field, size):
        return 1
