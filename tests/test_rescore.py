"""Scores that do not follow from the archive and the bundle must not pass for a run's."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import runs
import tiny

from mmray import bundle as bundles
from mmray import ledger
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.predict import Predictor
from mmray.preprocess import Prepared, Preprocessor
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


@pytest.mark.parametrize("reason", sorted(rows.HARMFUL))
def test_rows_that_harm_their_process_are_not_tried_in_this_one(
    out: str, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """A picture that crashes its decoder would take `verify --deep` with it."""
    run = read_run(out)
    for target in run.targets:
        uri = ledger.scores_uri(out, target.shard.path)
        scores = ledger.read_scores(uri).replace_schema_metadata(None)
        aside = runs.set_aside(scores, dict.fromkeys(range(0, 20, 2), f"{reason}: it was so"))
        ledger.put_scores(out, run, target, aside, None)
    prepare, tried = Preprocessor.prepare, list[int]()

    def noted(self: Preprocessor, sample: Sample) -> Prepared:
        tried.append(sample.row)
        return prepare(self, sample)

    monkeypatch.setattr(Preprocessor, "prepare", noted)
    assert rescore(out) == (3 + 4, [])
    assert len(tried) == 7 and all(row % 2 for row in tried)


def test_a_trial_that_ends_within_a_shard_is_scored_again_to_there(tmp_path: Path) -> None:
    bundle, where = tiny.bundle(str(tmp_path / "bundle")), str(tmp_path / "out")
    archive = tiny.write_archive(tmp_path / "archive", [6, 20])
    run = runs.started(bundle, archive, where, limit=9)
    predictor = Predictor(bundles.load(bundle))
    for target in run.targets:
        stream = read_shard(str(archive), target.shard, stop=target.stop)
        samples = [s for s in stream if isinstance(s, Sample)]
        scores = predictor.score_table(samples)
        ledger.write_part(where, target.shard.path, 0, len(samples), scores)
        ledger.commit(where, run, target, len(samples), None)
    assert rescore(where) == (6 + 3, [])


def test_rows_that_a_score_file_or_a_shard_lacks_are_told(out: str) -> None:
    run = read_run(out)
    target = run.targets[0]
    scores = ledger.read_scores(ledger.scores_uri(out, target.shard.path))
    scores = scores.replace_schema_metadata(None)
    ledger.put_scores(out, run, target, scores.take([0, 1, 2, 4, 5]), None)
    again, findings = rescore(out)
    assert (again, findings) == (4 + 8, ["00000.tar row 3: not in its score file"])

    unknown = scores.take([0, 1, 2, 3, 4, 5, 5]).to_pylist()
    unknown[6]["row"] = 6
    ledger.put_scores(out, run, target, pa.Table.from_pylist(unknown, scores.schema), None)
    assert rescore(out) == (6 + 8, ["00000.tar row 6: not in its shard"])

    ledger.put_scores(out, run, target, scores.drop(["p_calm"]), None)
    assert rescore(out) == (8, ["00000.tar: no rows scored again, its score file lacks p_calm"])


def test_a_bundle_that_is_gone_or_another_is_told(out: str, tmp_path: Path) -> None:
    tiny.bundle(str(tmp_path / "bundle"), seed=1)
    assert "now has fingerprint" in rescore(out)[1][0]
    (tmp_path / "bundle" / "bundle.json").unlink()
    assert "the bundle is not there" in rescore(out)[1][0]
