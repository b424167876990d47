"""The client against a real socket: what it says, what it asks again, what it gives up on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mmray.client import AsyncClient, Client, Pair, Problem, Score, ServeError

SCORED = {"label": "calm", "scores": {"calm": 1.0}, "model": "m", "seconds": 0.1, "extra": 3}
BUSY = {"status": 503, "reason": "too busy"}


class Scripted(ThreadingHTTPServer):
    """Answers what a test wants, in order: (status, headers, tree), or None to hang up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, str], Any] | None] = []
        self.asked: list[tuple[float, str, bytes, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        head = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((time.monotonic(), self.path, body, head))
        answer = self.server.script.pop(0)
        if answer is None:
            self.connection.close()
            return
        status, headers, tree = answer
        data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        kind = "application/json" if status == 200 else "application/problem+json"
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(params=["sync", "async"])
def score(request: pytest.FixtureRequest, server: Scripted) -> Any:
    """``score(image, caption)`` by either client."""
    if request.param == "sync":
        client = Client(server.url, token="t", attempts=4)
        request.addfinalizer(client.close)
        return client.score

    async def once(*pair: Any) -> Score:
        async with AsyncClient(server.url, token="t", attempts=4) as client:
            return await client.score(*pair)

    return lambda *pair: asyncio.run(once(*pair))


def test_a_pair_is_sent_whole_and_its_scores_come_back(server: Scripted, score: Any) -> None:
    server.script = [(200, {}, SCORED)] * 2
    assert score(b"\x00\xffpicture", "Zürich 🧳") == Score("calm", {"calm": 1.0}, "m", {"extra": 3})
    _, path, body, headers = server.asked[0]
    assert path == "/v1/score" and headers["authorization"] == "Bearer t"
    assert b"\x00\xffpicture" in body and "Zürich 🧳".encode() in body
    score(None, "no picture")
    assert b'name="image"' not in server.asked[1][2]


def test_what_a_busy_or_dying_server_leaves_undone_is_asked_again(
    server: Scripted, score: Any
) -> None:
    server.script = [None, (503, {"retry-after": "1"}, BUSY), (500, {}, b""), (200, {}, SCORED)]
    assert score(b"x", "y").label == "calm"
    times = [asked[0] for asked in server.asked]
    assert times[2] - times[1] >= 1.0, "Retry-After was not waited for"
    date = formatdate(time.time() + 2.5, usegmt=True)  # whole seconds: from 1.5 on
    server.script = [(503, {"retry-after": date}, b"from a proxy"), (200, {}, SCORED)]
    assert score(b"x", "y").label == "calm"
    assert server.asked[-1][0] - server.asked[-2][0] >= 1.4, "nor was a date"


def test_what_is_the_callers_fault_is_not_asked_again(server: Scripted, score: Any) -> None:
    server.script = [(422, {}, {"status": 422, "reason": "image truncated", "stage": "image"})]
    with pytest.raises(ServeError, match="image truncated") as error:
        score(b"x", "y")
    assert error.value.problem == Problem(422, "image truncated", stage="image")
    assert len(server.asked) == 1


def test_it_gives_up_when_told_to_wait_for_ever_or_refused_too_often(
    server: Scripted, score: Any
) -> None:
    server.script = [(503, {"retry-after": "3600"}, BUSY)]
    with pytest.raises(ServeError, match="too busy"):
        score(b"x", "y")
    server.script = [(503, {}, BUSY)] * 4
    with pytest.raises(ServeError, match="too busy"):
        score(b"x", "y")
    assert len(server.asked) == 5 and not server.script


def test_a_batch_and_readiness(server: Scripted) -> None:
    entry = {"error": {"status": 422, "reason": "no image"}}
    server.script = [
        (200, {}, {"results": [SCORED, entry], "seconds": 1, "request_id": "r"}),
        (200, {}, {"status": "ready"}),
        (503, {}, BUSY),
        (200, {}, {"labels": ["calm"]}),
    ]
    with Client(server.url) as client:
        scored, problem = client.score_batch([Pair(b"\x00", "a"), Pair(None, "b")])
        assert isinstance(scored, Score) and problem == Problem(422, "no image")
        sent = json.loads(server.asked[0][2])
        assert sent == [{"image": "AA==", "caption": "a"}, {"image": None, "caption": "b"}]
        assert client.ready() and not client.ready()
        assert client.model() == {"labels": ["calm"]}


def test_a_server_that_is_not_there_is_one_error() -> None:
    with Client("http://127.0.0.1:9", attempts=2) as client:
        with pytest.raises(ServeError, match="no answer"):
            client.score(b"x", "y")
        assert not client.ready()
