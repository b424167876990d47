"""Evaluation on a real Ray: every labelled row is counted once, and as scikit-learn counts."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from sklearn import metrics as sk

from mmray import bundle as bundles
from mmray import splits, storage
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.bundle import read_manifest
from mmray.config import Data
from mmray.engine import cluster
from mmray.engine.choice import choose_rows, held_out, split_data
from mmray.engine.evaluate import METRICS, PREDICTIONS, evaluate
from mmray.engine.evaluator import predictions_schema
from mmray.engine.rundir import archive_digest
from mmray.errors import BundleError, ConfigError, MmrayError
from mmray.predict import Predictor
from mmray.report.evaluation import table

LABELS = tiny.LABELS


def quiet(_: str) -> None:
    return None


def pair(name: str, fields: dict[str, Any], image: bytes = b"") -> list[tuple[str, bytes]]:
    return [
        (f"{name}.jpg", image or tiny.jpeg(99)),
        (f"{name}.txt", b"a quiet sea"),
        (f"{name}.json", json.dumps(fields).encode()),
    ]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 300, 0 and 38 pairs and some odd ones; 75 dev rows, of which 68 can count."""
    root = tmp_path_factory.mktemp("archive")
    odd = [
        *pair("broken", {"label": "calm", "split": "dev"}, tiny.jpeg(5)[:150]),
        *pair("unlabelled", {"split": "dev"}),
        *pair("null", {"label": None, "split": "dev"}),
        *pair("unknown0", {"label": "stormy", "split": "dev"}),
        *pair("unknown1", {"label": "stormy", "split": "dev"}),
        *pair("other", {"label": "calm", "split": "test"}),
        *pair("nowhere", {"label": "calm"}),
        *[("cut.txt", b"no picture"), ("cut.json", b'{"label": "wild", "split": "dev"}')],
    ]
    tiny.write_tar(root / "a" / "0.tar", [*tiny.members(300), *odd])
    tiny.write_tar(root / "a" / "1.tar", [])
    tiny.write_tar(root / "b.tar", tiny.members(38, 300))
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.bundle(str(tmp_path_factory.mktemp("bundles") / "one"))


