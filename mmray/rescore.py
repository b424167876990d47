"""Score samples of a finished run again: do its scores follow from its archive and its bundle?"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from mmray import golden, ledger, storage
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.archive.shards import read_shard
from mmray.bundle import load
from mmray.config import Columns
from mmray.errors import BundleError, StorageError
from mmray.predict import Predictor
from mmray.preprocess.image import TOO_LARGE
from mmray.scoring_run import UNRAISED, Run, read_run
from mmray.targets import Target

SHARDS, ROWS = 32, 8  # how many, spread over the run, and how many rows of each


def rescore(out: str) -> tuple[int, list[str]]:
    """Read every score of some shards of OUT, and score some rows of each again, here.

    Which, is the same for the same run. Returns how many rows were scored again, and what is wrong.
    Rows set aside for what they did to their process are left alone: it would be this one's turn.
    """
    out = storage.absolute(out)
    run = read_run(out)
    try:
        bundle = load(run.bundle)
    except (BundleError, StorageError) as error:
        return 0, [f"the bundle is not there to score with again: {error}"]
    if bundle.fingerprint != run.fingerprint:
        return 0, [f"{run.bundle}: now has fingerprint {bundle.fingerprint[:12]}, not the run's"]
    predictor, chance = Predictor(bundle), random.Random(run.run_id)
    predictor.preprocessor = predictor.preprocessor.allowing(run.caps.max_pixels)
    there = run.targets.take(run.targets.among(ledger.done_shards(out)))
    chosen = sorted(chance.sample(range(len(there)), min(SHARDS, len(there))))
    count, findings = 0, list[str]()
    for index in chosen:
        try:
            again, wrong = _again(out, run, there[index], predictor, chance)
        except StorageError as error:
            again, wrong = 0, [str(error)]
        count, findings = count + again, findings + wrong
    return count, findings


def _again(
    out: str, run: Run, target: Target, predictor: Predictor, chance: random.Random
) -> tuple[int, list[str]]:
    held = ledger.read_scores(ledger.scores_uri(out, target.shard.path))
    if not len(held):
        return 0, []
    path = target.shard.path
    if missing := [name for name in run.schema().names if name not in held.column_names]:
        return 0, [f"{path}: no rows scored again, its score file lacks {', '.join(missing)}"]
    start = chance.randrange(max(1, len(held) - ROWS + 1))
    stop = min(start + ROWS, len(held))
    some = held.filter(pc.is_in(held[rows.ROW], pa.array(range(start, stop), pa.int64())))
    kept = {row[rows.ROW]: row for row in some.to_pylist()}
    samples = {sample.row: sample for sample in _samples(run, target, start, stop)}
    findings = [f"{path} row {row}: not in its score file" for row in samples.keys() - kept.keys()]
    findings += [f"{path} row {row}: not in its shard" for row in kept.keys() - samples.keys()]
    again = [row for row in samples if row in kept and not _left(run, kept[row][rows.ERROR])]
    scored = predictor.score_table([samples[row] for row in again]).to_pylist()
    names, allowed = rows.probability_columns(run.labels), golden.tolerance(predictor.golden)
    findings += [
        f"{path} row {row[rows.ROW]}: scored again it gives "
        f"{golden.outcome(row, names)}; OUT holds {golden.outcome(must, names)}"
        for row in scored
        if golden.difference(must := kept[row[rows.ROW]], row, names) > allowed
    ]
    return len(scored), findings


def _samples(run: Run, target: Target, start: int, stop: int) -> Iterator[Sample]:
    columns = Columns(**run.config.get("columns", {}))
    stream = read_shard(
        run.archive,
        target.shard,
        columns=columns,
        start=start,
        stop=stop,
        max_image_bytes=run.caps.max_image_bytes,
    )
    return (item for item in stream if isinstance(item, Sample))


def _left(run: Run, error: str | None) -> bool:
    """Whether a row with this error is left alone: also one that was too large, where some were
    tried again with a higher cap, and others not."""
    if error is None:
        return False
    reason = rows.reason(error)
    return reason in rows.HARMFUL or (reason == TOO_LARGE and run.caps != UNRAISED)
