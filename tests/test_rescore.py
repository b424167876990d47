"""Scores that do not follow from the archive and the bundle must not pass for a run's."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import tiny

from mmray import bundle as bundles
from mmray import ledger
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.predict import Predictor
from mmray.rescore import rescore
from mmray.scoring_run import Run, open_run, read_run
from mmray.targets import Target, Targets


@pytest.fixture
def out(tmp_path: Path) -> str:
    """A finished run of one bundle over two shards, made without Ray."""
    bundle = tiny.bundle(str(tmp_path / "bundle"))
    archive = tiny.write_archive(tmp_path / "archive", [6, 20])
    loaded, where = bundles.load(bundle), str(tmp_path / "out")
    targets = Targets.of(map(Target, list_shards(str(archive))))
    run = Run(str(archive), bundle, loaded.fingerprint, loaded.labels, targets, chunk_rows=64)
    open_run(where, run)
    predictor = Predictor(loaded)
    for target in targets:
        samples = [s for s in read_shard(str(archive), target.shard) if isinstance(s, Sample)]
        scores = predictor.score_table(samples)
        ledger.write_part(where, target.shard.path, 0, len(samples), scores)
        ledger.commit(where, run, target, len(samples), None)
    return where


def test_scores_that_follow_hold(out: str) -> None:
    assert rescore(out) == (6 + 8, [])


def test_other_scores_are_found(out: str) -> None:
    run = read_run(out)
    target = run.targets[1]
    scores = ledger.read_scores(ledger.scores_uri(out, target.shard.path))
    names = [name for name in scores.column_names if name.startswith("p_")]
    for one, other in zip(names, reversed(names), strict=True):
        column = scores.column_names.index(one)
        scores = scores.set_column(
            column, one, pa.array([0.5 if one < other else 0.1] * 20, pa.float32())
        )
    ledger.write_part(out, target.shard.path, 0, 20, scores.replace_schema_metadata(None))
    ledger.commit(out, run, target, 20, None)
    again, findings = rescore(out)
    assert again == 14 and findings
    assert "00001.tar row" in findings[0] and "scored again it gives" in findings[0]


def test_a_bundle_that_is_gone_or_another_is_told(out: str, tmp_path: Path) -> None:
    tiny.bundle(str(tmp_path / "bundle"), seed=1)
    assert "now has fingerprint" in rescore(out)[1][0]
    (tmp_path / "bundle" / "bundle.json").unlink()
    assert "the bundle is not there" in rescore(out)[1][0]
