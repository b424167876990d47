"""Tasks from archive to figures: what training measures is what an evaluation finds again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from runs import content
from sklearn import metrics as sk

from mmray import bundle as bundles
from mmray import splits
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.config import TrainConfig, load, validate
from mmray.engine import cluster, evaluator
from mmray.engine.asked import ScoreOptions
from mmray.engine.choice import Chosen
from mmray.engine.evaluate import PREDICTIONS, _metrics, evaluate
from mmray.engine.evaluator import CHOSEN, Asked, Evaluator, own_caption
from mmray.engine.negatives import find_negatives, other_captions
from mmray.engine.scan import SCANNED_SCHEMA, LabelledRows, unpack_table
from mmray.engine.score import score
from mmray.engine.train import train
from mmray.errors import ConfigError
from mmray.predict import Predictor, golden_table
from mmray.report.evaluation import table
from mmray.report.progress import Console

COLOURS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 40, 220)}
ROOT = Path(__file__).resolve().parents[1]


def write_archive(root: Path, rows: int = 90) -> Path:
    """Pictures of one colour, with captions that name it. ``tags``: the colour's parts as a list,
    or nothing; some rows are broken, unlabelled, or of a kind of which there is no other."""
    names = list(COLOURS)
    tags = [["warm", "strong"], ["calm"], []]
    for shard in range(2):
        members = []
        for i in range(shard, rows, 2):
            colour = (i // 2) % 3
            extra: dict[str, Any] = {
                "split": "dev" if i % 4 == 0 else "train",
                "kind": "alone" if i in (0, 1) else f"kind {i % 4 // 2}",
                "tags": None if i == 5 else tags[colour],
            }
            picture = tiny.plain_jpeg(COLOURS[names[colour]], seed=i)
            if i in (8, 9):
                picture = picture[:150]
            members += [
                (f"{i:04d}.jpg", picture),
                (f"{i:04d}.txt", f"{tiny.caption(i)} {names[colour]}".encode()),
                (f"{i:04d}.json", json.dumps(extra).encode()),
            ]
        tiny.write_tar(root / f"{shard}.tar", members)
    return root


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"))


def config(archive: object, out: object, task: str, **data: Any) -> TrainConfig:
    tree = {
        "task": task,
        "data": {"archive": str(archive), **data},
        "out": str(out),
        "preprocess": {"image": {"size": 32}, "text": {"vocab_size": 300, "max_tokens": 24}},
        "model": {"text": {"encoder": "bag", "dim": 16}, "hidden": 32, "fusion": "bilinear"},
        "train": {
            "epochs": 6,
            "batch_size": 8,
            "num_workers": 2,
            "lr": 0.01,
            "precision": "float32",  # what is counted twice is equal, on all hardware
        },
    }
    return validate(TrainConfig, tree, "test")


def scanned(archive: Path, cfg: TrainConfig) -> pa.Table:
    """What a scan gives, without Ray."""
    fields = splits.identity_fields(cfg.data, cfg.task)
    found = []
    for shard in list_shards(str(archive)):
        stream = read_shard(str(archive), shard, columns=cfg.data.columns, fields=fields)
        found += [item for item in stream if isinstance(item, Sample)]
    captions = pa.array([sample.caption for sample in found], pa.large_string())
    identity = splits.identify(found, cfg.data, cfg.task)
    return identity.append_column(SCANNED_SCHEMA.field("caption"), captions)


# --- match ---------------------------------------------------------------------------------------


def test_training_and_evaluation_draw_the_same_negatives(archive: Path) -> None:
    """Else the figure in a bundle could not be found again."""
    cfg = config(archive, "none", "match", negatives_within="kind")
    table = scanned(archive, cfg)
    data = LabelledRows(table, splits.assign(table, data=cfg.data, seed=0, task="match"))
    dev = data.side("dev")
    names = list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))
    aside = {name for name, mine in zip(names, dev, strict=True) if mine and name[1] == 4}
    assert len(aside) == 1
    negatives = find_negatives(data, aside, cfg)
    others = other_captions(table, dev, data=cfg.data, seed=cfg.seed)

    ready = [name for name, mine in zip(names, dev, strict=True) if mine and name not in aside]
    captions = dict(zip(names, table["caption"].to_pylist(), strict=True))
    assert len(negatives.dev) == len(ready)
    seen = 0
    for name, partner in zip(ready, negatives.dev.tolist(), strict=True):
        other = others.get(name[0], {}).get(name[1])
        if partner >= 0:
            assert other is not None and (other.shard, other.row) == ready[partner]
            assert other.caption == captions[ready[partner]]
            seen += 1
        else:  # none, or that of the row that was set aside
            assert other is None or (other.shard, other.row) in aside
    assert seen > 15
    assert negatives.alone() == {"train": 1, "dev": len(ready) - seen}
    # of a kind of its own is the first row of the second shard
    assert np.flatnonzero(~negatives.train.have_partners()).tolist() == [22]
    assert len(negatives.train) == data.split.report.train_rows


def test_an_evaluation_shows_every_row_with_its_own_and_with_another_caption(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray: one actor's work, and what is counted of it."""
    cfg = config(archive, "none", "match", negatives_within="kind", near=0)
    rows_there = scanned(archive, cfg)
    loaded = bundles.load(tiny.bundle(str(tmp_path / "plain")))
    training = loaded.training.model_copy(update={"data": cfg.data})
    names = {"task": "match", "labels": ("mismatch", "match"), "training": training}
    bundle = replace(loaded, **names, golden=None)
    samples = [
        item
        for shard in list_shards(str(archive))
        for item in read_shard(str(archive), shard, fields=("split", "kind"))
        if isinstance(item, Sample)
    ]
    bundle.save(str(tmp_path / "match"), golden=golden_table(bundle, samples[:10]))
    manifest = bundles.read_manifest(str(tmp_path / "match"))

    wanted = Chosen("dev", column="split", value="dev")
    others = other_captions(rows_there, wanted.mask(rows_there), data=cfg.data, seed=0)
    asked = Asked("match", "label", cfg.data, wanted)
    monkeypatch.setattr(evaluator, "ray", SimpleNamespace(get=lambda x: x))
    careful: Any = SimpleNamespace(prepare_all=lambda does, samples: does.prepare_all(samples))
    actor = Evaluator(str(tmp_path / "match"), bundle.fingerprint, asked, (others,), careful)
    parts = [samples[start : start + 7] for start in range(0, len(samples), 7)]
    tables = [unpack_table(actor._receipt("", part)["payload"]) for part in parts]
    found = pa.concat_tables(tables)
    assert found.num_rows == len(samples) + sum(map(len, others.values()))
    assert found.filter(own_caption(found)).num_rows == len(samples)

    metrics = _metrics(
        found.filter(found[CHOSEN]).drop_columns([CHOSEN]), manifest, found, "split", wanted
    )
    support = {name: of["support"] for name, of in metrics["per_class"].items()}
    # 23 dev rows; one has a broken picture; the kind of one has nobody else
    assert (metrics["rows_chosen"], metrics["set_aside"]) == (23, {"image truncated": 1})
    assert support["match"] == 22 and metrics["rows"] == 22 + support["mismatch"]
    assert metrics["without_negative"] == 22 - support["mismatch"] >= 1
    captions = {(s.shard, s.row): s.caption for s in samples}
    predictor = Predictor(bundle)
    for row in found.to_pylist():
        if row["caption_shard"] is not None and row["label"] is not None:
            caption = captions[row["caption_shard"], row["caption_row"]]
            (sample,) = (s for s in samples if (s.shard, s.row) == (row["shard"], row["row"]))
            assert caption != sample.caption and row["true_label"] == "mismatch"
            (again,) = predictor.score_table([replace(sample, caption=caption)]).to_pylist()
            assert row["p_match"] == pytest.approx(again["p_match"], abs=1e-5)
    assert "without any other caption" in table(metrics)


