"""A client of a server that `mmray serve` has started, in two forms: ``Client``, ``AsyncClient``.

    with Client("http://127.0.0.1:8000") as client:
        print(client.score(image=Path("cat.jpg").read_bytes(), caption="my cat").label)

Scoring twice changes nothing, so what a server that is busy, restarting or gone leaves undone is
asked again, no earlier than its ``Retry-After`` says.
"""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from mmray.errors import MmrayError

ASKED_AGAIN = (408, 429, 500, 502, 503, 504)
ATTEMPTS = 8
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0
MOST_WAITED_S = 60.0  # for one Retry-After; a server that asks for more is not waited for


class ServeError(MmrayError):
    """A server that cannot be reached, or that refuses the request as a whole."""

    def __init__(self, text: str, problem: Problem | None = None) -> None:
        super().__init__(text)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a pair has no score; ``reason`` is that of batch scoring."""

    status: int
    reason: str
    detail: str | None = None
    stage: str | None = None
    request_id: str | None = None

    def __str__(self) -> str:
        return self.reason if self.detail is None else f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Score:
    """One pair's scores: ``scores`` by label; ``model`` is the start of the bundle's fingerprint;
    ``more`` is what else the task gives."""

    label: str | None
    scores: Mapping[str, float]
    model: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """What is scored: encoded image bytes, caption; either may be missing where the model allows
    it."""

    image: bytes | None = None
    caption: str | None = None


T = TypeVar("T")
_Request = tuple[str, str, Mapping[str, Any]]  # method, path, arguments of httpx2
#: A conversation: yields a request or the seconds to wait, is sent the response or the error.
_Talk = Generator[_Request | float, "httpx2.Response | httpx2.TransportError", T]


class Client:
    """Blocking. ``token``: the bearer token, where the server asks for one; ``timeout_s``: of one
    attempt; ``attempts``: in all, before ServeError is raised."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._attempts = attempts
        self._http = httpx2.Client(base_url=url, headers=_headers(token), timeout=timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def score(self, image: bytes | None = None, caption: str | None = None) -> Score:
        """Raises ServeError; with ``problem`` where the server says why not."""
        return self._held(_score(Pair(image, caption), self._attempts))

    def score_batch(self, pairs: Sequence[Pair]) -> list[Score | Problem]:
        """Of every pair, in order, its scores or why it has none."""
        return self._held(_score_batch(pairs, self._attempts))

    def model(self) -> dict[str, Any]:
        """What is served: labels, what the model needs, limits."""
        return self._held(_asked(("GET", "/v1/model", {}), self._attempts))

    def ready(self) -> bool:
        """Whether somebody there scores the golden pairs right, now; asks once."""
        return self._held(_ready())

    def _held(self, talk: _Talk[T]) -> T:
        answer: httpx2.Response | httpx2.TransportError | None = None
        while True:
            try:
                step = next(talk) if answer is None else talk.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, float):
                time.sleep(step)
                answer = None
                continue
            method, path, arguments = step
            try:
                answer = self._http.request(method, path, **arguments)
            except httpx2.TransportError as error:
                answer = error


class AsyncClient:
    """``Client`` for asyncio."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._attempts = attempts
        self._http = httpx2.AsyncClient(base_url=url, headers=_headers(token), timeout=timeout_s)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def score(self, image: bytes | None = None, caption: str | None = None) -> Score:
        return await self._held(_score(Pair(image, caption), self._attempts))

    async def score_batch(self, pairs: Sequence[Pair]) -> list[Score | Problem]:
        return await self._held(_score_batch(pairs, self._attempts))

    async def model(self) -> dict[str, Any]:
        return await self._held(_asked(("GET", "/v1/model", {}), self._attempts))

    async def ready(self) -> bool:
        return await self._held(_ready())

    async def _held(self, talk: _Talk[T]) -> T:
        answer: httpx2.Response | httpx2.TransportError | None = None
        while True:
            try:
                step = next(talk) if answer is None else talk.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, float):
                await asyncio.sleep(step)
                answer = None
                continue
            method, path, arguments = step
            try:
                answer = await self._http.request(method, path, **arguments)
            except httpx2.TransportError as error:
                answer = error


# --- what is said, without saying how ------------------------------------------------------------


def _score(pair: Pair, attempts: int) -> _Talk[Score]:
    files = {}
    if pair.image is not None:
        files["image"] = ("image", pair.image)
    if pair.caption is not None:
        files["caption"] = (None, pair.caption.encode())  # type: ignore[assignment]
    # Without any part there is no multipart body; an empty object says the same.
    body: dict[str, Any] = {"files": files} if files else {"json": {}}
    return _score_of((yield from _asked(("POST", "/v1/score", body), attempts)))


def _score_batch(pairs: Sequence[Pair], attempts: int) -> _Talk[list[Score | Problem]]:
    items = [
        {
            "image": None if pair.image is None else base64.b64encode(pair.image).decode(),
            "caption": pair.caption,
        }
        for pair in pairs
    ]
    found = yield from _asked(("POST", "/v1/score/batch", {"json": items}), attempts)
    return [
        _problem_of(entry["error"]) if "error" in entry else _score_of(entry)
        for entry in found["results"]
    ]


def _ready() -> _Talk[bool]:
    answer = yield "GET", "/readyz", {}
    return isinstance(answer, httpx2.Response) and answer.status_code == 200


def _asked(request: _Request, attempts: int) -> _Talk[dict[str, Any]]:
    """The JSON of a request's answer, asked for up to ``attempts`` times. Raises ServeError."""
    for attempt in range(1, attempts + 1):
        answer = yield request
        wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
        if isinstance(answer, httpx2.TransportError):
            why = ServeError(f"no answer: {type(answer).__name__}: {answer}")
        elif answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
        else:
            why = _refusal(answer)
            asked = _retry_after(answer)
            if answer.status_code not in ASKED_AGAIN or asked > MOST_WAITED_S:
                raise why
            wait = max(wait, asked)
        if attempt < attempts:
            yield wait * random.uniform(1.0, 1.5)  # callers that were refused together come apart
    raise why


def _refusal(answer: httpx2.Response) -> ServeError:
    try:
        problem = _problem_of(answer.json())
    except (ValueError, TypeError, KeyError):  # not this server's: of something in front of it
        problem = Problem(answer.status_code, answer.text[:200] or "no reason given")
    return ServeError(f"HTTP {problem.status}: {problem}", problem)


def _retry_after(answer: httpx2.Response) -> float:
    """Seconds; of a date, which something in front of the server may send, those until then."""
    text = answer.headers.get("retry-after", "0")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _score_of(entry: Mapping[str, Any]) -> Score:
    known = ("label", "scores", "model", "seconds", "request_id")
    more = {name: value for name, value in entry.items() if name not in known}
    return Score(entry.get("label"), entry["scores"], entry["model"], more)


def _problem_of(tree: Mapping[str, Any]) -> Problem:
    optional = (tree.get(name) for name in ("detail", "stage", "request_id"))
    return Problem(tree["status"], tree["reason"], *optional)


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}
