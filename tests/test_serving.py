"""Serving without a server: bodies in, answers out, over a Predictor in this process."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from mmray import config
from mmray.archive.rows import Sample
from mmray.errors import BadRow, ConfigError, RunError
from mmray.serving import app
from mmray.serving.answers import Busy
from mmray.serving.headers import ORDERS, Door
from mmray.serving.responses import SUM_S
from mmray.serving.settings import Deadlines, Limits, ServeConfig, overrides, token_of

PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.bundle(str(tmp_path_factory.mktemp("served") / "bundle"))


@pytest.fixture(scope="module")
def local(uri: str) -> served.Local:
    return served.Local(uri, ServeConfig())


@pytest.fixture
def client(local: served.Local) -> Iterator[TestClient]:
    yield served.client(local, ServeConfig())
    local.before = lambda: None


def post(client: TestClient, body: bytes, kind: str = served.FORM, path: str = "/v1/score") -> Any:
    return client.post(path, content=body, headers={"content-type": kind.encode()})


def pair(seed: int) -> dict[str, str]:
    return {"image": base64.b64encode(tiny.jpeg(seed)).decode(), "caption": tiny.caption(seed)}


# --- answers -------------------------------------------------------------------------------------


def test_a_pair_gets_the_scores_of_the_batch_job_however_it_is_sent(
    client: TestClient, local: served.Local
) -> None:
    expected = local.predictor.score_table(
        [Sample("s", 0, "", tiny.jpeg(1), tiny.caption(1))]
    ).to_pylist()[0]
    for answer in (
        post(client, served.form(tiny.jpeg(1), tiny.caption(1).encode())),
        client.post("/v1/score", json=pair(1)),
    ):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["label"] == expected["label"]
        assert found["scores"] == {name: expected[f"p_{name}"] for name in tiny.LABELS}
        assert found["model"] == local.predictor.fingerprint[:12]
        assert found["seconds"] > 0 and found["request_id"]
        timing = dict(each.split(";dur=") for each in answer.headers["server-timing"].split(", "))
        decode, model, total = (float(timing[part]) for part in ("decode", "model", "total"))
        assert decode > 0 and model > 0 and decode + model < total
        assert total == pytest.approx(found["seconds"] * 1e3, abs=1e-2)


@pytest.mark.parametrize("kind", ["application/json", "application/x-ndjson"])
def test_a_batch_answers_every_pair_in_order_and_a_broken_one_costs_itself(
    client: TestClient, kind: str
) -> None:
    items = [pair(0), {"image": "***", "caption": "x"}, pair(2), {"caption": "alone"}, 7]
    lines = [json.dumps(item) for item in items]
    body = "\n".join(lines) if "nd" in kind else f"[{','.join(lines)}]"
    answer = post(client, body.encode(), kind, "/v1/score/batch")
    assert answer.status_code == 200
    results = answer.json()["results"]
    alone = [client.post("/v1/score", json=items[i]).json()["scores"] for i in (0, 2)]
    assert results[0]["scores"] == pytest.approx(alone[0], abs=1e-5)
    assert results[2]["scores"] == pytest.approx(alone[1], abs=1e-5)
    errors = [results[i]["error"] for i in (1, 3, 4)]
    assert [e["reason"] for e in errors] == ["image not base64", "no image", "not a pair"]
    assert {e["status"] for e in errors} == {422}


def test_the_reasons_are_those_of_batch_scoring(
    client: TestClient, local: served.Local, shared: Path
) -> None:
    pictures = served.bad_images(shared)
    samples = [Sample("s", i, name, data, "a sea") for i, (name, data) in enumerate(pictures)]
    _, prepared = local.preprocessor.prepare_all(samples)
    seen = set()
    for (name, data), sample, ready in zip(pictures, samples, prepared, strict=True):
        answer = post(client, served.form(data, b"a sea"))
        if ready is not None:
            assert answer.status_code == 200, name
            continue
        with pytest.raises(BadRow) as bad:
            local.preprocessor.prepare(sample)
        problem = answer.json()
        assert answer.headers["content-type"] == PROBLEM and answer.status_code in (413, 415, 422)
        assert (problem["reason"], problem["stage"]) == (bad.value.reason, bad.value.stage), name
        seen.add((problem["reason"], problem["status"]))
    assert {("image format not supported", 415), ("image truncated", 422)} <= seen


def test_what_is_wrong_is_the_callers_and_never_a_500(client: TestClient) -> None:
    for path, kind, body in served.bodies(0, 300):
        answer = post(client, body, kind, path)
        assert answer.status_code < 500, (path, kind, body[:80], answer.text)
        if answer.status_code != 200:
            assert answer.headers["content-type"] == PROBLEM
            assert answer.json()["status"] == answer.status_code and answer.json()["reason"]


@pytest.mark.parametrize(
    ("path", "kind", "body", "status", "reason"),
    [
        ("/v1/score", served.FORM, served.form(b"x", b"\xff"), 422, "caption not UTF-8"),
        ("/v1/score", served.FORM, served.form(b"x", b"y")[:-9], 400, "body not multipart"),
        ("/v1/score", "text/plain", b"x", 415, "content type not supported"),
        ("/v1/score", "application/json", b"{", 400, "body not JSON"),
        ("/v1/score", "application/json", b"[" * 20_000, 400, "body not JSON"),
        ("/v1/score", "application/json", b'{"image_url": "http://x/"}', 422, "unknown field"),
        ("/v1/score", served.FORM, served.form(served.png_bomb(), b"x"), 413, "image too large"),
        ("/v1/score/batch", "application/json", b"{}", 422, "not a list"),
        ("/v1/score", "application/json", b"[" + b"[]," * 20_000 + b"1]", 413, "too many values"),
        ("/v1/score/batch", "application/x-ndjson", b"\n" * 200, 413, "too many pairs"),
        ("/v1/score/batch", "application/json", b"[" + b"1," * 64 + b"1]", 413, "too many pairs"),
    ],
)
def test_a_refusal_says_why(
    client: TestClient, path: str, kind: str, body: bytes, status: int, reason: str
) -> None:
    answer = post(client, body, kind, path)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)


# --- limits --------------------------------------------------------------------------------------


def test_a_request_that_is_too_large_is_refused(local: served.Local) -> None:
    limits = Limits(body_bytes=2000, caption_chars=50, header_bytes=4000)
    client = served.client(local, ServeConfig(limits=limits))
    good = served.form(tiny.jpeg(1), b"short")
    assert post(client, good).status_code == 200
    for body in (good + b" " * 2000, iter([b" " * 1000] * 3)):
        answer = client.post("/v1/score", content=body, headers={"content-type": served.FORM})
        assert (answer.status_code, answer.json()["reason"]) == (413, "body too large")
    answer = post(client, served.form(None, b"x" * 51))
    assert (answer.status_code, answer.json()["reason"]) == (413, "caption too long")
    answer = client.post("/v1/score", content=good, headers={"x-much": "x" * 5000})
    assert (answer.status_code, answer.json()["reason"]) == (431, "headers too large")
    packed = {"content-type": served.FORM, "content-encoding": "gzip"}
    assert client.post("/v1/score", content=good, headers=packed).status_code == 415


async def _trickle(app: Any, cfg: ServeConfig, body: bytes) -> int:
    """The status of a request whose sender pauses for good after ``body``."""
    status = 0

    async def receive() -> dict[str, Any]:
        nonlocal body
        if not body:
            await asyncio.sleep(60)
        part, body = body, b""
        return {"type": "http.request", "body": part, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/score",
        "query_string": b"",
        "headers": [(b"content-type", served.FORM.encode())],
    }
    await asyncio.wait_for(app(scope, receive, send), 10)
    return status


def test_a_slow_sender_is_cut_off_and_a_slow_score_too(local: served.Local) -> None:
    cfg = ServeConfig(deadlines=Deadlines(body_s=0.2, request_s=0.4, decode_s=0.2))
    client = served.client(local, cfg)
    assert asyncio.run(_trickle(client.app, cfg, b"--b0undary")) == 408
    local.before = lambda: asyncio.sleep(5)
    answer = post(client, served.form(tiny.jpeg(1), b"x"))
    assert (answer.status_code, answer.json()["reason"]) == (504, "too slow")
    local.before = lambda: None


def test_a_server_that_is_full_or_broken_says_so(client: TestClient, local: served.Local) -> None:
    good = served.form(tiny.jpeg(1), b"x")
    for error, status, reason in (
        (Busy("full"), 503, "too busy"),
        (RunError("no GPU"), 500, "the model failed"),
    ):

        async def fail(error: Exception = error) -> None:
            raise error

        local.before = fail
        answer = post(client, good)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert "no GPU" not in answer.text


def test_at_the_door_orders_are_taken_away_and_a_full_server_answers_past_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Serve would make of a caller's headers: its own timeout, another id."""
    seen: list[dict[bytes, bytes]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))
        await JSONResponse({"behind": True})(scope, receive, send)

    class Full:
        full = True

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            answer = JSONResponse({"id": Request(scope).headers["x-request-id"]}, 503)
            await answer(scope, receive, send)

    door = TestClient(Door(behind))
    orders = {"x-request-timeout-seconds": "0.001", "x-session-id": "a", "x-other": "b"}
    for asked, kept in (("mine-1", True), ("no good", False), ("x" * 65, False), ("", False)):
        door.post("/v1/score", headers={**orders, "x-request-id": asked})
        assert not ORDERS & seen[-1].keys() and seen[-1][b"x-other"] == b"b"
        assert (seen[-1][b"x-request-id"] == asked.encode()) == kept
    monkeypatch.setattr(Door, "application", Full())
    answer = door.post("/v1/score")
    assert answer.status_code == 503 and answer.json()["id"] == answer.headers["x-request-id"]
    assert door.get("/livez").json() == {"behind": True}