@pytest.fixture(scope="module")
def matched(
    ray_cluster: None, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, list[str]]:
    out = tmp_path_factory.mktemp("bundles") / "match"
    lines: list[str] = []
    cfg = config(archive, out, "match", negatives_within="kind")
    return train(cfg, progress=lines.append), lines


def test_a_match_bundle_is_as_good_as_it_says(
    matched: tuple[Any, list[str]], archive: Path, tmp_path: Path
) -> None:
    """23 dev rows, one broken and one alone: shown with their own and with other captions."""
    result, lines = matched
    dev = result.metrics["dev"]
    assert dev["labels"] == ["mismatch", "match"] and dev["task"] == "match"
    assert dev["per_class"]["match"]["support"] == 22
    assert any("1 train rows have no negative" in line for line in lines)
    bundle = bundles.load(result.bundle)
    assert bundle.task == "match" and bundle.training.split["without_negative"]["train"] == 1
    best = max(result.metrics["epochs"], key=lambda epoch: epoch["dev_auroc"])
    assert dev["auroc"] == best["dev_auroc"] > 0.5

    metrics = evaluate(result.bundle, str(archive), out=str(tmp_path), progress=lambda _: None)
    for name in ("rows", "confusion", "auroc", "auroc_interval", "ece", "macro_f1", "per_class"):
        assert metrics[name] == dev[name], name
    assert metrics["set_aside"] == {"image truncated": 1}
    negatives = dev["per_class"]["mismatch"]["support"]
    assert metrics["without_negative"] == 22 - negatives > 0
    text = table(metrics)
    assert "AUROC 0." in text and "without any other caption" in text

    found = pq.read_table(tmp_path / PREDICTIONS).to_pandas()
    broken = set(found[found.error.notna()][["shard", "row"]].itertuples(index=False, name=None))
    shown = zip(found.caption_shard, found.caption_row, strict=True)
    kept = np.array([name not in broken for name in shown], dtype=bool)
    counted = found[found.label.notna() & kept]
    assert len(counted) == metrics["rows"]
    assert (counted.caption_row.isna() == (counted.true_label == "match")).all()
    scores, true = counted.p_match, counted.true_label == "match"
    assert metrics["auroc"] == pytest.approx(sk.roc_auc_score(true, scores), abs=0.02)


