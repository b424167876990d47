"""A dropped connection would cost a user pairs, or give one pair another's bytes."""

from __future__ import annotations

import gzip
import http.client
import io
import random
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import BLOCK, noise, pairs, read, tar_bytes

from mmray import s3, storage
from mmray.archive.rows import Sample
from mmray.errors import StorageError


class FaultyProxy:
    """Passes requests on to an S3 endpoint, and cuts the bodies of answers to GET."""

    def __init__(self, target: str) -> None:
        self.cut_at: int | None = None  # bytes of body before the connection drops
        self.cuts_left = 0
        self.cut_lists = False  # cut LIST answers, instead of objects
        self.ignore_ranges = False
        self.gets = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                proxy.forward(self, target)

            def do_GET(self) -> None:
                proxy.forward(self, target)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forward(self, request: BaseHTTPRequestHandler, target: str) -> None:
        upstream = http.client.HTTPConnection(urlsplit(target).netloc, timeout=20)
        headers = dict(request.headers.items())
        if self.ignore_ranges:
            headers.pop("Range", None)
        upstream.request(request.command, request.path, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        request.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                request.send_header(name, value)
        request.end_headers()
        if request.command == "GET" and ("list-type=2" in request.path) == self.cut_lists:
            self.gets += 1
            if self.cut_at is not None and self.cuts_left and len(body) > self.cut_at:
                self.cuts_left -= 1
                body = body[: self.cut_at]
                request.close_connection = True
        request.wfile.write(body)


@pytest.fixture
def proxy(s3_endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    faulty = FaultyProxy(s3_endpoint.url)
    monkeypatch.setattr(s3.time, "sleep", lambda _seconds: None)
    yield faulty
    faulty.close()


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    count = 120
    table = pa.table({
        "id": [str(n) for n in range(count)],
        "image": [noise(n, 1500) for n in range(count)],
        "caption": [f"caption {n}" for n in range(count)],
    })  # fmt: skip
    pq.write_table(table, out, row_group_size=50, compression="none")
    return out.getvalue()


SHARDS = {
    "x.tar": tar_bytes(pairs(40, 1500)),
    "x.tar.gz": gzip.compress(tar_bytes(pairs(40, 1500)), mtime=0),
    "x.parquet": parquet_bytes(),
}


@pytest.fixture(params=SHARDS)
def archive(request: pytest.FixtureRequest, s3_endpoint: Any, tmp_path: Path) -> str:
    """One shard on S3."""
    root = str(s3_endpoint.bucket())
    storage.write_bytes(f"{root}/in/{request.param}", SHARDS[request.param])
    return f"{root}/in"


def undisturbed(root: str, tmp_path: Path) -> list[Sample]:
    name = next(storage.list_objects(root)).path
    (tmp_path / name).write_bytes(SHARDS[name])
    samples, (end,) = read(tmp_path, fields=("*",))
    assert end.problem is None
    assert len(samples) >= 40
    return samples


def test_a_connection_that_drops_anywhere_loses_nothing(
    archive: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(archive, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    size = next(storage.list_objects(archive)).size
    rng, dropped = random.Random(6), 0
    aligned = [block * BLOCK for block in rng.sample(range(size // BLOCK), 12)]
    for offset in [0, 1, size - 1, *aligned, *rng.sample(range(size), 12)]:
        proxy.cut_at, proxy.cuts_left = offset, 1
        samples, (end,) = read(archive, fields=("*",))
        assert samples == expected, offset
        assert (end.rows, end.problem) == (len(expected), None)
        dropped += 1 - proxy.cuts_left
    assert dropped >= 15  # a footer is read first, and ranges after it are short


@pytest.mark.parametrize("survives", [70_000, 100_001])
def test_connections_that_always_drop_after_a_while_still_get_there(
    proxy: FaultyProxy, s3_endpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    survives: int,
) -> None:  # fmt: skip
    data = tar_bytes(pairs(12, 90_000))
    root = str(s3_endpoint.bucket())
    storage.write_bytes(f"{root}/x.tar", data)
    (tmp_path / "x.tar").write_bytes(data)
    expected, _ = read(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.cut_at, proxy.cuts_left = survives, 1000
    samples, (end,) = read(root)
    assert samples == expected
    assert end.problem is None
    assert proxy.gets > len(data) // survives


def test_a_listing_whose_connection_drops_anywhere_is_whole(
    proxy: FaultyProxy, s3_endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore takes an empty body for an empty listing: no shards, no error."""
    root = str(s3_endpoint.bucket())
    names = [f"{number:03d}.tar" for number in range(30)]
    for name in names:
        storage.write_bytes(f"{root}/{name}", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.cut_lists = True
    for offset in (0, 1, 40, 100, 1000, 5000):
        proxy.cut_at, proxy.cuts_left = offset, 2
        assert [item.path for item in storage.list_objects(root)] == names
        assert proxy.cuts_left == 0
    proxy.cut_at, proxy.cuts_left = 0, 100
    with pytest.raises(StorageError, match="empty bodies"):
        list(storage.list_objects(root))


def test_an_endpoint_that_stays_away_is_an_error_not_a_short_shard(
    archive: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.cut_at, proxy.cuts_left = 0, 1000
    with pytest.raises(StorageError, match=archive):
        read(archive)


def test_a_server_that_ignores_ranges_is_refused(
    archive: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on "at byte N" with the bytes from 0 would give wrong pictures in silence."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.cut_at, proxy.cuts_left, proxy.ignore_ranges = 40_000, 1, True
    with pytest.raises(StorageError, match="range"):
        read(archive)
