"""An S3 endpoint that pretends to hold a very large archive, for plan_million.py:

    python benchmarks/_million.py SHARDS DONE TEMPLATE.tar

Serves ``archive/`` (SHARDS tars, all with the bytes of the template) and ``out/`` (score files of
the first DONE shards, and whatever is put there) of the bucket ``million`` on loopback. Prints its
port. ``GET /_stats`` tells when which prefix was listed, and when the first shard was read.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 1000
ARCHIVE, SCORES = "archive/", "out/scores/"
WHEN = "2026-01-01T00:00:00.000Z"


def name(number: int) -> str:
    return f"{number // 1000:05d}/{number:08d}.tar"


class Store:
    """What the bucket holds; only what is put is kept."""

    def __init__(self, shards: int, done: int, template: bytes) -> None:
        self.shards, self.template = shards, template
        self.done = set(range(done))
        self.kept: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.stats: dict[str, float] = {"committed": 0}

    def note(self, what: str) -> None:
        now = time.time()
        with self.lock:
            self.stats.setdefault(f"{what}_first", now)
            self.stats[f"{what}_last"] = now

    def get(self, key: str) -> bytes | None:
        if key.startswith(ARCHIVE):
            self.note("read")
            return self.template
        return self.kept.get(key)

    def put(self, key: str, data: bytes) -> None:
        with self.lock:
            if key.startswith(SCORES):
                self.stats["committed"] += 1
            self.kept[key] = data

    def page(self, prefix: str, after: int) -> tuple[list[tuple[str, int]], int | None]:
        """Some keys and sizes below ``prefix``, and where to go on."""
        if prefix == ARCHIVE:
            self.note("list_archive")
            stop = min(after + PAGE, self.shards)
            rows = [(ARCHIVE + name(i), len(self.template)) for i in range(after, stop)]
            return rows, stop if stop < self.shards else None
        if prefix == SCORES:
            self.note("list_scores")
            stop = min(after + PAGE, len(self.done))
            rows = [(f"{SCORES}{name(i)}.parquet", 5000) for i in range(after, stop)]
            return rows, stop if stop < len(self.done) else None
        with self.lock:
            return [(k, len(v)) for k, v in sorted(self.kept.items()) if k.startswith(prefix)], None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    store: Store

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # else the client waits a second for it
        return True

    def log_message(self, *_: object) -> None: ...

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length") or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        if parts.path == "/_stats":
            self.answer(200, json.dumps(self.store.stats).encode())
        elif "list-type" in query:
            self.list(query.get("prefix", ""), int(query.get("continuation-token", "0")))
        else:
            self.object(unquote(parts.path).split("/", 2)[2])

    do_HEAD = do_GET  # noqa: N815

    def list(self, prefix: str, after: int) -> None:
        rows, following = self.store.page(prefix, after)
        items = "".join(
            f"<Contents><Key>{key}</Key><LastModified>{WHEN}</LastModified>"
            f"<ETag>&quot;e&quot;</ETag><Size>{size}</Size></Contents>"
            for key, size in rows
        )
        token = f"<NextContinuationToken>{following}</NextContinuationToken>" if following else ""
        more = "true" if following else "false"
        head = '<?xml version="1.0"?><ListBucketResult><Name>million</Name>'
        xml = f"{head}<IsTruncated>{more}</IsTruncated>{token}{items}</ListBucketResult>"
        self.answer(200, xml.encode(), Content_Type="application/xml")

    def object(self, key: str) -> None:
        data = self.store.get(key)
        if data is None:
            xml = b"<Error><Code>NoSuchKey</Code></Error>"
            self.answer(404, xml, Content_Type="application/xml")
            return
        asked = self.headers.get("Range")
        if asked is None:
            self.answer(200, data, ETag='"e"', Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT")
            return
        start, _, stop = asked.removeprefix("bytes=").partition("-")
        end = min(int(stop) + 1 if stop else len(data), len(data))
        where = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(206, data[int(start) : end], ETag='"e"', Content_Range=where)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            data = _unchunked(data)
        key = unquote(urlsplit(self.path).path).split("/", 2)[2]
        if self.headers.get("If-None-Match") and self.store.get(key) is not None:
            xml = b"<Error><Code>PreconditionFailed</Code></Error>"
            self.answer(412, xml, Content_Type="application/xml")
            return
        self.store.put(key, data)
        self.answer(200, ETag='"e"')

    def do_DELETE(self) -> None:
        key = unquote(urlsplit(self.path).path).split("/", 2)[2]
        with self.store.lock:
            self.store.kept.pop(key, None)
        self.answer(204)


def _unchunked(data: bytes) -> bytes:
    """The content of an ``aws-chunked`` body."""
    found, at = b"", 0
    while True:
        line = data.index(b"\r\n", at)
        size = int(data[at:line].split(b";")[0], 16)
        if size == 0:
            return found
        found += data[line + 2 : line + 2 + size]
        at = line + 2 + size + 2


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    shards, done, template = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    Handler.store = Store(shards, done, template.read_bytes())
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
