"""What the ways to be fast do to scores: all pictures of an archive, beside plain torch in float32.

    python benchmarks/labels.py ARCHIVE BUNDLE [BUNDLE ...] [--json]

The bundles are of one model, which reads both and gives one label: as it was trained, and what
`mmray quantize` made of it. Plain torch in bfloat16 is ``limit`` of score_throughput.py; a bundle
is scored as `mmray score` does. For each way: how many rows have another label than in float32, and
than in plain bfloat16; the margin, best probability less the second, that float32 has at most where
its label is changed; and how far a row's probabilities are off, at the mean and at most.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from _arms import BATCH, Model

from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.bundle import load
from mmray.config import Precision
from mmray.predict import Predictor
from mmray.preprocess import Prepared

PLAIN = "plain torch, bf16"


@dataclass(frozen=True)
class Way:
    way: str
    rows: int
    labels_changed: int
    labels_unlike_plain_bf16: int
    largest_margin_changed: float
    mean_difference: float
    most_difference: float


def main() -> None:
    args = _arguments()
    threads = os.cpu_count() or 1
    predictors = {uri: Predictor(load(uri), "cpu", threads=threads) for uri in args.bundles}
    pairs = _pairs(args.archive, predictors[args.bundles[0]])
    exact = _plain(args.bundles[0], "float32", pairs)
    rough = _plain(args.bundles[0], "bf16", pairs)
    ways = [_way(PLAIN, rough, exact, rough)]
    for uri, predictor in predictors.items():
        scores = predictor.forward([row for row, _ in pairs]).probabilities
        ways.append(_way(f"{uri}, {predictor.computes_in}", scores, exact, rough))
    if args.json:
        print(json.dumps({"labels": [asdict(way) for way in ways]}))
    else:
        _show(ways)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("archive")
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _pairs(archive: str, predictor: Predictor) -> list[tuple[Prepared, str]]:
    """All that have a picture and can be scored, with their captions."""
    read = (item for shard in list_shards(archive) for item in read_shard(archive, shard))
    samples = [item for item in read if isinstance(item, Sample) and item.image is not None]
    found, prepared = predictor.preprocessor.prepare_all(samples)
    return [
        (row, sample.caption or "")
        for sample, row in zip(found, prepared, strict=True)
        if row is not None and row.pixels is not None
    ]


def _plain(uri: str, precision: Precision, pairs: Sequence[tuple[Prepared, str]]) -> np.ndarray:
    model = Model(uri, os.cpu_count() or 1, precision)
    scores = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        pixels = np.stack([row.pixels for row, _ in batch if row.pixels is not None])
        scores.append(model.score(pixels, [caption for _, caption in batch]))
    return np.concatenate(scores).astype(np.float32)


def _way(name: str, scores: np.ndarray, exact: np.ndarray, rough: np.ndarray) -> Way:
    changed = scores.argmax(1) != exact.argmax(1)
    first_two = np.sort(exact, axis=1)[:, -2:]
    off = np.abs(scores - exact).max(axis=1)
    return Way(
        name,
        len(exact),
        int(changed.sum()),
        int((scores.argmax(1) != rough.argmax(1)).sum()),
        float((first_two[:, 1] - first_two[:, 0])[changed].max(initial=0.0)),
        float(off.mean()),
        float(off.max()),
    )


def _show(ways: Sequence[Way]) -> None:
    print(f"{ways[0].rows:,} rows beside float32:")
    heads = ("changed", "not bf16's", "margin", "mean", "most")
    print(f"{'':40}" + "".join(f"{head:>12}" for head in heads))
    for way in ways:
        figures = way.largest_margin_changed, way.mean_difference, way.most_difference
        print(
            f"{way.way:40}{way.labels_changed:>12,}{way.labels_unlike_plain_bf16:>12,}"
            + "".join(f"{figure:>12.4f}" for figure in figures)
        )


if __name__ == "__main__":
    main()
