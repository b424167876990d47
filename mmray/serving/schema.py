"""The routes under ``/v1``, and what OpenAPI says of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mmray.serving.answers import PROBLEM
from mmray.serving.bodies import FORM, JSON, NDJSON

OPENAPI = "/openapi.json"
BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"

Handler = Callable[[Request], Awaitable[Response]]
Headers = dict[str, dict[str, Any]]  # as OpenAPI describes them, by name


class Handlers(Protocol):
    async def score(self, request: Request) -> Response: ...
    async def score_batch(self, request: Request) -> Response: ...
    async def model(self, request: Request) -> Response: ...
    async def examples(self, request: Request) -> Response: ...
    async def live(self, request: Request) -> Response: ...
    async def ready(self, request: Request) -> Response: ...


# --- what goes in and comes out ------------------------------------------------------------------


class Problem(BaseModel):
    """Why there is no score (RFC 9457)."""

    type: str
    title: str
    status: int
    reason: Annotated[str, Field(description="a stable phrase, as in batch scoring")]
    detail: Annotated[str | None, Field(description="what was found")] = None
    stage: Annotated[str | None, Field(description="read, image, caption or predict")] = None
    request_id: str | None = None


class Score(BaseModel):
    """One pair's scores; a task may add fields."""

    label: str | None = None
    scores: Annotated[dict[str, float], Field(description="probability by label")]
    model: Annotated[str, Field(description="which bundle: the start of its fingerprint")]


class Scored(Score):
    seconds: Annotated[float, Field(description="that the server took, body included")]
    request_id: str


class NoScore(BaseModel):
    error: Problem


class ScoredBatch(BaseModel):
    """An entry a pair, in order."""

    results: list[Score | NoScore]
    seconds: float
    request_id: str


class Model(BaseModel):
    task: str
    labels: list[str]
    fingerprint: str
    inputs: Annotated[dict[str, str], Field(description="image, caption: required|optional|unused")]
    preprocess: dict[str, Any]
    limits: dict[str, int]
    metrics: dict[str, Any]
    mmray: str


class Example(BaseModel):
    image: Annotated[str | None, Field(description="base64")]
    caption: str | None


class Examples(BaseModel):
    examples: list[Example]


class Status(BaseModel):
    status: str


class Ready(Status):
    fingerprint: str
    golden_pairs: int
    golden_difference: Annotated[float, Field(description="largest, from what they must give")]


# --- bodies, which FastAPI does not read ---------------------------------------------------------


def _pair(card: Mapping[str, Any], **image: Any) -> dict[str, Any]:
    """A pair as ``card`` needs it: what must be there, and what may be null in JSON."""
    needs, in_json = card["inputs"], "contentEncoding" in image
    about: dict[str, dict[str, Any]] = {
        "image": image | ({} if needs["image"] == "unused" else {"minLength": 1}),
        "caption": {"minLength": 1} if needs["caption"] == "required" else {},
    }
    about["caption"]["maxLength"] = card["limits"]["caption_chars"]
    required = [name for name in about if needs[name] == "required"]
    for name in about:
        about[name]["type"] = ["string", "null"] if in_json and name not in required else "string"
    found = {
        "type": "object",
        "properties": about,
        "required": required,
        "additionalProperties": False,
    }
    if not required:  # one of them is: a pair of nothing has no score
        found["anyOf"] = [
            {"properties": {name: {"type": "string"}}, "required": [name]} for name in about
        ]
    return found


def _bodies(card: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By path, what is read there by content type."""
    parts = _pair(card, format="binary", description="a file: a part with a filename")
    pair = _pair(card, contentEncoding="base64", pattern=BASE64)
    several = {
        "type": "array",
        "items": {"anyOf": [pair, {"description": "anything else: an error in its place"}]},
        "minItems": 1,
        "maxItems": card["limits"]["batch_items"],
    }
    lines = several | {"description": "an item a line"}
    return {
        "/v1/score": {FORM: {"schema": parts}, JSON: {"schema": pair}},
        "/v1/score/batch": {JSON: {"schema": several}}
        | {kind: {"schema": lines} for kind in NDJSON},
    }


REFUSALS = {
    400: "the body cannot be read",
    401: "no valid bearer token",
    408: "the body came too slowly",
    413: "body, picture, caption or list too large",
    415: "a content type or an image format that is not read",
    422: "a pair that cannot be scored",
    431: "headers too large",
    500: "the model failed",
    503: "too busy; Retry-After says when to come again",
    504: "no answer in time",
}


TIMING: Headers = {
    "Server-Timing": {
        "description": "milliseconds: decode, model (its batch, in the model), total (as seconds)",
        "schema": {"type": "string"},
    }
}
HEADERS: dict[int, Headers] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    503: {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}},
}


def _responses(
    answer: type[BaseModel], statuses: Iterable[int], headers: Headers | None = None
) -> dict[int | str, dict[str, Any]]:
    """What ``answer`` and the refusals look like; ``headers`` are those of the answer."""
    found: dict[int | str, dict[str, Any]] = {200: {"model": answer} | _with(headers or {})}
    for status in statuses:
        found[status] = {"description": REFUSALS[status], "model": Problem}
        found[status] |= _with(HEADERS.get(status, {}))
    return found


def _with(headers: Headers) -> dict[str, Any]:
    return {"headers": {n: {"required": True} | of for n, of in headers.items()}} if headers else {}


def add_routes(
    app: FastAPI, server: Handlers, card: Mapping[str, Any], *, needs_token: bool
) -> None:
    """The routes over a model of ``card``, of which the description tells what it reads."""
    bearer = [Depends(HTTPBearer(auto_error=False))] if needs_token else []
    guarded = (401,) if needs_token else ()
    scoring = (400, *guarded, 408, 413, 415, 422, 431, 500, 503, 504)
    content = _bodies(card)
    for path, handler, answer in (
        ("/v1/score", server.score, Scored),
        ("/v1/score/batch", server.score_batch, ScoredBatch),
    ):
        app.add_api_route(
            path,
            handler,
            methods=["POST"],
            response_model=None,
            responses=_responses(answer, scoring, TIMING),
            dependencies=bearer,
            openapi_extra={"requestBody": {"required": True, "content": content[path]}},
        )
    reading: tuple[tuple[str, Handler, type[BaseModel], tuple[int, ...]], ...] = (
        ("/v1/model", server.model, Model, guarded),
        ("/v1/examples", server.examples, Examples, guarded),
        ("/livez", server.live, Status, ()),
        ("/readyz", server.ready, Ready, (503,)),
    )
    for path, read, about, refusals in reading:
        app.add_api_route(
            path,
            read,
            methods=["GET"],
            response_model=None,
            responses=_responses(about, refusals),
            dependencies=bearer if 401 in refusals else [],
        )
    document = _as_problems(app.openapi())
    app.add_api_route(
        OPENAPI, lambda: JSONResponse(document), methods=["GET"], include_in_schema=False
    )


def _as_problems(document: dict[str, Any]) -> dict[str, Any]:
    """Every refusal's media type, which FastAPI gives as JSON."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and JSON in response.get("content", {}):
                    response["content"][PROBLEM] = response["content"].pop(JSON)
    return document
