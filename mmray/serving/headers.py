"""Headers that nobody can read are refused before Serve, which takes all of them for UTF-8."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mmray.serving.answers import PROBLEM, Refused


class Readable:
    """Answers 400 to a request with a header that is not UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            b"".join(part for header in scope.get("headers", ()) for part in header).decode()
        except UnicodeDecodeError:
            refused = Refused(400, "header not UTF-8")
            answer = JSONResponse(refused.problem(), refused.status, refused.headers, PROBLEM)
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """For Serve, by ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``."""
    return [Middleware(Readable)]
