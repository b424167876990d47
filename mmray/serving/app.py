"""The application: HTTP -> samples -> a backend -> answers. Knows no Ray.

A backend is whatever scores samples: in a cluster the replicas of ``engine.replicas``, in a test a
Predictor. Every refusal leaves as a problem (RFC 9457), see ``responses``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mmray import __version__
from mmray.archive.rows import Sample
from mmray.errors import BadRow, MmrayError, RunError
from mmray.serving import bodies, pages, responses, schema
from mmray.serving.answers import Busy, Outcome, Refused, Result
from mmray.serving.responses import Observer
from mmray.serving.settings import ServeConfig

log = logging.getLogger(__name__)

SMALL_BYTES = 2 << 20  # 0.2 ms of a form, 16 of JSON, whose C code keeps the lock in a thread, too

#: What a request is told, and the outcomes of its pairs.
Answer = tuple[dict[str, Any], Sequence[Outcome]]


class Backend(Protocol):
    """What scores the samples of a request."""

    @property
    def card(self) -> Mapping[str, Any]: ...

    @property
    def examples(self) -> Sequence[Mapping[str, Any]]: ...

    async def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample, in order. Raises Busy, and RunError when the model fails."""

    async def check(self) -> Mapping[str, Any]:
        """What the golden pairs say; raises MmrayError when nobody here scores them right."""


@dataclass(slots=True)
class _Server:
    """The handlers of one application, and what they share."""

    backend: Backend
    cfg: ServeConfig
    token: bytes | None  # sha256
    ongoing: int = 0  # requests that are scored
    held: int = 0  # bytes of their bodies

    @property
    def full(self) -> bool:
        return self.ongoing >= self.cfg.decode.max_ongoing

    # --- scoring ---------------------------------------------------------------------------------

    async def score(self, request: Request) -> Response:
        body = bodies.One(request.headers.get("content-type", ""), self.cfg.limits)

        async def answer() -> Answer:
            # A small body is read sooner than another thread is woken.
            if request.state.bytes <= SMALL_BYTES:
                sample = body.sample()
            else:
                sample = await asyncio.to_thread(body.sample)
            (outcome,) = await self.backend.score([sample])
            if isinstance(outcome, BadRow):
                raise Refused.of_row(outcome)
            return outcome.encode(), [outcome]

        return await self._scored(request, self.cfg.limits.body_bytes, body.take, answer)

    async def score_batch(self, request: Request) -> Response:
        content_type = request.headers.get("content-type", "")
        chunks: list[bytes] = []

        async def answer() -> Answer:
            read = partial(bodies.several, chunks, content_type, self.cfg.limits)
            items = await asyncio.to_thread(read)
            samples = [item for item in items if isinstance(item, Sample)]
            scored = await self.backend.score(samples) if samples else []
            left = iter(scored)
            results = [next(left) if isinstance(item, Sample) else item for item in items]
            return {"results": [_entry(result) for result in results]}, scored

        return await self._scored(request, self.cfg.limits.batch_bytes, chunks.append, answer)

    async def _scored(
        self,
        request: Request,
        most_bytes: int,
        take: Callable[[bytes], None],
        answer: Callable[[], Awaitable[Answer]],
    ) -> Response:
        """One request within its deadline: ``take`` has its body as it comes, then it is answered;
        the browser's tools, and whoever asks why it took so long, are told how much of its time was
        decoding and how much the model's, of several pairs those of the slowest (Server-Timing)."""
        began = time.perf_counter()
        self._check_headers(request)
        self._check_token(request)
        self.ongoing += 1
        try:
            async with asyncio.timeout(self.cfg.deadlines.request_s):
                await self._read(request, most_bytes, take)
                found, scored = await answer()
        except TimeoutError:
            raise Refused(
                504, "too slow", f"no answer within {self.cfg.deadlines.request_s:g} s"
            ) from None
        except Busy:
            raise self.busy() from None
        except RunError:
            log.exception("the model failed")
            raise Refused(500, "the model failed") from None
        finally:
            self.ongoing -= 1
            self.held -= getattr(request.state, "bytes", 0)
        results = [each for each in scored if isinstance(each, Result)]
        model = max((each.model_s for each in results), default=0.0)
        decode = max((each.decode_s for each in results), default=0.0)
        total = time.perf_counter() - began
        found |= {"seconds": round(total, 6), "request_id": responses.id_of(request)}
        parts = {"decode": decode, "model": model, "total": total}
        timing = ", ".join(f"{part};dur={seconds * 1e3:.3f}" for part, seconds in parts.items())
        return JSONResponse(found, headers={"Server-Timing": timing})

    async def _read(self, request: Request, most: int, take: Callable[[bytes], None]) -> None:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "content encoding not supported", "send the body as it is")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise _too_large(int(declared), most)
        size, seconds = 0, self.cfg.deadlines.body_s
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    self.held += len(chunk)
                    request.state.bytes = size
                    if size > most:
                        raise _too_large(size, most)
                    if self.held > self.cfg.limits.held_bytes:
                        raise Busy("too many bytes in work")
                    take(chunk)
        except TimeoutError:
            raise Refused(
                408, "body too slow", f"not all there after {seconds:g} s", Connection="close"
            ) from None
        except ClientDisconnect:
            raise Refused(400, "body cut", "the connection ended before the body did") from None

    def busy(self) -> Refused:
        wait = self.cfg.deadlines.retry_after_s
        return Refused(503, "too busy", f"try again in {wait} s", Retry_After=str(wait))

    # --- about the server ------------------------------------------------------------------------

    async def model(self, request: Request) -> Response:
        self._check_token(request)
        return JSONResponse(self.backend.card)

    async def examples(self, request: Request) -> Response:
        self._check_token(request)
        return JSONResponse({"examples": self.backend.examples})

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _request: Request) -> Response:
        wait = str(self.cfg.deadlines.retry_after_s)
        try:
            async with asyncio.timeout(self.cfg.deadlines.request_s):
                return JSONResponse({"status": "ready", **await self.backend.check()})
        except (TimeoutError, MmrayError):
            raise Refused(503, "not ready", Retry_After=wait) from None

    def _check_headers(self, request: Request) -> None:
        size = sum(len(name) + len(value) for name, value in request.headers.raw)
        most = self.cfg.limits.header_bytes
        if size > most:
            raise Refused(431, "headers too large", f"{size} bytes, cap {most}", Connection="close")

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(shown.strip().encode("utf-8", "replace")).digest()
        if not hmac.compare_digest(digest, self.token) or scheme.lower() != "bearer":
            raise Refused(401, "no valid token", WWW_Authenticate="Bearer")


