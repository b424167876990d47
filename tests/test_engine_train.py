"""Training on a real Ray: every labelled row counts once, and a stopped run goes on."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from conftest import Endpoint

from mmray import bundle as bundles
from mmray import storage
from mmray.archive.shards import list_shards
from mmray.config import TrainConfig, validate
from mmray.engine import cluster, plan, rundir
from mmray.engine import train as engine
from mmray.engine.evaluate import evaluate, table
from mmray.engine.train import TrainResult, train
from mmray.engine.workers import choose_workers
from mmray.errors import ConfigError, StorageError
from mmray.model.image import SmallCNN
from mmray.predict import Predictor

SHARDS = (31, 0, 42)
BROKEN_TRAIN, BROKEN_DEV = 7, 10  # rows of the first shard


def write_archive(root: Path) -> Path:
    """73 pairs whose caption tells the label, two with a broken picture, and one unlabelled."""
    first = 0
    for number, count in enumerate(SHARDS):
        found = dict(tiny.members(count, first))
        for i in range(first, first + count):
            found[f"{i:05d}.txt"] = f"{tiny.caption(i)} {tiny.LABELS[i % 2]}".encode()
        first += count
        if number == 0:
            for row in (BROKEN_TRAIN, BROKEN_DEV):
                found[f"{row:05d}.jpg"] = found[f"{row:05d}.jpg"][:200]
            found |= {"x.jpg": tiny.jpeg(1), "x.txt": b"no label", "x.json": b"{}"}
        tiny.write_tar(root / f"{number:05d}.tar", found.items())
    return root


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small image encoder, as somebody else might have trained them."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    state = {name: t.contiguous() for name, t in SmallCNN("unit").net.state_dict().items()}
    path.write_bytes(safetensors.torch.save(state))
    return path


def config(archive: object, out: object, **keys: Any) -> TrainConfig:
    """``keys``: ``train__lr=1`` for ``train.lr: 1``."""
    tree: dict[str, Any] = {
        "data": {"archive": str(archive)},
        "out": str(out),
        "preprocess": {"image": {"size": 32}, "text": {"vocab_size": 300, "max_tokens": 24}},
        "model": {"text": {"encoder": "bag", "dim": 16}, "hidden": 16, "dropout": 0.0},
        # 57 rows: the last step has one, so that one of two workers has none.
        "train": {"epochs": 4, "batch_size": 8, "num_workers": 2, "lr": 0.02},
    }
    for key, value in keys.items():
        *parents, last = key.split("__")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return validate(TrainConfig, tree, "test")


def steady(archive: object, out: object, backbone: Path, **keys: Any) -> TrainConfig:
    """A config whose outcome does not depend on the number of workers: no batch norm that learns,
    no dropout."""
    image = {"model__image__weights": str(backbone), "model__image__freeze": True}
    return config(archive, out, **image, **keys)


def losses(result: TrainResult) -> list[float]:
    return [epoch[name] for epoch in result.metrics["epochs"] for name in ("loss", "dev_loss")]


# --- with Ray ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, archive: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    out = tmp_path_factory.mktemp("bundles") / "undisturbed"
    return train(steady(archive, out, backbone), progress=lambda _: None)


def test_every_dev_row_counts_once_and_the_bundle_scores_as_it_was_measured(
    undisturbed: TrainResult, archive: Path, tmp_path: Path
) -> None:
    """Two workers, 15 dev rows of which one is broken: a tail lost or doubled would show."""
    dev = undisturbed.metrics["dev"]
    assert dev["rows"] == sum(i % 5 == 0 for i in range(73)) - 1 == 14
    bundle = bundles.load(undisturbed.bundle)
    assert bundle.fingerprint == undisturbed.fingerprint
    Predictor(bundle, "cpu", "float32").check_golden()
    split = bundle.training.split
    assert split["set_aside"] and sum(split["set_aside"].values()) == 2
    assert (sum(split["train"].values()), sum(split["dev"].values())) == (58, 15)
    assert split["unlabelled"] == 1

    metrics = evaluate(undisturbed.bundle, str(archive), out=str(tmp_path), progress=lambda _: None)
    for name in ("rows", "confusion", "accuracy", "macro_f1", "per_class"):
        assert metrics[name] == dev[name], name
    assert sum(metrics["set_aside"].values()) == 1
    assert "14 rows" in table(metrics) and "14 rows" in table(dev)


def test_the_model_learned_what_the_captions_say(undisturbed: TrainResult) -> None:
    assert undisturbed.metrics["dev"]["accuracy"] >= 0.85


def test_a_finished_run_leaves_its_history_and_nothing_to_do(
    undisturbed: TrainResult, archive: Path, backbone: Path
) -> None:
    """A repeated command must neither train again nor fail a script."""
    place = Path(f"{undisturbed.bundle}.run")
    assert sorted(path.name for path in place.iterdir()) == ["history.json", "run.json"]
    history = json.loads((place / "history.json").read_text())
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2, 3, 4]
    lines: list[str] = []
    # Where it runs may differ; what comes out is the same.
    again = train(
        steady(archive, undisturbed.bundle, backbone, train__num_workers=1), progress=lines.append
    )
    assert not again.trained and again.fingerprint == undisturbed.fingerprint
    assert "nothing to do" in lines[0]


def test_another_config_or_a_changed_archive_into_the_same_out_is_refused(
    undisturbed: TrainResult, archive: Path, backbone: Path
) -> None:
    """A bundle must not be taken for one of another config."""
    with pytest.raises(ConfigError, match=r"train\.lr is 0\.02, asked 0\.5.*choose another out"):
        train(steady(archive, undisturbed.bundle, backbone, train__lr=0.5), progress=lambda _: None)
    shard = next(list_shards(str(archive)))
    with pytest.raises(ConfigError, match="has changed since"):
        rundir.finished(plan.absolute(steady(archive, undisturbed.bundle, backbone)), [shard])


def test_one_worker_learns_what_two_do(
    undisturbed: TrainResult, archive: Path, backbone: Path, tmp_path: Path
) -> None:
    """The number of workers decides how fast it goes, not what comes out."""
    cfg = steady(archive, tmp_path / "one", backbone, train__num_workers=1)
    alone = train(cfg, progress=lambda _: None)
    np.testing.assert_allclose(losses(alone), losses(undisturbed), rtol=1e-3)
    assert alone.metrics["dev"]["confusion"] == undisturbed.metrics["dev"]["confusion"]


def test_stopped_by_ctrl_c_it_goes_on_where_it_was_with_another_number_of_workers(
    undisturbed: TrainResult,
    archive: Path,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "SAY_SECONDS", 0.0)
    out = tmp_path / "stopped"
    pressed: list[str] = []

    def press(line: str) -> None:
        if line.startswith("epoch 1/8") and not pressed:
            pressed.append(line)
            raise KeyboardInterrupt

    keys = {"train__epochs": 8, "train__schedule": "constant", "train__warmup": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(steady(archive, out, backbone, **keys), progress=press)
    assert pressed and not (out / bundles.MANIFEST).exists()
    with pytest.raises(ConfigError, match=r"unfinished.*model\.hidden is 16, asked 8"):
        train(steady(archive, out, backbone, **keys, model__hidden=8), progress=lambda _: None)

    lines: list[str] = []
    done = train(
        steady(archive, out, backbone, **keys, train__num_workers=1), progress=lines.append
    )
    assert any(line.startswith("going on from a checkpoint") for line in lines)
    assert [epoch["epoch"] for epoch in done.metrics["epochs"]] == list(range(1, 9))


def test_a_worker_killed_while_training_from_s3_to_s3_costs_a_checkpoint_at_most(
    ray_cluster: None, s3_endpoint: Endpoint, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm and dropout in two workers; archive, checkpoints and bundle in a bucket.

    By the third epoch the first one's checkpoint is on record: a worker hands over a report only
    when the controller, which looks every other second, has taken the one before.
    """
    monkeypatch.setattr(engine, "SAY_SECONDS", 0.0)
    bucket = s3_endpoint.bucket()
    for path in sorted(archive.iterdir()):
        storage.write_file(storage.join(bucket, "archive", path.name), path)
    lines: list[str] = []

    def kill(line: str) -> None:
        if line.startswith("epoch 3/4") and not any(seen.startswith("epoch 3/4") for seen in lines):
            os.kill(training_worker(), signal.SIGKILL)
        lines.append(line)

    keys = {"model__dropout": 0.3, "data__split": None}
    cfg = config(f"{bucket}/archive", f"{bucket}/bundle", **keys)
    done = train(cfg, progress=kill)
    (again,) = (line for line in lines if line.startswith("going on from a checkpoint: epoch "))
    assert again[len("going on from a checkpoint: epoch ")] in "234", again
    assert [epoch["epoch"] for epoch in done.metrics["epochs"]] == [1, 2, 3, 4]
    bundle = bundles.load(f"{bucket}/bundle")
    assert bundle.training.split["rule"].startswith("seeded")
    left = {item.path for item in storage.list_objects(f"{bucket}/bundle.run")}
    assert left == {"history.json", "run.json"}