def test_the_match_config_is_a_match(tmp_path: Path) -> None:
    cfg = load(ROOT / "jobs/configs/match.yaml", [f"data.archive={tmp_path}", "out=elsewhere"])
    assert cfg.task == "match" and cfg.data.negatives_within is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.modalities=text"], r"model\.modalities: got text; task match needs both"),
        (["train.class_weights=balanced"], r"train\.class_weights: got balanced"),
        (["task=classify"], r"data\.negatives_within: only for task match"),
        (["task=rank"], r"task: got 'rank'"),
        (["train.negatives=none"], r"train\.negatives: got 'none'"),
        (["train.focal_gamma=-1"], r"train\.focal_gamma: got -1"),
    ],
)
def test_what_contradicts_the_task_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ROOT / "jobs/configs/match.yaml", ["data.archive=a", "out=b", *changes])


def test_a_column_that_is_not_there_is_named_before_ray_starts(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was asked for"))
    with pytest.raises(ConfigError, match=r"data\.negatives_within: got 'sort'.*kind, split, tags"):
        train(
            config(archive, tmp_path / "x", "match", negatives_within="sort"),
            progress=lambda _: None,
        )


# --- multilabel ----------------------------------------------------------------------------------


def test_several_labels_a_row_from_lists_to_figures(
    ray_cluster: None, archive: Path, tmp_path: Path
) -> None:
    cfg = config(archive, tmp_path / "bundle", "multilabel", label="tags", label_separator=";")
    lines: list[str] = []
    result = train(cfg, progress=lines.append)
    dev = result.metrics["dev"]
    bundle = bundles.load(result.bundle)
    Predictor(bundle).check_golden()
    assert bundle.labels == ("calm", "strong", "warm") and bundle.task == "multilabel"
    assert bundle.training.split["unlabelled"] == 1
    assert dev["rows"] == 22 and dev["macro_f1"] > 0.5

    metrics = evaluate(
        result.bundle, str(archive), out=str(tmp_path / "metrics"), progress=lambda _: None
    )
    for name in ("rows", "accuracy", "micro_f1", "macro_f1", "auroc", "ece", "per_class"):
        assert metrics[name] == dev[name], name
    assert "exact match" in table(metrics) and "micro-F1" in table(metrics)

    found = pq.read_table(tmp_path / "metrics" / PREDICTIONS).to_pandas()
    counted = found[found.label.notna()]
    true, given = (
        np.array([[label in text.split(";") for label in bundle.labels] for text in counted[name]])
        for name in ("true_label", "label")
    )
    assert not true.any(1).all()  # rows without any label count, too
    assert metrics["accuracy"] == pytest.approx(sk.accuracy_score(true, given))
    assert metrics["macro_f1"] == pytest.approx(sk.f1_score(true, given, average="macro"))


def test_pairs_that_lack_a_picture_or_a_caption_go_all_the_way(
    ray_cluster: None, tmp_path: Path
) -> None:
    """Trained by two workers, counted by what is there, scored: none is set aside but the pair
    that has neither."""
    found = dict(tiny.members(80))
    for i in range(80):
        found[f"{i:05d}.txt"] = f"{tiny.caption(i)} {tiny.LABELS[i % 2]}".encode()
        if i % 3 == 0 or i == 41:
            del found[f"{i:05d}.jpg"]
        elif i % 4 == 1:
            del found[f"{i:05d}.txt"]
    del found["00041.txt"]
    archive = str(tmp_path / "archive")
    tiny.write_tar(tmp_path / "archive" / "0.tar", found.items())
    there = {
        "both": [i for i in range(80) if i % 3 and i % 4 != 1],
        "picture only": [i for i in range(80) if i % 3 and i % 4 == 1 and i != 41],
        "caption only": [i for i in range(80) if i % 3 == 0],
    }

    tree = config(archive, tmp_path / "out", "classify").model_dump(mode="json")
    tree["model"]["missing"], tree["train"]["modality_dropout"] = True, 0.3
    done = train(validate(TrainConfig, tree, "test"), progress=lambda _: None)
    assert bundles.load(done.bundle).training.split["set_aside"] == {"neither image nor caption": 1}
    metrics = evaluate(done.bundle, archive, out=str(tmp_path / "metrics"), progress=lambda _: None)
    for name in ("rows", "confusion", "accuracy", "macro_f1", "auroc"):
        assert metrics[name] == done.metrics["dev"][name], name
    counted = {kind: part["rows"] for kind, part in metrics["availability"].items()}
    assert counted == {kind: sum(i % 5 == 0 for i in at) for kind, at in there.items()}

    options = ScoreOptions(actors=1)
    summary = score(done.bundle, archive, str(tmp_path / "scores"), options, Console())
    assert (summary["rows"], summary["set_aside"]) == (80, 1)
    (scores,) = content(tmp_path / "scores").values()
    labels = dict(zip(scores["row"].to_pylist(), scores["label"].to_pylist(), strict=True))
    given = pq.read_table(tmp_path / "metrics" / PREDICTIONS).to_pylist()
    assert {row["row"]: row["label"] for row in given}.items() <= labels.items()
