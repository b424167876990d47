"""The description at /openapi.json held against the server, by requests made from it.

Every check of schemathesis is on, over requests that keep to the description and requests that do
not, made from a seed: the same ones each time.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import served
import tiny
from schemathesis import engine
from schemathesis.engine import events
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from mmray.archive.rows import Sample
from mmray.errors import MmrayError
from mmray.serving import app
from mmray.serving.answers import Busy, Outcome
from mmray.serving.bodies import FORM, JSON, NDJSON
from mmray.serving.schema import BASE64
from mmray.serving.settings import ServeConfig

TOKEN = "s3cret"
SCORE, BATCH = "POST /v1/score", "POST /v1/score/batch"
READING = [(f"GET {path}", None) for path in ("/v1/model", "/v1/examples", "/livez", "/readyz")]
#: The statuses that are right for a request that is not as described, and for one that is.
PASSING = {
    # 413: a caption or a list over its limit.
    "negative_data_rejection": ["400", "401", "405", "413", "415", "422"],
    # No schema says which bytes are a picture or that a caption is more than blanks; so a check
    # of our own, refused_for_what_is_in_it, says what these two may be for.
    "positive_data_acceptance": ["200", "415", "422"],
}
PICTURE = base64.b64encode(tiny.jpeg(1)).decode()
IN_BASE64 = re.compile(BASE64)


@schemathesis.check
def refused_for_what_is_in_it(
    _ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """A request as described is refused for its picture or its caption, never for its form."""
    as_described = case.meta is not None and case.meta.generation.mode.is_positive
    if as_described and response.status_code in (415, 422):
        assert response.json().get("stage") in ("image", "caption"), response.text


@schemathesis.serializer(*NDJSON)
def lines(_ctx: schemathesis.SerializationContext, items: Any) -> bytes:
    """An item a line; what is no list has none, since NDJSON cannot say anything else."""
    return "\n".join(map(json.dumps, items)).encode() if isinstance(items, list) else b""


@schemathesis.hook
def map_body(_ctx: schemathesis.HookContext, body: Any) -> Any:
    """Some of what is in base64 becomes a picture, which is not found by chance."""
    for item in body if isinstance(body, list) else [body]:
        text = item.get("image") if isinstance(item, dict) else None
        if isinstance(text, str) and IN_BASE64.fullmatch(text) and len(text) % 8:
            item["image"] = PICTURE
    return body


class Found:
    """What a run over a server found wrong, and the statuses it met by route and content type."""

    def __init__(
        self,
        application: ASGIApp,
        description: Mapping[str, Any] | None = None,
        passing: Mapping[str, list[str]] = PASSING,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.wrong: list[str] = []
        self.failed: set[str] = set()  # checks
        self.met: dict[tuple[str, str | None], set[int]] = {}
        given: dict[str, Any] = {
            "seed": 1,
            "continue-on-failure": True,
            "generation": {"max-examples": 20, "deterministic": True, "database": "none"},
            "checks": {name: {"expected-statuses": of} for name, of in passing.items()},
            "headers": dict(headers or {}),
        }
        schema = schemathesis.openapi.from_dict(
            dict(description or described(application)),
            config=schemathesis.Config.from_dict(given),
        )
        schema.app = application
        for event in engine.from_schema(schema).execute():
            self._take(event)

    def _take(self, event: events.EngineEvent) -> None:
        if isinstance(event, events.NonFatalError):
            self.wrong.append(f"{event.label}: {event.value}")
        elif isinstance(event, events.FatalError):
            raise event.exception
        elif isinstance(event, events.ScenarioFinished):
            for key, sent in event.recorder.interactions.items():
                case = event.recorder.cases[key].value
                if sent.response is not None:
                    met = self.met.setdefault((case.operation.label, case.media_type), set())
                    met.add(sent.response.status_code)
            for check in (check for of in event.recorder.checks.values() for check in of):
                if (info := check.failure_info) is not None:
                    self.failed.add(check.name)
                    why, request = info.failure.message[:1000], info.code_sample[:1000]
                    self.wrong.append(f"{event.recorder.label}: {check.name}: {why}\n{request}")

    def nothing(self) -> None:
        assert not self.wrong, "\n\n".join(self.wrong)


def described(application: ASGIApp) -> dict[str, Any]:
    found: dict[str, Any] = TestClient(application).get("/openapi.json").json()
    return found


def open_to_all(backend: app.Backend) -> ASGIApp:
    return app.build(backend, ServeConfig(), None)


def closed(backend: app.Backend) -> ASGIApp:
    return app.build(backend, ServeConfig(), hashlib.sha256(TOKEN.encode()).digest())


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> served.Local:
    return served.Local(tiny.bundle(str(tmp_path_factory.mktemp("schema") / "b")), ServeConfig())


def test_a_server_is_as_described(local: served.Local) -> None:
    found = Found(open_to_all(local))
    found.nothing()
    for route in (SCORE, FORM), (SCORE, JSON), (BATCH, JSON), *((BATCH, kind) for kind in NDJSON):
        assert found.met[route] >= {200, 413, 422}, route
    for route in READING:
        assert found.met[route] == {200, 405}, route


def test_a_server_with_a_token_is_as_described(local: served.Local) -> None:
    found = Found(closed(local), headers={"Authorization": f"Bearer {TOKEN}"})
    found.nothing()
    for route in (SCORE, FORM), (BATCH, JSON), *READING[:2]:
        assert found.met[route] >= {200, 401}, route


def test_a_server_that_takes_halves_of_pairs_is_as_described(tmp_path: Path) -> None:
    halves = served.Local(tiny.bundle(str(tmp_path / "b"), missing=True), ServeConfig())
    found = Found(open_to_all(halves))
    found.nothing()
    assert found.met[SCORE, FORM] & found.met[SCORE, JSON] >= {200, 422}


class Full:
    """A backend that has no room, and no replica that is ready."""

    def __init__(self, local: served.Local) -> None:
        self.card, self.examples = local.card, local.examples

    async def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        raise Busy("full")

    async def check(self) -> Mapping[str, Any]:
        raise MmrayError("nobody is ready")


def test_a_full_server_is_as_described(local: served.Local) -> None:
    passing = {name: [*statuses, "503"] for name, statuses in PASSING.items()}
    passing["not_a_server_error"] = ["200", "4xx", "503"]  # here 503 is the right answer
    found = Found(open_to_all(Full(local)), passing=passing)
    found.nothing()
    for route in (SCORE, JSON), (BATCH, JSON), ("GET /readyz", None):
        assert 503 in found.met[route], route


def test_what_is_described_wrong_is_found(local: served.Local) -> None:
    told = described(closed(local))  # of a server that asks for no token
    score = told["paths"]["/v1/score"]["post"]
    score["requestBody"]["content"][JSON]["schema"]["properties"]["url"] = {"type": "string"}
    del score["responses"]["422"]
    batch = told["paths"]["/v1/score/batch"]["post"]["requestBody"]["content"]
    batch[NDJSON[0]]["schema"]["maxItems"] = 2
    model = told["paths"]["/v1/model"]["get"]["responses"]["200"]
    model["content"] = {"text/plain": model["content"][JSON]}
    examples = told["paths"]["/v1/examples"]["get"]["responses"]["200"]
    examples["headers"] = {"X-Count": {"required": True, "schema": {"type": "integer"}}}
    told["components"]["schemas"]["Status"]["properties"]["status"] = {"type": "integer"}
    assert Found(open_to_all(local), told).failed == {
        "content_type_conformance",
        "ignored_auth",
        "missing_required_header",
        "negative_data_rejection",
        "refused_for_what_is_in_it",
        "response_headers_conformance",
        "response_schema_conformance",
        "status_code_conformance",
    }
