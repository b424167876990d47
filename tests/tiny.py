"""The smallest real things: pictures, tars and an untrained but complete bundle."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

LABELS = ("calm", "wild")
WORDS = [
    "a",
    "sea",
    "under",
    "one",
    "quiet",
    "moon",
    "and",
    "two",
    "loud",
    "storms",
    "near",
    "the",
    "old",
    "red",
    "tower",
]


def jpeg(seed: int, size: int = 48) -> bytes:
    """A JPEG of a soft random pattern."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(sink, "JPEG")
    return sink.getvalue()


def scene(seed: int, size: int = 256) -> Image.Image:
    """A picture with structure of every size."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = random.integers(0, size, 4) / (1, 1, 3, 3)
        colour = tuple(random.integers(0, 256, 3).tolist())
        draw.ellipse((x, y, x + w, y + h), fill=colour)
    return image


def plain_jpeg(colour: tuple[int, int, int], seed: int, size: int = 48) -> bytes:
    """A JPEG of nearly one colour."""
    noise = np.random.default_rng(seed).integers(-20, 21, (size, size, 3))
    sink = io.BytesIO()
    picture = Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8))
    picture.save(sink, "JPEG")
    return sink.getvalue()


def caption(seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, 6))


def members(count: int, first: int = 0, **fields: Any) -> list[tuple[str, bytes]]:
    """Tar members of ``count`` good pairs: jpg, txt and json each."""
    found = []
    for i in range(first, first + count):
        label = LABELS[i % 2]
        extra = json.dumps({"label": label, "split": "dev" if i % 5 == 0 else "train", **fields})
        found += [
            (f"{i:05d}.jpg", jpeg(i)),
            (f"{i:05d}.txt", caption(i).encode()),
            (f"{i:05d}.json", extra.encode()),
        ]
    return found


def write_tar(path: Path, found: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in found:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_archive(root: Path, shards: Sequence[int]) -> Path:
    """Tars ``00000.tar``... with the given numbers of good pairs."""
    first = 0
    for i, count in enumerate(shards):
        write_tar(root / f"{i:05d}.tar", members(count, first))
        first += count
    return root


def bundle(
    uri: str,
    seed: int = 0,
    size: int = 32,
    max_pixels: int = 100_000_000,
    sharp: float = 1.0,
    **model: Any,
) -> str:
    """An untrained two-class image + text bundle of pictures of ``size`` pixels; differs by
    ``seed`` and the further keys of ``model``; the larger ``sharp``, the more scores differ."""
    import torch

    from mmray import bundle as bundles
    from mmray.archive.rows import Sample
    from mmray.config import (
        Data,
        ImagePreprocess,
        Model,
        Preprocess,
        TextModel,
        TextPreprocess,
        Train,
    )
    from mmray.model import build_model, make_spec
    from mmray.predict import golden_table
    from mmray.preprocess import train_tokenizer

    preprocess = Preprocess(
        image=ImagePreprocess(size=size, max_pixels=max_pixels),
        text=TextPreprocess(vocab_size=300, max_tokens=16),
    )
    tokenizer = train_tokenizer((caption(i) for i in range(50)), preprocess.text)
    spec = make_spec(
        Model(text=TextModel(encoder="bag", dim=16), hidden=16, **model),
        num_classes=2,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        max_tokens=16,
        image_size=size,
    )
    torch.manual_seed(seed)
    built = build_model(spec)
    with torch.no_grad():
        built.head[-1].weight.mul_(sharp)
    made = bundles.make(
        labels=LABELS,
        spec=spec,
        preprocess=preprocess,
        state_dict=built.state_dict(),
        tokenizer=tokenizer,
        metrics={},
        training=bundles.Training(
            data=Data(archive="none"), seed=seed, train=Train(precision="float32"), split={}
        ),
    )
    samples = [Sample("golden", i, str(i), jpeg(i), caption(i)) for i in range(4)]
    made.save(uri, golden=golden_table(made, samples))
    return uri