def test_a_server_that_is_full_says_so_before_it_reads_and_logs_that_in_sums(
    local: served.Local, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int]] = []
    made = app.build(
        local, ServeConfig(), None, lambda path, status, _: told.append((path, status))
    )
    assert not made.full
    made._server.ongoing = ServeConfig().decode.max_ongoing
    assert made.full
    with TestClient(made) as client, caplog.at_level(logging.INFO, "mmray.serving"):
        for number in ("mine-1", "mine-2", "no good"):
            answer = client.post("/v1/score", content=b"", headers={"x-request-id": number})
            assert (answer.status_code, answer.json()["reason"]) == (503, "too busy")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == PROBLEM
            assert (answer.json()["request_id"] == number) == number.startswith("mine")
        assert client.get("/livez").status_code == 200
        time.sleep(SUM_S + 0.2)
    assert told == [("/v1/score", 503)] * 3 + [("/livez", 200)]
    assert caplog.text.count(" 503 ") == 1
    assert "3 requests turned away in 1 s: POST /v1/score 503 too busy" in caplog.text


def test_an_error_nobody_thought_of_is_counted_and_quotes_nothing(
    local: served.Local, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int]] = []
    made = app.build(
        local, ServeConfig(), None, lambda path, status, _: told.append((path, status))
    )

    def fail() -> None:
        raise ValueError("CONFIDENTIAL")

    local.before = fail
    with TestClient(made) as client, caplog.at_level(logging.INFO, "mmray.serving"):
        answer = post(client, served.form(tiny.jpeg(1), b"x"))
    local.before = lambda: None
    assert (answer.status_code, answer.json()["reason"]) == (500, "unexpected error")
    assert told == [("/v1/score", 500)]
    assert "ValueError in fail" in caplog.text and " 500 unexpected error " in caplog.text
    assert "CONFIDENTIAL" not in caplog.text


