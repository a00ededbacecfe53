"""GET /metrics: the text format or OpenMetrics, as the scraper prefers, compressed if it may be."""

from __future__ import annotations

import asyncio
import gzip
import re
import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

# What can be had. A fixed set: what a scraper sends must not make more renderings.
ENCODERS: dict[str, Callable[[CollectorRegistry], bytes]] = {
    CONTENT_TYPE_PLAIN_0_0_4: generate_latest,
    openmetrics.CONTENT_TYPE_LATEST: openmetrics.generate_latest,
}
# gzip among what is accepted, unless its weight is 0. Source: RFC 9110, section 12.5.3.
GZIP = re.compile(r"(?:^|,)\s*gzip\s*(?!;\s*q=0(?:\.0*)?\s*(?:,|$))(?:[;,]|$)", re.IGNORECASE)
# A rendering keeps the event loop from everything else for a few milliseconds. However many ask,
# renderings take this share of its time at most.
LOOP_SHARE = 0.25


class MetricsHandler:
    """Scrapes share the next rendering: at once on a quiet port, a moment later in a flood.

    What a scraper gets was counted after it asked, always.

    Args:
        registry: What is exported.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._not_before = 0.0
        # Content type and compression -> the outcome that scrapers wait for.
        self._waiting: dict[tuple[str, bool], asyncio.Future[bytes]] = {}

    async def handle(self, request: web.Request) -> web.Response:
        """One scrape."""
        content_type = _content_type(",".join(request.headers.getall("Accept", [])))
        encodings = ",".join(request.headers.getall("Accept-Encoding", []))
        compressed = GZIP.search(encodings) is not None
        # Shielded: a scraper that leaves does not take the others' rendering with it.
        body = await asyncio.shield(self._next(content_type, compressed))
        response = web.Response(body=body, headers={"Content-Type": content_type})
        if compressed:
            response.headers["Content-Encoding"] = "gzip"
        return response

    def _next(self, content_type: str, compressed: bool) -> asyncio.Future[bytes]:
        loop = asyncio.get_running_loop()
        key = content_type, compressed
        if not self._waiting:
            loop.call_at(max(loop.time(), self._not_before), self._render, loop)
        if key not in self._waiting:
            self._waiting[key] = loop.create_future()
        return self._waiting[key]

    def _render(self, loop: asyncio.AbstractEventLoop) -> None:
        began = time.monotonic()
        waiting, self._waiting = self._waiting, {}
        for (content_type, compressed), outcome in waiting.items():
            try:
                body = ENCODERS[content_type](self._registry)
                outcome.set_result(gzip.compress(body) if compressed else body)
            except Exception as error:  # goes to those who wait
                outcome.set_exception(error)
        took_s = time.monotonic() - began
        self._not_before = loop.time() + took_s / LOOP_SHARE


def _content_type(accept: str) -> str:
    """OpenMetrics 1.0.0 if that, or OpenMetrics of no version, is among what is accepted."""
    for accepted in accept.replace(" ", "").split(","):
        kind, *parameters = accepted.split(";")
        versions = [text for text in parameters if text.startswith("version=")]
        if kind == "application/openmetrics-text" and versions in ([], ["version=1.0.0"]):
            return openmetrics.CONTENT_TYPE_LATEST
    return CONTENT_TYPE_PLAIN_0_0_4
