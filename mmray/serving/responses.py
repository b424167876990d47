"""What every answer goes through: refusals become problems, and a line in the log.

Of a request only its id, sizes, the status and the reason are logged. Those that are turned away
because there is no room, a thousand a second in an overload, are counted there and not listed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from uuid import uuid4

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmray.serving.answers import PROBLEM, Refused
from mmray.serving.headers import plain_id

log = logging.getLogger(__name__)

SUM_S = 1.0  # between lines in the log about those that are turned away

#: Is told of every request, when it is over: path as routed, status, seconds.
Observer = Callable[[str, int, float], None]


def id_of(request: Request) -> str:
    """The request's id: the caller's ``X-Request-ID`` where it is a plain one, or a new one."""
    known: str | None = getattr(request.state, "id", None)
    if known is None:
        known = request.state.id = plain_id(request.headers.raw) or uuid4().hex
    return known


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    request.state.reason = error.reason
    return JSONResponse(error.problem(id_of(request)), error.status, error.headers, PROBLEM)


async def http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, as problems."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    headers = {name.replace("-", "_"): value for name, value in (error.headers or {}).items()}
    return await refused(request, Refused(error.status_code, phrase, **headers))


async def failed(request: Request, error: Exception) -> Response:
    """A bug of ours: what and where is for the log, without its text, which may quote a request."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    what, number = type(error).__name__, id_of(request)
    log.error("unexpected %s in %s:%s in request %s", what, where.name, where.lineno, number)
    return await refused(request, Refused(500, "unexpected error"))


class Logged:
    """One line a request: id, method, path as routed, status, reason, bytes, milliseconds."""

    def __init__(self, app: ASGIApp, observe: Observer) -> None:
        self.app, self.observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, began, status = Request(scope), time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:  # answered; further out, its text would be logged
            if status:
                raise  # the answer has begun
            await (await failed(request, error))(scope, receive, sending)
        finally:
            path, seconds = getattr(scope.get("route"), "path", "-"), time.perf_counter() - began
            self.observe(path, status, seconds)
            log.info(
                "%s %s %s %d %s %d bytes %d ms",
                id_of(request),
                "-" if path == "-" else scope["method"],
                path,
                status,
                getattr(request.state, "reason", "ok"),
                getattr(request.state, "bytes", 0),
                math.ceil(seconds * 1000),
            )


class Direct(Logged):
    """Requests whose path is that of a route, to its handler, with nothing between."""

    def __init__(self, routes: Mapping[str, APIRoute], observe: Observer) -> None:
        super().__init__(self._handled, observe)
        self._routes = routes

    async def _handled(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["route"] = self._routes[scope["path"]]
        request = Request(scope, receive)
        try:
            answer: Response = await route.endpoint(request)
        except Refused as error:
            answer = await refused(request, error)
        await answer(scope, receive, send)
        await asyncio.sleep(0)  # its bytes leave now, not when all is logged and counted


class TurnedAway:
    """Answers every request with the same refusal, at little cost to those that are scored. The
    log has one line for all of a second."""

    def __init__(self, refused: Refused, observe: Observer) -> None:
        self._refused, self._observe = refused, observe
        self._headers = [
            (name.lower().encode(), value.encode()) for name, value in refused.headers.items()
        ]
        self._headers.append((b"content-type", PROBLEM.encode()))
        self._count: Counter[str] = Counter()  # by path, not logged yet

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        if not self._count:
            asyncio.get_running_loop().call_later(SUM_S, self._log)
        self._count[scope["path"]] += 1
        self._observe(scope["path"], self._refused.status, 0.0)
        request_id = plain_id(scope["headers"]) or uuid4().hex
        body = json.dumps(self._refused.problem(request_id)).encode()
        headers = [*self._headers, (b"content-length", str(len(body)).encode())]
        status = self._refused.status
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _log(self) -> None:
        for path, count in self._count.items():
            told = count, SUM_S, path, self._refused.status, self._refused.reason
            log.info("%d requests turned away in %g s: POST %s %d %s", *told)
        self._count.clear()
