"""What is looked at before Serve sees a request: headers, and whether there is room at all.

Serve takes all headers for UTF-8, and some of them for orders of the caller: how long to wait,
which replica to ask. A request that is refused costs Serve as much as one that is scored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from uuid import uuid4

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmray.serving.answers import PROBLEM, Refused

ID = b"x-request-id"
MAX_ID = 64  # characters
#: By which callers would tell Serve what to do. Deadlines are the server's.
ORDERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"x-session-id",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    }
)


class Fillable(Protocol):
    """An application that may be full."""

    @property
    def full(self) -> bool: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Door:
    """Answers 400 to a request with a header that is not UTF-8. Of all others it takes away what
    would order Serve about, and an id that is not plain: the one in the answer's header is that in
    its body and in the log. Where the application of this process is full, it asks that at once."""

    #: The application of this process, where there is one.
    application: Fillable | None = None

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        try:
            b"".join(part for header in headers for part in header).decode()
        except UnicodeDecodeError:
            refused = Refused(400, "header not UTF-8")
            answer = JSONResponse(refused.problem(), refused.status, refused.headers, PROBLEM)
            await answer(scope, receive, send)
            return
        request_id = plain_id(headers) or uuid4().hex
        scope["headers"] = [(n, v) for n, v in headers if n not in ORDERS and n != ID]
        scope["headers"].append((ID, request_id.encode()))
        application = Door.application
        if application is None or not application.full or scope["method"] != "POST":
            await self.app(scope, receive, send)  # Serve puts the id into the answer
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (ID, request_id.encode())]
            await send(message)

        await application(scope, receive, sending)


def plain_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The id that the caller gives, where it is letters, digits and dashes, and not too many."""
    asked = next((value for name, value in headers if name == ID), b"")
    plain = len(asked) <= MAX_ID and asked.isascii() and asked.replace(b"-", b"").isalnum()
    return asked.decode() if plain else None


def middlewares() -> list[Middleware]:
    """For Serve, by ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``."""
    return [Middleware(Door)]
