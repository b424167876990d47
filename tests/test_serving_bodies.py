"""A body that is read as it comes says what it says when it is read whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
import served

from mmray.archive.rows import Sample
from mmray.serving.answers import Refused
from mmray.serving.bodies import One
from mmray.serving.settings import Limits


def read(kind: str, chunks: Iterable[bytes]) -> Sample | tuple[int, str, str | None]:
    body = One(kind, Limits())
    for chunk in chunks:
        body.take(chunk)
    try:
        return body.sample()
    except Refused as refused:
        return refused.status, refused.reason, refused.detail


def test_a_form_is_the_same_wherever_it_is_cut() -> None:
    image = b"\xff\xd8" + b"\r\n--b0und" * 3 + b"\r\n--b0undaryX\r\r\n-" + bytes(range(256)) + b"\r"
    body = served.form(image, "caf\u00e9\r\n".encode())
    for cut in range(len(body) + 1):
        found = read(served.FORM, [body[:cut], body[cut:]])
        assert isinstance(found, Sample)
        assert (found.image, found.caption) == (image, "caf\u00e9\r\n")
    assert read(served.FORM, [bytes([byte]) for byte in body]) == found


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_body_is_refused_alike_however_it_comes(seed: int) -> None:
    rng, refused = np.random.default_rng(seed), 0
    for path, kind, body in served.bodies(seed, 300):
        if path != "/v1/score":
            continue
        at = [0, *sorted(rng.integers(0, len(body) + 1, 3).tolist()), len(body)]
        found = read(kind, [body[a:b] for a, b in itertools.pairwise(at)])
        whole = read(kind, [body])
        refused += isinstance(whole, tuple)
        if isinstance(whole, tuple) and whole[1] == "body not multipart":
            assert isinstance(found, tuple) and found[:2] == whole[:2]  # it tells of a place
        else:
            assert found == whole
    assert refused > 100