def _entry(result: Outcome | Refused) -> dict[str, Any]:
    if isinstance(result, Result):
        return result.encode()
    refused = Refused.of_row(result) if isinstance(result, BadRow) else result
    return {"error": refused.problem()}


def _too_large(size: int, most: int) -> Refused:
    return Refused(413, "body too large", f"{size} bytes, cap {most}", Connection="close")


class Application(FastAPI):
    """Scoring goes to its handlers directly: FastAPI's way to them takes as long as they do. Where
    too many requests are in work, one more is refused before anything of it is looked at."""

    def __init__(self, server: _Server, *, needs_token: bool, observe: Observer) -> None:
        super().__init__(
            title="mmray", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
        )
        self._server = server
        schema.add_routes(self, server, server.backend.card, needs_token=needs_token)
        pages.add_routes(self)
        self.add_exception_handler(Refused, responses.refused)
        self.add_exception_handler(HTTPException, responses.http_error)
        self.add_middleware(responses.Logged, observe=observe)
        found = (route for route in self.routes if isinstance(route, APIRoute))
        routes = {route.path: route for route in found if "POST" in (route.methods or ())}
        self._direct, self._scoring = responses.Direct(routes, observe), frozenset(routes)
        self._turned_away = responses.TurnedAway(server.busy(), observe)

    @property
    def full(self) -> bool:
        """Whether a request to score that comes now is refused."""
        return self._server.full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") != "POST" or scope["path"] not in self._scoring:
            await super().__call__(scope, receive, send)
        elif self.full:
            await self._turned_away(scope, receive, send)
        else:
            await self._direct(scope, receive, send)


def build(
    backend: Backend,
    cfg: ServeConfig,
    token: bytes | None,
    observe: Observer = lambda path, status, seconds: None,
) -> Application:
    """The application over ``backend``; ``token`` as of ``settings.token_of``."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it quotes what it reads
    server = _Server(backend, cfg, token)
    return Application(server, needs_token=token is not None, observe=observe)
