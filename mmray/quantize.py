"""Make of a bundle one whose convolutions compute in 8 bits where the CPU is faster so, and say
what that does to its scores and its speed. Knows no Ray.

Some pairs of an archive give the ranges (see ``model.int8``), as many others are scored before and
after, beside float32. On a GPU, and on a CPU without 8-bit multiplication, the new bundle computes
as the old one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmray.archive import rows, shards
from mmray.archive.columns import GUESSED
from mmray.archive.rows import Sample
from mmray.bundle import Bundle, load
from mmray.config import Columns, Range
from mmray.errors import BundleError, ConfigError
from mmray.learn import collate
from mmray.model import int8
from mmray.model.speed import for_inference
from mmray.predict import Predictor
from mmray.preprocess import Prepared

SHARDS = 16  # that rows are taken from, all over the archive
BATCH = 32


@dataclass(frozen=True, slots=True)
class Arm:
    """How a bundle scored the rows that were checked, beside float32."""

    computes_in: str
    labels_changed: int
    mean_difference: float  # of a row's probabilities the one that differs most
    most_difference: float
    rows_per_second: float  # the model alone, torch's threads as they are


@dataclass(frozen=True, slots=True)
class Report:
    bundle: str
    out: str
    fingerprint: str
    convolutions: int
    rows: int  # checked
    before: Arm
    after: Arm

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{'':20}{'labels changed':>16}{'mean':>9}{'most':>9}{'rows/s':>9}"
        lines = [
            f"{a.computes_in:20}{a.labels_changed:>16,}{a.mean_difference:>9.4f}"
            f"{a.most_difference:>9.4f}{a.rows_per_second:>9.1f}"
            for a in (self.before, self.after)
        ]
        return "\n".join(
            [
                f"{self.out}: {self.convolutions} convolutions in 8 bits, {self.fingerprint[:12]}",
                f"{self.rows:,} rows beside float32, differences of probabilities:",
                *(head, *lines),
            ]
        )


def quantize(
    uri: str,
    archive: str,
    out: str,
    *,
    pairs: int = 512,
    columns: Columns = GUESSED,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Write to ``out`` the bundle at ``uri`` with the ranges that half of some ``pairs`` give;
    ``archive`` should be like what will be scored.

    Raises ConfigError where nothing would be faster, BundleError where a golden pair is then off by
    more than the bundle allows.
    """
    bundle = load(uri)
    _check(bundle, uri)
    progress(f"reading {pairs:,} pairs")
    prepared = _prepared(bundle, _some(archive, pairs, columns))
    if len(prepared) < 2:
        raise ConfigError(f"{archive}: too few pairs that can be scored; 2 are needed")
    seen, checked = prepared[::2], prepared[1::2]
    progress(f"looking at {len(seen):,} of them")
    ranges = _ranges(bundle, [row for _, row in seen])
    made = replace(bundle, ranges=ranges)
    _check_golden(made, uri)
    progress(f"scoring the other {len(checked):,}")
    float32 = _scored(Predictor(bundle, "cpu", "float32"), checked)[0]
    arms = [_arm(Predictor(each, "cpu"), checked, float32) for each in (bundle, made)]
    assert made.golden is not None
    saved = made.save(out, golden=made.golden)
    return Report(uri, out, saved.fingerprint, len(ranges), len(checked), *arms)


def _check(bundle: Bundle, uri: str) -> None:
    if bundle.ranges is not None:
        raise ConfigError(f"{uri}: is quantized already; give the bundle it was made of")
    if not int8.supported():
        raise ConfigError(
            "this CPU does not multiply 8-bit integers (AVX-512 VNNI, AVX-VNNI or AMX), so nothing "
            "can be measured here; quantize on one that does"
        )
    model = bundle.build_model()
    if model.image is None or not int8.worthwhile(model.image.net):
        raise ConfigError(f"{uri}: its model has no convolution that would be faster in 8 bits")


def _some(archive: str, count: int, columns: Columns) -> list[Sample]:
    """About ``count`` samples, of shards all over the archive."""
    found = list(shards.list_shards(archive))
    some = found[:: max(1, len(found) // SHARDS)][:SHARDS]
    samples: list[Sample] = []
    for i, shard in enumerate(some):
        wanted = (count - len(samples)) // (len(some) - i)
        read = shards.read_shard(archive, shard, columns=columns, stop=wanted)
        samples += islice((item for item in read if isinstance(item, Sample)), wanted)
    return samples


def _prepared(bundle: Bundle, samples: Sequence[Sample]) -> list[tuple[Sample, Prepared]]:
    kept, prepared = bundle.build_preprocessor().prepare_all(samples)
    pairs = zip(kept, prepared, strict=True)
    return [(sample, row) for sample, row in pairs if row is not None]


def _ranges(bundle: Bundle, seen: Sequence[Prepared]) -> Mapping[str, Range]:
    """What goes into the convolutions of the picture encoder, in float32."""
    model = for_inference(bundle.build_model())
    assert model.image is not None
    with int8.observed(model.image.net) as ranges, torch.inference_mode():
        for start in range(0, len(seen), BATCH):
            inputs = collate(seen[start : start + BATCH])
            model(inputs.pixels, inputs.tokens, inputs.mask, inputs.pictured)
    return ranges


def _check_golden(made: Bundle, uri: str) -> None:
    """The golden pairs as they are, and how far a score may be off, hold in 8 bits too."""
    try:
        Predictor(made, "cpu").check_golden()
    except BundleError as error:
        raise BundleError(f"{uri}: does not bear 8 bits: {error}") from None


def _scored(
    predictor: Predictor, pairs: Sequence[tuple[Sample, Prepared]]
) -> tuple[pa.Table, float]:
    """Scores, and seconds of the model."""
    samples, prepared = map(list, zip(*pairs, strict=True))
    predictor.forward(prepared[:BATCH])  # kernels are made in the first call
    began = time.perf_counter()
    table = predictor.score(samples, prepared).table
    return table, time.perf_counter() - began


def _arm(predictor: Predictor, pairs: Sequence[tuple[Sample, Prepared]], float32: pa.Table) -> Arm:
    table, seconds = _scored(predictor, pairs)
    names = rows.probability_columns(predictor.labels)
    difference = np.max(
        [np.abs(table[n].to_numpy() - float32[n].to_numpy()) for n in names], axis=0
    )
    changed = sum(
        one != other
        for one, other in zip(*(t[rows.LABEL].to_pylist() for t in (table, float32)), strict=True)
    )
    return Arm(
        predictor.computes_in,
        changed,
        float(difference.mean()),
        float(difference.max()),
        len(pairs) / seconds,
    )
