"""Score samples of a finished run again: do its scores follow from its archive and its bundle?"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mmray import golden, ledger, storage
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.archive.shards import read_shard
from mmray.bundle import load
from mmray.config import Columns
from mmray.errors import BundleError, StorageError
from mmray.predict import Predictor
from mmray.scoring_run import Run, read_run
from mmray.targets import Target

SHARDS, ROWS = 32, 8  # how many, spread over the run, and how many rows of each


def rescore(out: str) -> tuple[int, list[str]]:
    """Read every score of some shards of OUT, and score some rows of each again, here.

    Which, is the same for the same run. Returns how many rows were scored again, and what is wrong.
    Rows that killed their worker are left alone.
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
    start = chance.randrange(max(1, len(held) - ROWS + 1))
    kept = {row[rows.ROW]: row for row in held.slice(start, ROWS).to_pylist()}
    samples = [sample for sample in _samples(run, target, start) if not _killed(kept, sample)]
    scored = predictor.score_table(samples).to_pylist()
    names, allowed = rows.probability_columns(run.labels), golden.tolerance(predictor.golden)
    findings = [
        f"{target.shard.path} row {row[rows.ROW]}: scored again it gives "
        f"{golden.outcome(row, names)}; OUT holds {golden.outcome(must, names)}"
        for row in scored
        if (must := kept[row[rows.ROW]]) and golden.difference(must, row, names) > allowed
    ]
    return len(scored), findings


def _samples(run: Run, target: Target, start: int) -> Iterator[Sample]:
    columns = Columns(**run.config.get("columns", {}))
    stream = read_shard(run.archive, target.shard, columns=columns, start=start, stop=start + ROWS)
    return (item for item in stream if isinstance(item, Sample))


def _killed(kept: dict[int, dict[str, object]], sample: Sample) -> bool:
    error = kept[sample.row][rows.ERROR] if sample.row in kept else None
    return isinstance(error, str) and rows.reason(error) == "worker died"