@pytest.fixture(scope="module")
def dev(
    ray_cluster: None, archive: Path, bundle: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate(bundle, str(archive), out=str(out), progress=quiet), out


def samples_of(archive: Path) -> list[Sample]:
    shards = list(list_shards(str(archive)))
    streams = (read_shard(str(archive), s, fields=("label", "split")) for s in shards)
    return [item for stream in streams for item in stream if isinstance(item, Sample)]


def test_every_row_is_counted_once_or_said_why_not(dev: tuple[dict[str, Any], Path]) -> None:
    metrics, out = dev
    good = sum(i % 5 == 0 for i in range(338))
    assert metrics["rows"] == good == 68
    assert metrics["set_aside"] == {"no image": 1, "image truncated": 1}
    assert metrics["unlabelled"] == 2
    assert metrics["unknown_labels"] == {"stormy": 2}
    assert metrics["rows_chosen"] == good + 6 and metrics["rows_read"] == 338 + 8
    assert metrics["split"] == "rows with split = dev"
    assert "availability" not in metrics
    assert json.loads((out / METRICS).read_text()) == metrics


def test_the_numbers_are_scikit_learns(dev: tuple[dict[str, Any], Path]) -> None:
    metrics, out = dev
    found = pq.read_table(out / PREDICTIONS).to_pandas()
    counted = found[found.label.notna() & found.true_label.isin(LABELS)]
    true, predicted = counted.true_label, counted.label
    assert metrics["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))
    assert metrics["confusion"] == sk.confusion_matrix(true, predicted, labels=LABELS).tolist()
    for average in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(
            true, predicted, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), expected, strict=False):
            assert metrics[f"{average}_{name}"] == pytest.approx(value)
    each = sk.classification_report(true, predicted, output_dict=True, zero_division=0)
    for label in LABELS:
        assert metrics["per_class"][label]["f1"] == pytest.approx(each[label]["f1-score"])
        assert metrics["per_class"][label]["support"] == each[label]["support"]


def test_predictions_are_the_predictors(
    dev: tuple[dict[str, Any], Path], archive: Path, bundle: str
) -> None:
    """Evaluation through Ray and a plain loop give the same rows, each once."""
    _, out = dev
    found = pq.read_table(out / PREDICTIONS)
    assert found.schema.remove_metadata().equals(predictions_schema(LABELS))
    chosen = [s for s in samples_of(archive) if s.fields.get("split") == "dev"]
    rows = found.to_pylist()
    assert [(r["shard"], r["row"], r["key"]) for r in rows] == [
        (s.shard, s.row, s.key) for s in chosen
    ]
    predictor = Predictor(bundles.load(bundle))
    expected = predictor.score_table(chosen).to_pylist()
    for sample, row, score in zip(chosen, rows, expected, strict=True):
        assert row["true_label"] == sample.fields.get("label")
        assert row["error"] == (score["error"] if row["true_label"] in LABELS else None)
        if row["label"] is not None:
            assert row["p_calm"] == pytest.approx(score["p_calm"], abs=1e-5)


def test_the_table_names_what_was_not_counted(dev: tuple[dict[str, Any], Path]) -> None:
    text = table(dev[0])
    assert text.startswith("68 rows  accuracy 0.")
    for line in ("set aside, no image: 1", "unlabelled: 2", "unknown to the bundle, stormy: 2"):
        assert line in text
    assert all(len(line) < 100 for line in text.splitlines())


def test_pairs_that_lack_something_are_counted_by_what_they_have(
    ray_cluster: None, tmp_path: Path
) -> None:
    """One figure over all would hide how much the model loses without a picture."""
    fields = json.dumps({"label": "calm", "split": "dev"}).encode()
    odd = [
        *[(f"p{i}.{e}", d) for i in range(3) for e, d in (("jpg", tiny.jpeg(i)), ("json", fields))],
        *[(f"t{i}.{e}", d) for i in range(2) for e, d in (("txt", b"a sea"), ("json", fields))],
        *pair("broken", {"label": "calm", "split": "dev"}, tiny.jpeg(5)[:150]),
        ("nothing.json", fields),
    ]
    tiny.write_tar(tmp_path / "archive" / "0.tar", [*tiny.members(20), *odd])
    bundle = tiny.bundle(str(tmp_path / "bundle"), missing=True)
    out = tmp_path / "out"
    metrics = evaluate(bundle, str(tmp_path / "archive"), out=str(out), split="all", progress=quiet)
    parts = metrics["availability"]
    counted = {which: report["rows"] for which, report in parts.items()}
    assert counted == {"both": 20, "picture only": 3, "caption only": 2}
    assert sum(counted.values()) == metrics["rows"] == 25
    assert metrics["set_aside"] == {"image truncated": 1, "neither image nor caption": 1}
    whole = sum(np.array(report["confusion"]) for report in parts.values())
    assert whole.tolist() == metrics["confusion"]  # type: ignore[union-attr]
    assert json.loads((out / METRICS).read_text()) == metrics
    assert "picture only: 3 rows  accuracy " in table(metrics)
    found = pq.read_table(out / PREDICTIONS).schema.remove_metadata()
    assert found.equals(predictions_schema(LABELS))


def test_all_and_another_label(
    ray_cluster: None, archive: Path, bundle: str, tmp_path: Path
) -> None:
    metrics = evaluate(
        bundle, str(archive), out=str(tmp_path), split="all", label="label", progress=quiet
    )
    assert metrics["rows"] == 338 + 2
    labels = Counter(s.fields.get("label") for s in samples_of(archive))
    support = {name: of["support"] for name, of in metrics["per_class"].items()}
    assert support == {"calm": labels["calm"] - 1, "wild": labels["wild"] - 1}


def test_auto_is_what_was_held_out_by_seed_where_the_archive_has_no_split(
    ray_cluster: None, bundle: str, tmp_path: Path
) -> None:
    """Rows that were trained on must not be counted as if they were new."""
    root = tmp_path / "archive"
    for i in range(2):
        tiny.write_tar(root / f"{i}.tar", tiny.members(25, 25 * i, split=None))
    data = Data(archive=str(root), split=None, dev_fraction=0.2)
    digest = archive_digest(list(list_shards(str(root))))
    trained = retrained(bundle, tmp_path / "bundle", data, {"archive_digest": digest})
    metrics = evaluate(trained, str(root), out=str(tmp_path / "out"), progress=quiet)
    assert metrics["split"] == "dev rows of the seeded split" and metrics["rows"] == 10

    tiny.write_tar(root / "2.tar", tiny.members(2, 90))
    with pytest.raises(ConfigError, match="has changed since the bundle was trained"):
        evaluate(trained, str(root), out=str(tmp_path / "out"), progress=quiet)


def test_a_bundle_from_before_near_identical_pictures_counted_finds_its_split_again(
    bundle: str, tmp_path: Path
) -> None:
    """Ten pictures, each saved five times: joined, they are held out five rows at a time."""
    found = []
    for i in range(50):
        sink = io.BytesIO()
        tiny.scene(i // 5).save(sink, "JPEG", quality=60 + 5 * (i % 5))
        extra = json.dumps({"label": tiny.LABELS[i % 2]})
        found += [(f"{i}.jpg", sink.getvalue()), (f"{i}.json", extra.encode())]
    root = str(tiny.write_tar(tmp_path / "archive" / "0.tar", found).parent)
    shards = list(list_shards(root))
    asked = Data(archive=root, dev_fraction=0.2)
    samples = [s for s in read_shard(root, shards[0], fields=["label"]) if isinstance(s, Sample)]
    now = splits.assign(splits.identify(samples, asked), data=asked, seed=0).report
    assert now.groups == 10

    # A bundle has every key of its day, so one without the key is older than it.
    before = Data.model_validate({k: v for k, v in asked.model_dump().items() if k != "near"})
    split = {"archive_digest": archive_digest(shards)}
    manifest = read_manifest(bundle)
    training = manifest.training.model_copy(update={"data": before, "split": split, "seed": 0})
    manifest = manifest.model_copy(update={"training": training})
    chosen = choose_rows(manifest, root, shards, [], "auto")
    scanned = splits.identify(samples, split_data(manifest))
    assert scanned[splits.PICTURE_HASH].null_count == 50
    marks = held_out(chosen, manifest, scanned).marks
    expected = splits.assign(
        splits.identify(samples, asked),
        data=asked.model_copy(update={"near": 0}),
        seed=0,
    )
    assert expected.report.groups == 50
    assert marks is not None
    assert marks["0.tar"].tolist() == [side == "dev" for side in expected.sides.to_pylist()]


def retrained(bundle: str, to: Path, data: Data, split: dict[str, Any]) -> str:
    """The same bundle, as if trained on ``data``."""
    loaded = bundles.load(bundle)
    training = loaded.training.model_copy(update={"data": data, "split": split})
    assert loaded.golden is not None
    replace(loaded, training=training).save(str(to), golden=loaded.golden)
    return str(to)


def test_a_split_or_label_without_rows_is_named(
    ray_cluster: None, archive: Path, bundle: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--split: no row.*split = validation.*train \(270\)"):
        evaluate(bundle, str(archive), out=str(tmp_path), split="validation", progress=quiet)
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_said_before_ray_starts(
    archive: Path, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was asked for"))
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--label: got 'mood'.*label, split"):
        evaluate(bundle, str(archive), out=out, label="mood", progress=quiet)
    with pytest.raises(BundleError, match="no bundle here"):
        evaluate(str(tmp_path), str(archive), out=out, progress=quiet)
    plain = tmp_path / "plain"
    tiny.write_tar(plain / "0.tar", pair("a", {"label": "calm"}))
    with pytest.raises(ConfigError, match=r"--split: got 'dev'; the archive has no field 'split'"):
        evaluate(bundle, str(plain), out=out, split="dev", progress=quiet)


def test_a_bundle_that_scores_otherwise_than_it_should_is_refused(
    ray_cluster: None, archive: Path, bundle: str, tmp_path: Path
) -> None:
    """Figures of a broken model are worse than none."""
    loaded = bundles.load(bundle)
    assert loaded.golden is not None
    at = loaded.golden.schema.get_field_index("p_calm")
    none = pa.array([0.0] * loaded.golden.num_rows, pa.float32())
    wrong = loaded.golden.set_column(at, loaded.golden.schema.field(at), none)
    loaded.save(str(tmp_path / "bundle"), golden=wrong)
    with pytest.raises(MmrayError, match="gives other scores than its own"):
        evaluate(str(tmp_path / "bundle"), str(archive), out=str(tmp_path), progress=quiet)
    assert not storage.exists(str(tmp_path / METRICS))
