"""The application over a Predictor in this process: no Ray, no sockets."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image
from starlette.testclient import TestClient

from mmray import bundle as bundles
from mmray.archive.rows import Sample
from mmray.predict import Predictor
from mmray.serving import answers, app, card
from mmray.serving.settings import ServeConfig


class Local:
    """A backend that scores where it is asked."""

    def __init__(self, uri: str, cfg: ServeConfig) -> None:
        bundle = bundles.load(uri)
        self.predictor = Predictor(bundle, "cpu")
        self.preprocessor = card.preprocessor_of(bundle, cfg)
        self.card = card.card(bundle, self.preprocessor, bundles.read_manifest(uri).task, cfg)
        self.examples = card.examples(bundle, cfg.examples)
        self.before: Callable[[], Any] = lambda: None  # what a test does before a score

    async def score(self, samples: Sequence[Sample]) -> list[answers.Outcome]:
        waiting = self.before()
        if asyncio.iscoroutine(waiting):
            await waiting
        began = time.perf_counter()
        left, prepared = self.preprocessor.prepare_all(samples)
        decode_s = time.perf_counter() - began
        scored = self.predictor.score(left, prepared)
        found = answers.outcomes(scored.table, self.predictor.fingerprint, scored.seconds_predict)
        return [answers.timed(outcome, decode_s) for outcome in found]

    async def check(self) -> Mapping[str, Any]:
        assert self.predictor.golden is not None
        return {
            "fingerprint": self.predictor.fingerprint,
            "golden_pairs": self.predictor.golden.num_rows,
            "golden_difference": self.predictor.check_golden(),
        }


def client(backend: Local, cfg: ServeConfig, token: bytes | None = None) -> TestClient:
    return TestClient(app.build(backend, cfg, token))


BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def form(image: bytes | None = None, caption: bytes | None = None) -> bytes:
    """A multipart body as `curl -F` sends it."""
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=".encode()
    body = b""
    if image is not None:
        body += head + b'"image"; filename="p"\r\n\r\n' + image + b"\r\n"
    if caption is not None:
        body += head + b'"caption"\r\n\r\n' + caption + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def bodies(seed: int, count: int) -> Iterator[tuple[str, str, bytes]]:
    """Wrong requests: path, content type, body; the same for the same seed."""
    rng = np.random.default_rng(seed)
    good = form(tiny.jpeg(1), b"a caption")
    pair = json.dumps({"image": "aGk=", "caption": "x"}).encode()
    fixed = [
        ("/v1/score", FORM, b""),
        ("/v1/score", "multipart/form-data", good),
        ("/v1/score", "multipart/form-data; boundary=" + "x" * 300, good),
        ("/v1/score", FORM, form(None, b"\xff\xfe")),
        ("/v1/score", FORM, form(tiny.jpeg(1), b"\xff\xfe")),
        ("/v1/score", FORM, form(b"", b"")),
        ("/v1/score", FORM, form(png_bomb(), b"big")),
        ("/v1/score", "application/json", b"[" * 20_000),
        ("/v1/score", "application/json", b'{"caption":' * 50_000),
        ("/v1/score", "application/json", b'{"image": 7}'),
        ("/v1/score", "application/json", b'{"image": "***", "caption": "x"}'),
        ("/v1/score", "application/json", b'{"image": "http://169.254.169.254/", "caption": "x"}'),
        ("/v1/score", "application/json", b'{"image_url": "http://127.0.0.1/", "caption": "x"}'),
        ("/v1/score", "application/json", b'{"caption": "\xff"}'),
        ("/v1/score", "application/json", b'{"caption": "\\ud800", "image": "aGk="}'),
        ("/v1/score", "application/json", b'{"caption": ' + b"9" * 10_000 + b"}"),
        ("/v1/score", "application/json", "{}".encode("utf-16")),
        ("/v1/score", "application/xml", b"<a/>"),
        ("/v1/score", "", b"\x00"),
        ("/v1/score", "\u00e9/\u00ff", b"{}"),
        ("/v1/score/batch", "application/json", b"[]"),
        ("/v1/score/batch", "application/json", b"{}"),
        ("/v1/score/batch", "application/json", b"[" + b",".join([b"{}"] * 65) + b"]"),
        ("/v1/score/batch", "application/json", b"[1, null, [], {}, " + pair + b"]"),
        ("/v1/score/batch", "application/x-ndjson", pair + b"\nnonsense\n\xff\n{}\n"),
        ("/v1/score/batch", "application/x-ndjson", b"\n\n"),
        ("/v1/score/batch", FORM, good),
    ]
    for i in range(count):
        if i < len(fixed):
            yield fixed[i]
            continue
        base = [good, pair, b"[" + pair + b"]"][i % 3]
        kind = [FORM, "application/json", "application/json"][i % 3]
        body = bytearray(base[: rng.integers(1, len(base) + 1)] if i % 2 else base)
        for place in rng.integers(0, len(body), rng.integers(1, 8)):
            body[place] = rng.integers(0, 256)
        yield "/v1/score" + ("/batch" if i % 3 == 2 else ""), kind, bytes(body)


def png_bomb() -> bytes:
    """A picture of some kilobytes that declares a hundred million pixels."""
    sink = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(sink, "PNG", optimize=True)
    return sink.getvalue()


def bad_images(shared: Path) -> list[tuple[str, bytes]]:
    folder = shared / "data" / "bad-images"
    return [(p.name, p.read_bytes()) for p in sorted(folder.iterdir()) if p.name != "MANIFEST.csv"]
