"""What the ways to be fast do to scores: all pictures of an archive, beside plain torch in float32.

    python benchmarks/labels.py ARCHIVE BUNDLE [BUNDLE ...] [--json]

The bundles are of one model, which reads both and gives one label: as it was trained, and what
`mmray quantize` made of it. Plain torch in bfloat16 is ``limit`` of score_throughput.py; a bundle
is scored as `mmray score` does, and without deciding in float32 what its precision leaves in doubt.
For each way: how many rows were decided so; how many have another label than in float32, and than
in plain bfloat16; the margin, best probability less the second, that float32 has at most where its
label is changed; how far a row's probabilities are off, at the mean and at most; and rows a second
of the model alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from _arms import BATCH, Model

from mmray.archive.rows import Sample, probabilities
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
    decided_in_float32: int
    labels_changed: int
    labels_unlike_plain_bf16: int
    largest_margin_changed: float
    mean_difference: float
    most_difference: float
    rows_per_second: float


@dataclass(frozen=True)
class Scores:
    probabilities: np.ndarray
    seconds: float
    decided: int = 0


def main() -> None:
    args = _arguments()
    threads = os.cpu_count() or 1
    pairs = _pairs(args.archive, Predictor(load(args.bundles[0]), "cpu", threads=threads))
    exact = _plain(args.bundles[0], "float32", pairs)
    rough = _plain(args.bundles[0], "bf16", pairs)
    ways = [_way(PLAIN, rough, exact, rough)]
    for uri in args.bundles:
        for decide in (False, True):
            predictor = Predictor(load(uri), "cpu", decide=decide)
            name = f"{uri}, {predictor.computes_in}{'' if decide else ' alone'}"
            ways.append(_way(name, _scored(predictor, pairs), exact, rough))
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


Pairs = Sequence[tuple[Sample, Prepared]]


def _pairs(archive: str, predictor: Predictor) -> Pairs:
    """All that have a picture and can be scored."""
    read = (item for shard in list_shards(archive) for item in read_shard(archive, shard))
    samples = [item for item in read if isinstance(item, Sample) and item.image is not None]
    found, prepared = predictor.preprocessor.prepare_all(samples)
    return [
        (sample, row)
        for sample, row in zip(found, prepared, strict=True)
        if row is not None and row.pixels is not None
    ]


def _plain(uri: str, precision: Precision, pairs: Pairs) -> Scores:
    model = Model(uri, os.cpu_count() or 1, precision)
    scores, began = [], time.perf_counter()
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        pixels = np.stack([row.pixels for _, row in batch if row.pixels is not None])
        scores.append(model.score(pixels, [sample.caption or "" for sample, _ in batch]))
    return Scores(np.concatenate(scores).astype(np.float32), time.perf_counter() - began)


def _scored(predictor: Predictor, pairs: Pairs) -> Scores:
    samples, prepared = map(list, zip(*pairs, strict=True))
    predictor.build_exact()
    predictor.forward(prepared[:BATCH])  # kernels are made in the first call
    scored = predictor.score(samples, prepared)
    scores = probabilities(scored.table, predictor.labels)
    return Scores(scores, scored.seconds_predict, scored.decided)


def _way(name: str, scored: Scores, float32: Scores, plain: Scores) -> Way:
    scores, exact = scored.probabilities, float32.probabilities
    changed = scores.argmax(1) != exact.argmax(1)
    first_two = np.sort(exact, axis=1)[:, -2:]
    off = np.abs(scores - exact).max(axis=1)
    return Way(
        name,
        len(exact),
        scored.decided,
        int(changed.sum()),
        int((scores.argmax(1) != plain.probabilities.argmax(1)).sum()),
        float((first_two[:, 1] - first_two[:, 0])[changed].max(initial=0.0)),
        float(off.mean()),
        float(off.max()),
        len(exact) / scored.seconds,
    )


def _show(ways: Sequence[Way]) -> None:
    print(f"{ways[0].rows:,} rows beside float32:")
    heads = ("decided", "changed", "not bf16's", "margin", "mean", "most", "rows/s")
    print(f"{'':40}" + "".join(f"{head:>12}" for head in heads))
    for way in ways:
        figures = way.largest_margin_changed, way.mean_difference, way.most_difference
        print(
            f"{way.way:40}{way.decided_in_float32:>12,}"
            f"{way.labels_changed:>12,}{way.labels_unlike_plain_bf16:>12,}"
            + "".join(f"{figure:>12.4f}" for figure in figures)
            + f"{way.rows_per_second:>12.1f}"
        )


if __name__ == "__main__":
    main()