def training_worker() -> int:
    """The pid of a training worker of this session's Ray."""
    for entry in Path("/proc").iterdir():
        try:
            name = (entry / "cmdline").read_bytes()
            parent = Path("/proc", (entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            grandparent = (parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except (OSError, IndexError):
            continue
        if name.startswith(b"ray::RayTrainWorker") and int(grandparent) == os.getpid():
            return int(entry.name)
    raise AssertionError("no training worker is running")


def test_one_class_is_nothing_to_learn(ray_cluster: None, archive: Path, tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "a" / "0.tar", tiny.members(6, label="calm"))
    with pytest.raises(ConfigError, match=r"data\.label: all 6 labelled rows have label = 'calm'"):
        train(config(tmp_path / "a", tmp_path / "out"), progress=lambda _: None)


# --- before Ray ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data__label": "season"}, r"data\.label: got 'season'.*label, split"),
        ({"model__image__encoder": "resnet5"}, r"model\.image\.encoder: got 'resnet5'"),
        ({"model__image__weights": "no.safetensors"}, r"model\.image\.weights: no\.safetensors"),
        ({"preprocess__text__tokenizer": "no.json"}, r"preprocess\.text\.tokenizer: .*no\.json"),
        ({"model__text__encoder": "hf:./none"}, r"model\.text\.encoder: \./none: no such folder"),
    ],
)
def test_what_is_wrong_with_a_config_is_said_before_ray_starts(
    keys: dict[str, str],
    message: str,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody should wait for a cluster to be told of a typing mistake."""
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was asked for"))
    with pytest.raises(ConfigError, match=message):
        train(config(archive, tmp_path / "out", **keys), progress=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        train(config(tmp_path / "nowhere", tmp_path / "out"), progress=lambda _: None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.tar"):
        train(config(tmp_path / "empty", tmp_path / "out"), progress=lambda _: None)


def machine(cpus: int, gpus: int) -> cluster.Resources:
    return cluster.Resources(cpus, gpus, 1, 10**9, max_cpus=cpus, max_gpus=gpus)


@pytest.mark.parametrize(
    ("keys", "cpus", "gpus", "nodes", "expected"),
    [
        ({}, 2, 0, [2], (2, False, 1)),
        ({}, 1, 0, [1], (1, False, 1)),
        ({}, 16, 0, [16], (2, False, 8)),
        ({}, 8, 0, [1, 7], (2, False, 3)),
        ({}, 16, 4, [16], (4, True, 4)),
        ({}, 64, 2, [64], (2, True, 4)),
        ({"train__use_gpu": False}, 16, 4, [16], (2, False, 8)),
        ({"train__num_workers": 4}, 8, 0, [4, 4], (4, False, 2)),
    ],
)
def test_workers_fit_the_machine_at_hand(
    keys: dict[str, Any],
    cpus: int,
    gpus: int,
    nodes: list[int],
    expected: tuple[int, bool, int],
    tmp_path: Path,
) -> None:
    cfg = config(tmp_path, tmp_path, **{"train__num_workers": None, **keys})
    chosen = choose_workers(cfg, machine(cpus, gpus), nodes)
    assert (chosen.count, chosen.gpu, chosen.cpus) == expected


def test_more_workers_than_the_cluster_has_are_refused(tmp_path: Path) -> None:
    """Ray would wait for them for ever."""
    with pytest.raises(ConfigError, match=r"train\.num_workers: got 4; the cluster has 2 CPUs"):
        choose_workers(config(tmp_path, tmp_path, train__num_workers=4), machine(2, 0), [2])
    with pytest.raises(ConfigError, match=r"train\.use_gpu: got true; the cluster has 0 GPUs"):
        cfg = config(tmp_path, tmp_path, train__num_workers=None, train__use_gpu=True)
        choose_workers(cfg, machine(2, 0), [2])


def test_a_cluster_that_can_grow_is_asked_to(tmp_path: Path) -> None:
    cfg = config(tmp_path, tmp_path, train__num_workers=4, train__use_gpu=True)
    growing = replace(machine(2, 0), max_cpus=64, max_gpus=8)
    assert choose_workers(cfg, growing, [2]).count == 4


def test_clearing_a_run_leaves_what_is_not_its_own(archive: Path, tmp_path: Path) -> None:
    """train.checkpoints may be a place that others use too."""
    cfg = plan.absolute(config(archive, tmp_path / "out", train__checkpoints=str(tmp_path / "all")))
    place = Path(rundir.place_of(cfg))
    assert place.parent == tmp_path / "all"
    other = plan.absolute(
        config(archive, tmp_path / "x" / "out", train__checkpoints=str(tmp_path / "all"))
    )
    assert rundir.place_of(other) != str(place)
    (place / "checkpoints" / "checkpoint_1").mkdir(parents=True)
    for name in ("notes.txt", "best-3.safetensors", "checkpoints/checkpoint_1/state.json"):
        (place / name).write_text("x")
    rundir.begin(str(place), cfg, list(list_shards(str(archive))))
    assert sorted(path.name for path in place.iterdir()) == ["notes.txt", "run.json"]


def test_a_run_without_a_checkpoint_keeps_nobody_out(archive: Path, tmp_path: Path) -> None:
    """A config that failed at once may be mended without deleting anything."""
    place, shards = str(tmp_path / "run"), list(list_shards(str(archive)))
    cfg, other = config(archive, tmp_path), config(archive, tmp_path, train__lr=0.5)
    rundir.begin(place, cfg, shards)
    assert not rundir.open_run(place, cfg, shards) and not rundir.open_run(place, other, shards)
    snapshot = tmp_path / "run" / rundir.CHECKPOINTS / rundir.SNAPSHOT
    snapshot.parent.mkdir()
    snapshot.write_text("{}")
    assert rundir.open_run(place, cfg, shards)
    with pytest.raises(ConfigError, match=r"unfinished.*train\.lr is 0\.02, asked 0\.5"):
        rundir.open_run(place, other, shards)


def test_a_torn_snapshot_does_not_lock_a_run_out(tmp_path: Path) -> None:
    """Ray rewrites the file in place; a kill at that moment leaves half of it."""
    snapshot = tmp_path / "checkpoints" / rundir.SNAPSHOT
    snapshot.parent.mkdir()
    snapshot.write_text('{"ray_version": "2.6')
    rundir.drop_torn_snapshot(str(tmp_path))
    assert not snapshot.exists()
    snapshot.write_text("{}")
    rundir.drop_torn_snapshot(str(tmp_path))
    assert snapshot.exists()
