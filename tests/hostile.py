"""An S3 endpoint that misbehaves: a proxy before a real one, which counts what it did.

Whether a request meets a fault, and which, follows from the seed, the request and how often it came
before: the same in every run, in whatever order requests arrive. A fault counts as injected when
it was sent, not when it was meant.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

#: kind -> the answer: status and code. The others are done to the connection.
ANSWERS = {
    "500": (500, "InternalError"),
    "SlowDown": (503, "SlowDown"),
    "expired": (403, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
}
ALWAYS = ("500", "SlowDown", "expired", "reset")
#: operation -> what can happen to it. "reset": in mid-body, or before the request was heard;
#: "short": half the body under the right Content-Length; "slow": the body trickles; "lost answer":
#: the request is carried out, the connection reset.
FAULTS = {
    "GET": (*ALWAYS, "short", "slow"),
    "LIST": (*ALWAYS, "short", "slow"),
    "HEAD": ALWAYS,
    "PUT": (*ALWAYS, "lost answer"),
    "POST": (*ALWAYS, "lost answer"),
    "DELETE": (*ALWAYS, "lost answer"),
}
IN_BODY = ("reset", "short", "slow")
KINDS = (*ALWAYS, "short", "slow", "lost answer")
SLICES, SLICE_S = 10, 0.02  # of a slow body
BURST_S = 0.25  # how much of a second's capacity may come at once


@dataclass
class Planned:
    kind: str
    operation: str | None
    path: str
    left: float
    lasts_s: float = 0.0


class HostileS3:
    """Serves ``url`` until closed; passes requests on to the endpoint ``target``.

    ``share`` of the requests meet a fault of one of the ``kinds``; more than ``capacity`` requests
    a second are refused with SlowDown. ``plan`` adds faults for certain requests.
    """

    def __init__(
        self,
        target: str,
        *,
        share: float = 0.0,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        capacity: float | None = None,
    ) -> None:
        self.share, self.kinds, self.seed, self.capacity = share, kinds, seed, capacity
        self.requests: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.arrivals: list[tuple[float, bool]] = []  # when, and whether above the capacity
        self.expired: set[str] = set()  # access keys that are refused
        self._planned: list[Planned] = []
        self._lasting = "", 0.0  # a kind that all requests meet, and until when
        self._seen: Counter[str] = Counter()
        self._tokens, self._filled = 0.0, time.monotonic()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy, self._server.target = self, urlsplit(target).netloc
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> HostileS3:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def plan(
        self,
        kind: str,
        operation: str | None = None,
        times: float = 1,
        path: str = "",
        lasts_s: float = 0.0,
    ) -> None:
        """The next requests of this ``operation`` (any), with ``path`` in their path, meet it; and
        from each on so does every request whatever, for as long as it ``lasts_s``."""
        with self._lock:
            self._planned.append(Planned(kind, operation, path, times, lasts_s))

    def relent(self) -> None:
        """Forget what is planned."""
        with self._lock:
            self._planned.clear()

    def choose(self, operation: str, path: str, signed: str) -> str | None:
        """The fault that this request, ``signed`` like this, is to meet."""
        with self._lock:
            self.requests[operation] += 1
            above = self._above_capacity()
            for planned in self._planned:
                fits = planned.operation in (None, operation) and planned.path in path
                if fits and planned.left > 0:
                    planned.left -= 1
                    self._lasting = planned.kind, time.monotonic() + planned.lasts_s
                    return planned.kind
            kind, until = self._lasting
            if time.monotonic() < until:
                return kind
            if above:
                return "SlowDown"
            if any(key in signed for key in self.expired):
                return "expired"
            request = f"{operation} {key_of(path)}"
            self._seen[request] += 1
            which = f"{self.seed} {request} {self._seen[request]}"
        chance = random.Random(which)
        if chance.random() >= self.share:
            return None
        possible = [kind for kind in self.kinds if kind in FAULTS[operation]]
        return chance.choice(possible) if possible else None

    def _above_capacity(self) -> bool:
        if self.capacity is None:
            return False
        now = time.monotonic()
        filled = self._tokens + (now - self._filled) * self.capacity
        self._tokens, self._filled = min(filled, max(1.0, self.capacity * BURST_S)), now
        above = self._tokens < 1
        self._tokens -= 0 if above else 1
        self.arrivals.append((now, above))
        return above

    def count(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1


def key_of(path: str) -> str:
    """What is asked of a bucket, whatever its name: ``/bucket-7/k``, ``/bucket-7?list-type=2``."""
    return re.sub("^/[^/?]*", "", path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: HostileS3
    target: str

    def shutdown_request(self, request: Any) -> None:
        """A connection that is to be reset ends without a farewell."""
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == _AT_ONCE:
            request.close()
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, and are killed, are the point of it."""


_AT_ONCE = struct.pack("ii", 1, 0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    _upstream: http.client.HTTPConnection | None = None

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        operation = "LIST" if "list-type=2" in self.path else self.command
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.proxy.choose(operation, self.path, self.headers.get("Authorization", ""))
        if kind in ANSWERS:
            self._refuse(kind)
        elif kind == "reset" and operation not in ("GET", "LIST"):
            self._reset(kind)
        else:
            answer, data = self._ask(body)
            if kind == "lost answer":
                self._reset(kind)
            else:
                self._answer(answer, data, kind)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _refuse(self, kind: str) -> None:
        self.server.proxy.count(kind)
        status, code = ANSWERS[kind]
        who = self.headers.get("Authorization", "")  # S3 quotes what it refuses
        body = f"<Error><Code>{code}</Code><Message>refused: {who}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self, kind: str) -> None:
        self.server.proxy.count(kind)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.close_connection = True

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        passed = {
            n: v for n, v in self.headers.items() if n.lower() not in ("expect", "connection")
        }
        self._upstream.request(self.command, self.path, body or None, passed)
        answer = self._upstream.getresponse()
        return answer, answer.read()

    def _answer(self, answer: http.client.HTTPResponse, data: bytes, kind: str | None) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") or "0" if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if kind not in IN_BODY or len(data) < 2 or answer.status >= 300:
            self.wfile.write(data)
        elif kind == "slow":
            self.server.proxy.count(kind)
            step = -(-len(data) // SLICES)
            for at in range(0, len(data), step):
                self.wfile.write(data[at : at + step])
                time.sleep(SLICE_S)
        else:
            self.wfile.write(data[: len(data) // 2])
            if kind == "reset":
                self._reset(kind)
            else:
                self.server.proxy.count(kind)
                self.close_connection = True

    def finish(self) -> None:
        super().finish()
        if self._upstream is not None:
            self._upstream.close()
