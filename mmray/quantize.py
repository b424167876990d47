"""Make of a bundle one whose convolutions compute in 8 bits where the CPU is faster so, and say
what that does to its scores and its speed. Knows no Ray.

Some pairs of an archive give the ranges (see ``model.int8``), as many others are scored before and
after, beside float32. On a GPU, and on a CPU without 8-bit multiplication, the new bundle computes
as the old one does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmray import golden, storage
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
from mmray.preprocess import Prepared, fault
from mmray.targets import Target, Targets

SHARDS = 16  # that rows are taken from, all over the archive
BATCH = 32

Pairs = Sequence[tuple[Sample, Prepared]]


@dataclass(frozen=True, slots=True)
class Arm:
    """How a bundle scored the rows that were compared, beside float32."""

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
    rows: int  # compared
    set_aside: int  # of all that were read
    before: Arm
    after: Arm

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {self.convolutions} convolutions in 8 bits, {self.fingerprint[:12]}",
            f"{self.rows:,} rows beside float32, differences of probabilities "
            f"({self.set_aside:,} rows read and set aside):",
            f"{'':20}{'labels changed':>16}{'mean':>9}{'most':>9}{'rows/s':>9}",
        ]
        lines += [
            f"{a.computes_in:20}{a.labels_changed:>16,}{a.mean_difference:>9.4f}"
            f"{a.most_difference:>9.4f}{a.rows_per_second:>9.1f}"
            for a in (self.before, self.after)
        ]
        if self.after.rows_per_second < self.before.rows_per_second:
            lines.append(f"not faster on this CPU: {self.bundle} does as well")
        return "\n".join(lines)


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

    Raises ConfigError where nothing can be faster or nothing be measured, BundleError where a
    golden pair is then off by more than the bundle allows.
    """
    if storage.absolute(out) == storage.absolute(uri):
        raise ConfigError(f"{out}: is the bundle itself; give another place for the new one")
    bundle = load(uri)
    _check(bundle, uri)
    progress(f"reading {pairs:,} pairs")
    samples = _some(bundle, archive, pairs, columns)
    prepared = _prepared(bundle, samples, archive)
    seen, compared = prepared[::2], prepared[1::2]
    progress(f"looking at {len(seen):,} of them")
    ranges = _ranges(bundle, [row for _, row in seen])
    if not ranges:
        raise ConfigError(f"{archive}: none of {len(seen)} pairs has a picture to look at")
    made = replace(bundle, int8=json.dumps(ranges, indent=1, sort_keys=True))
    _check_golden(made, uri, archive)
    assert made.golden is not None
    progress(f"scoring the other {len(compared):,}")
    float32 = _scored(Predictor(bundle, "cpu", "float32"), compared)[0]
    rough = _scored(Predictor(made, "cpu", decide=False), compared)[0]
    several = made.task == "multilabel"
    noted = golden.with_doubt(made.golden, float32, rough, made.labels, several=several)
    made = replace(made, golden=noted)
    before, after = (_arm(Predictor(b, "cpu"), compared, float32) for b in (bundle, made))
    found = {"of": bundle.fingerprint, "before": asdict(before), "after": asdict(after)}
    saved = replace(made, metrics={**made.metrics, "quantized": found}).save(
        out, golden=made.golden
    )
    aside = len(samples) - len(prepared)
    return Report(uri, out, saved.fingerprint, len(ranges), len(compared), aside, before, after)


def _check(bundle: Bundle, uri: str) -> None:
    """Raise unless there is something to gain, here, of a bundle that is sound as it is."""
    if bundle.int8 is not None:
        raise ConfigError(f"{uri}: is quantized already; give the bundle it was made of")
    if not int8.supported():
        raise ConfigError(
            "this CPU does not multiply 8-bit integers (AVX-512 VNNI, AVX-VNNI or AMX), so nothing "
            "can be measured here; quantize on one that does"
        )
    model = bundle.build_model()
    if model.image is None or not int8.worthwhile(model.image.net):
        raise ConfigError(f"{uri}: its model has no convolution that would be faster in 8 bits")
    Predictor(bundle, "cpu").check_golden()


def _some(bundle: Bundle, archive: str, count: int, columns: Columns) -> list[Sample]:
    """Up to ``count`` samples, the first ones of shards all over the archive."""
    found = Targets.of(Target(shard) for shard in shards.list_shards(archive))
    if not len(found):
        raise ConfigError(f"{archive}: no shards there")
    model = bundle.spec.config
    needed = not model.missing
    shards.check_columns(
        archive, found[0].shard, columns, image=needed, caption=needed and model.uses_text
    )
    n = min(SHARDS, len(found))
    samples: list[Sample] = []
    for i in range(n):
        shard, wanted = found[i * len(found) // n].shard, (count - len(samples)) // (n - i)
        read = shards.read_shard(archive, shard, columns=columns, stop=wanted)
        samples += [item for item in read if isinstance(item, Sample)]
    return samples


def _prepared(bundle: Bundle, samples: Sequence[Sample], archive: str) -> Pairs:
    """Those that can be scored. Raises ConfigError where there are not two."""
    read, prepared = bundle.build_preprocessor().prepare_all(samples)
    pairs = list(zip(read, prepared, strict=True))
    sound = [(sample, row) for sample, row in pairs if row is not None]
    if len(sound) < 2:
        why = next((f", the first: {fault(sample)}" for sample, row in pairs if row is None), "")
        raise ConfigError(
            f"{archive}: {len(sound)} of {len(pairs)} pairs can be scored{why}; 2 are needed"
        )
    return sound


def _ranges(bundle: Bundle, seen: Sequence[Prepared]) -> Mapping[str, Range]:
    """What goes into the convolutions of the picture encoder, in float32."""
    model = for_inference(bundle.build_model())
    assert model.image is not None
    with int8.observed(model.image.net) as ranges, torch.inference_mode():
        for start in range(0, len(seen), BATCH):
            inputs = collate(seen[start : start + BATCH])
            model(inputs.pixels, inputs.tokens, inputs.mask, inputs.pictured)
    return ranges


def _check_golden(made: Bundle, uri: str, archive: str) -> None:
    """Whether golden pairs hold in 8 bits, within what the bundle allowed before."""
    assert made.golden is not None
    scores = Predictor(made, "cpu").score_table(golden.inputs(made.golden))
    try:
        golden.compare(made.golden, scores, made.labels)
    except BundleError as error:
        raise BundleError(
            f"{uri}: does not bear 8 bits after what was seen in {archive}: {error}; show it more "
            "pairs (--pairs), more like those it learned from, or keep it as it is"
        ) from None


def _scored(predictor: Predictor, pairs: Pairs) -> tuple[pa.Table, float]:
    """Scores, and seconds of the model."""
    samples, prepared = map(list, zip(*pairs, strict=True))
    predictor.build_exact()
    predictor.forward(prepared[:BATCH])  # kernels are made in the first call
    scored = predictor.score(samples, prepared)
    return scored.table, scored.seconds_predict


def _arm(predictor: Predictor, pairs: Pairs, float32: pa.Table) -> Arm:
    table, seconds = _scored(predictor, pairs)
    scores, exact = (rows.probabilities(t, predictor.labels) for t in (table, float32))
    off = np.abs(scores - exact).max(axis=1)
    off = off[np.isfinite(off)]  # of rows that both could score
    changed = table[rows.LABEL].to_numpy() != float32[rows.LABEL].to_numpy()
    return Arm(
        predictor.computes_in,
        int(changed.sum()),
        float(off.mean()) if len(off) else 0.0,
        float(off.max()) if len(off) else 0.0,
        len(pairs) / seconds,
    )
