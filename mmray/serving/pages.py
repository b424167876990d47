"""The pages for people: ``/`` to try the model, ``/docs`` to read of the routes. No outside assets,
which the machine may not reach and a visitor need not fetch."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

#: Nothing but what this server sends: no script, style, picture or connection from elsewhere.
#: ``data:`` and ``blob:`` are the pictures that a visitor picks.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
PATHS = {
    "/": "index.html",
    "/docs": "docs.html",
    "/assets/page.js": "page.js",
    "/assets/docs.js": "docs.js",
    "/assets/page.css": "page.css",
}


def add_routes(app: FastAPI) -> None:
    for path, name in PATHS.items():
        _add(app, path, name)


def _add(app: FastAPI, path: str, name: str) -> None:
    content = files("mmray.serving").joinpath("web", name).read_bytes()
    kind = KINDS["." + name.rpartition(".")[2]]

    async def page() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    app.add_api_route(path, page, methods=["GET"], include_in_schema=False)
