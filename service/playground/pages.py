"""The pages for people: / says what is served; /draw is a place to try it by hand."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template

from aiohttp import web
from aiohttp.typedefs import Handler

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Path on the status page: what is there.
LINKS = {
    "draw": "draw a digit and see what the model says",
    "metrics": "metrics, for Prometheus",
    "healthz": "readiness: 200 while calls are accepted",
    "livez": "liveness: 200 while the process makes progress",
}


def add_status_page(
    app: web.Application,
    *,
    is_ready: Callable[[], bool],
    describe: Callable[[], Mapping[str, str]],
    has_draw: bool,
) -> None:
    """Serves / with the current facts."""
    page = Template((STATIC / "status.html").read_text(encoding="utf-8"))
    links = {path: text for path, text in LINKS.items() if path != "draw" or has_draw}

    async def status(_: web.Request) -> web.Response:
        facts = "\n".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in describe().items()
        )
        items = "\n".join(f'<li><a href="{p}">/{p}</a> {text}</li>' for p, text in links.items())
        state = "SERVING" if is_ready() else "NOT SERVING"
        text = page.substitute(state=state, facts=facts, links=items)
        return web.Response(text=text, content_type="text/html")

    app.router.add_get("/", status)
    for name in ("page.css", "icon.svg"):
        app.router.add_get(f"/{name}", _file(name))


def add_draw_page(app: web.Application) -> None:
    """Serves /draw and what it loads."""
    app.router.add_get("/draw", _file("draw.html"))
    for name in ("draw.css", "draw.js"):
        app.router.add_get(f"/{name}", _file(name))


def _file(name: str) -> Handler:
    """Serves a file of the package, read once."""
    text = (STATIC / name).read_text(encoding="utf-8")
    kind = TYPES[Path(name).suffix]

    async def serve(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type=kind)

    return serve