def test_bodies_in_work_are_bounded_together(local: served.Local) -> None:
    limits = Limits(body_bytes=2000, batch_bytes=2000, held_bytes=3000)
    client = served.client(local, ServeConfig(limits=limits))
    good = served.form(tiny.jpeg(1), b"x")
    good += b" " * (1900 - len(good))
    inner: list[int] = []

    def meanwhile() -> None:
        local.before = lambda: None
        inner.extend(post(client, good).status_code for _ in range(2))

    with client:  # one event loop for all of its requests
        local.before = lambda: asyncio.to_thread(meanwhile)
        assert post(client, good).status_code == 200 and inner == [503, 503]
        assert post(client, good).status_code == 200


def test_a_token_is_asked_for_by_all_but_the_probes(local: served.Local) -> None:
    client = served.client(local, ServeConfig(), hashlib.sha256(b"s3cret").digest())
    good = served.form(tiny.jpeg(1), b"x")
    for shown in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
        for path in ("/v1/score", "/v1/score/batch"):
            answer = client.post(path, content=good, headers=shown)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/model", headers=shown).status_code == 401
        assert client.get("/v1/examples", headers=shown).status_code == 401
    head = {"authorization": "Bearer s3cret", "content-type": served.FORM}
    assert client.post("/v1/score", content=good, headers=head).status_code == 200
    assert {client.get(path).status_code for path in ("/livez", "/readyz", "/")} == {200}


