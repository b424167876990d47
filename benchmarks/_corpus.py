"""Archives and bundles that benchmarks share, the same on every machine."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mmray import bundle as bundles
from mmray.archive.rows import Sample
from mmray.config import Data, ImageModel, Model, Preprocess, TextModel, Train
from mmray.model import build_model, make_spec
from mmray.predict import golden_table
from mmray.preprocess import train_tokenizer
from mmray.quantize import quantize

WORDS = [
    "a",
    "the",
    "red",
    "old",
    "quiet",
    "loud",
    "sea",
    "tower",
    "moon",
    "storm",
    "under",
    "near",
    "above",
    "small",
    "great",
    "light",
    "dark",
    "street",
    "dog",
    "cat",
    "child",
    "man",
    "woman",
    "tree",
    "house",
    "river",
    "bridge",
    "morning",
    "evening",
    "photo",
    "picture",
    "shows",
    "with",
    "and",
]
LABELS = ("negative", "neutral", "positive")
INT8 = "-int8"
DISTINCT = 64  # different pictures; each archive repeats them


def photo(side: int, quality: int, seed: int) -> bytes:
    """A JPEG with detail at every scale, coarse strong and fine weak, as photos have it."""
    noise = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), 128.0)
    for cells, strength in ((4, 60), (16, 40), (64, 25), (side // 4, 12), (side, 6)):
        tile = Image.fromarray(noise.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layer = np.asarray(tile.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
        pixels += (layer / 128 - 1) * strength
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def caption(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, rng.integers(6, 18)))


def pictures(side: int, quality: int = 84, distinct: int = DISTINCT) -> list[bytes]:
    return [photo(side, quality, seed) for seed in range(distinct)]


def write_tars(root: Path, shards: list[int], images: list[bytes]) -> Path:
    """``<n>.tar`` with as many pairs as ``shards`` says, unless they are there."""
    root.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, count in enumerate(shards):
        path = root / f"{number:05d}.tar"
        if not path.exists():
            with tarfile.open(path.with_suffix(".part"), "w", format=tarfile.USTAR_FORMAT) as tar:
                for i in range(first, first + count):
                    _add(tar, f"{i:09d}.jpg", images[i % len(images)])
                    _add(tar, f"{i:09d}.txt", caption(i).encode())
            path.with_suffix(".part").rename(path)
        first += count
    return root


def write_labelled(root: Path, train: int, dev: int, shards: int, side: int) -> Path:
    """Tars of ``train`` + ``dev`` pairs with a label and a split, every picture another."""
    base = np.asarray(Image.open(io.BytesIO(photo(side, 95, 0))), dtype=np.int16)
    for number in range(shards):
        with tarfile.open(root / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(number, train + dev, shards):
                coarse = np.random.default_rng(i).integers(0, 120, (6, 6, 3), dtype=np.uint8)
                layer = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
                pixels = (base // 2 + np.asarray(layer)).clip(0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "JPEG", quality=84)
                _add(tar, f"{i:09d}.jpg", buffer.getvalue())
                _add(tar, f"{i:09d}.txt", f"{caption(i)} {i}".encode())
                split = "dev" if i < dev else "train"
                record = {"label": LABELS[i % len(LABELS)], "split": split}
                _add(tar, f"{i:09d}.json", json.dumps(record).encode())
    return root


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_parquet(root: Path, shards: list[int], images: list[bytes]) -> Path:
    """The same pairs as ``write_tars``, in Parquet files of row groups of 256."""
    root.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, count in enumerate(shards):
        path = root / f"{number:05d}.parquet"
        if not path.exists():
            ids = range(first, first + count)
            table = pa.table(
                {
                    "image": [images[i % len(images)] for i in ids],
                    "caption": [caption(i) for i in ids],
                }
            )
            pq.write_table(table, path, compression="none", row_group_size=256)
        first += count
    return root


def write_bundle(root: Path, encoder: str, seed: int = 0) -> Path:
    """An untrained bundle of a torchvision encoder at 224 px and a small text transformer; in 8
    bits where the encoder's name ends in ``-int8``."""
    if (root / "bundle.json").exists():
        return root
    if encoder.endswith(INT8):
        floats = write_bundle(root / "floats", encoder.removesuffix(INT8), seed)
        pairs = write_tars(root / "pairs", [DISTINCT], pictures(512))
        quantize(str(floats), str(pairs), str(root))
        return root
    preprocess = Preprocess()
    tokenizer = train_tokenizer((caption(i) for i in range(2000)), preprocess.text)
    spec = make_spec(
        Model(
            image=ImageModel(encoder=encoder),
            text=TextModel(encoder="transformer", dim=128, layers=2, heads=4),
        ),
        num_classes=len(LABELS),
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        max_tokens=preprocess.text.max_tokens,
        image_size=preprocess.image.size,
    )
    torch.manual_seed(seed)
    made = bundles.make(
        labels=LABELS,
        spec=spec,
        preprocess=preprocess,
        state_dict=build_model(spec).state_dict(),
        tokenizer=tokenizer,
        metrics={},
        training=bundles.Training(data=Data(archive="none"), seed=0, train=Train(), split={}),
    )
    samples = [Sample("golden", i, str(i), photo(256, 84, i), caption(i)) for i in range(8)]
    made.save(str(root), golden=golden_table(made, samples))
    return root
