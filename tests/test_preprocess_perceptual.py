"""Without these a picture that was saved again would pass for another one, or all for the same."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.config import Data
from mmray.preprocess.perceptual import perceptual_hash

NEAR = Data(archive="").near


def encoded(image: Image.Image, format: str = "JPEG", **options: int) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def differing(one: bytes, other: bytes) -> int:
    """Bits in which the hashes of two pictures differ."""
    first, second = perceptual_hash(one), perceptual_hash(other)
    assert first is not None and second is not None
    return int(np.bitwise_count(np.frombuffer(first, "u1") ^ np.frombuffer(second, "u1")).sum())


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_saved_again_is_the_same(seed: int) -> None:
    image = tiny.scene(seed)
    first = encoded(image, quality=95)
    for again in (
        encoded(image, quality=60),
        encoded(image, "PNG"),
        encoded(image.resize((130, 130), Image.Resampling.LANCZOS)),
        encoded(image.resize((400, 300))),
        encoded(image.convert("L")),
        encoded(image.crop((0, 1, 255, 256))),  # a line of pixels less each way
    ):
        assert differing(first, again) <= NEAR


def test_different_pictures_differ_in_many_bits() -> None:
    pictures = [encoded(tiny.scene(seed)) for seed in range(12)] + [tiny.jpeg(i) for i in range(12)]
    least = min(differing(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert least > 4 * NEAR


def test_what_has_no_structure_has_no_hash() -> None:
    ramp = Image.linear_gradient("L")
    for image in (Image.new("RGB", (90, 60), "white"), Image.new("RGB", (9, 9), "red"), ramp):
        assert perceptual_hash(encoded(image)) is None
        assert perceptual_hash(encoded(image, "PNG")) is None


def test_what_is_no_picture_has_no_hash() -> None:
    for data in (b"", b"no picture", tiny.jpeg(0)[:200]):
        assert perceptual_hash(data) is None


def test_it_stays_as_it_is() -> None:
    """A bundle's seeded split is found again by hashes of later versions."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    made = perceptual_hash(encoded(Image.fromarray(pixels), "PNG"))
    assert (
        made is not None
        and made.hex() == "927790cd5d937b0507dbd0461740ac04ce8a374bbda70076f7b3be0cd770d896"
    )


@pytest.mark.parametrize("name", ["tweets", "fashion"])
def test_real_pictures_saved_again_are_found(shared: Path, name: str) -> None:
    root = str(shared / "data" / name)
    stream = read_shard(root, next(iter(list_shards(root))), stop=60)
    pictures = [s.image for s in stream if isinstance(s, Sample) and s.image]
    for data in pictures[::2]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        assert differing(data, encoded(image, quality=60)) <= NEAR
        assert differing(data, encoded(small, quality=85)) <= NEAR + 4