def test_a_log_tells_sizes_and_reasons_and_nothing_of_what_was_sent(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mmray.serving"):
        post(client, served.form(b"CONFIDENTIAL", b"CONFIDENTIAL"))
        client.get("/CONFIDENTIAL?CONFIDENTIAL")
        head = {"x-request-id": "CONFIDENTIAL\\"}
        client.post("/v1/score", json={"CONFIDENTIAL": 1}, headers=head)
    assert "image not recognised" in caplog.text and " bytes " in caplog.text
    assert "CONFIDENTIAL" not in caplog.text


# --- about the server ----------------------------------------------------------------------------


def test_a_model_card_says_what_it_needs_and_gives_examples(
    client: TestClient, local: served.Local
) -> None:
    card = client.get("/v1/model").json()
    assert card["labels"] == list(tiny.LABELS) and card["task"] == "classify"
    assert card["fingerprint"] == local.predictor.fingerprint
    assert card["inputs"] == {"image": "required", "caption": "required"}
    assert card["limits"]["body_bytes"] == Limits().body_bytes
    assert card["preprocess"]["image"]["max_pixels"] == Limits().pixels
    examples = client.get("/v1/examples").json()["examples"]
    assert len(examples) == 4
    assert client.post("/v1/score", json=examples[0]).status_code == 200
    assert client.get("/readyz").json()["golden_difference"] < 0.01


def test_every_path_and_status_of_the_description_is_there(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            wrong = client.request("DELETE", path)
            assert wrong.status_code == 405 and wrong.headers["content-type"] == PROBLEM
            assert client.request(method, path).status_code != 404
            for status, response in operation["responses"].items():
                kind = "application/json" if int(status) < 400 else PROBLEM
                assert list(response["content"]) == [kind]
    assert set(document["paths"]["/v1/score"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
    }


def test_the_pages_need_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for asset in ("/assets/page.css", f"/assets/{'page' if path == '/' else 'docs'}.js"):
            assert asset in page.text
            found = client.get(asset)
            assert found.status_code == 200
            assert "http://" not in found.text and "https://" not in found.text


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["score.max_ongoing=20", "score.batch_rows=32"], ["max_ongoing", "32 x 1 = 32"]),
        (["score.target_ongoing=64"], ["target_ongoing", "max_ongoing (64)"]),
        (["score.min_replicas=3"], ["max_replicas", "min_replicas (3)"]),
        (["deadlines.request_s=5"], ["body_s", "request_s (5)"]),
        (
            ["score.batch_wait_s=2"]
            + [f"deadlines.{k}={v}" for k, v in (("request_s", 2), ("body_s", 1), ("decode_s", 1))],
            ["request_s", "batch_wait_s"],
        ),
        (["limits.body_bytes=100000000"], ["batch_bytes", "body_bytes"]),
        (
            ["score.max_replicas=40", "score.max_ongoing=16", "score.max_queued=8"],
            ["max_queued", "40 groups", "hold 24"],
        ),
        (  # a GPU has one more at hand
            ["score.gpus=1", "score.max_replicas=20", "score.max_ongoing=16", "score.max_queued=8"],
            ["max_queued", "40 groups", "hold 24"],
        ),
        (["score.max_replicas=2", "score.target_ongoing=6"], ["target_ongoing", "the 2 groups"]),
        (["token_env=A", "token_file=B"], ["token_file", "one of them"]),
        (["score.max_queued=-1"], ["max_queued"]),
        (["score.batch=1"], ["unknown key", "batch_rows"]),
        (["port=0"], ["port"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sets: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config.read(ServeConfig, None, sets)
    assert all(word in str(error.value) for word in words), error.value


def test_flags_become_settings() -> None:
    cfg = config.read(ServeConfig, None, overrides("0.0.0.0", 81, "2-5", "TOKEN", None))
    assert (cfg.host, cfg.port, cfg.token_env) == ("0.0.0.0", 81, "TOKEN")
    assert (cfg.score.min_replicas, cfg.score.max_replicas) == (2, 5)
    with pytest.raises(ConfigError, match="1-4"):
        overrides(None, None, "many", None, None)


def test_a_server_that_should_ask_for_a_token_does_not_start_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert token_of(ServeConfig()) is None
    monkeypatch.delenv("A_TOKEN", raising=False)
    for cfg in (ServeConfig(token_env="A_TOKEN"), ServeConfig(token_file=str(tmp_path / "t"))):
        with pytest.raises(ConfigError):
            token_of(cfg)
    monkeypatch.setenv("A_TOKEN", "geheimnißvoll")
    with pytest.raises(ConfigError, match="no header can carry"):
        token_of(ServeConfig(token_env="A_TOKEN"))
    monkeypatch.setenv("A_TOKEN", "s3cret")
    (tmp_path / "t").write_text("s3cret\n")
    digest = hashlib.sha256(b"s3cret").digest()
    assert token_of(ServeConfig(token_env="A_TOKEN")) == digest
    assert token_of(ServeConfig(token_file=str(tmp_path / "t"))) == digest
