"""Training on a real Ray: every labelled row counts once, and a stopped run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import elastic
import numpy as np
import pytest
import safetensors.torch
import sitting
import tiny
import torch
from conftest import Endpoint
from ray._private.state import actors as ray_actors  # `list_actors` needs a dashboard
from stage import learned

from mmray import bundle as bundles
from mmray import storage
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards
from mmray.config import TrainConfig, validate
from mmray.engine import cluster, loop, plan, rundir
from mmray.engine import train as engine
from mmray.engine.board import Board
from mmray.engine.evaluate import evaluate
from mmray.engine.prepared import Wanted, prepare_chunk
from mmray.engine.train import TrainResult, train
from mmray.engine.workers import Workers, choose_workers
from mmray.errors import ConfigError, RunError, StorageError
from mmray.lease import Lease
from mmray.model.image import SmallCNN
from mmray.predict import Predictor
from mmray.preprocess import Preprocessor, train_tokenizer
from mmray.report.evaluation import table

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
                found[f"{row:05d}.jpg"] = found[f"{row:05d}.jpg"][: 200 + row]
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
    no dropout, no bf16."""
    image = {"model__image__weights": str(backbone), "model__image__freeze": True}
    return config(archive, out, train__precision="float32", **image, **keys)


def losses(result: TrainResult) -> list[float]:
    return [epoch[name] for epoch in result.metrics["epochs"] for name in ("loss", "dev_loss")]


# --- with Ray ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, archive: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    out = tmp_path_factory.mktemp("bundles") / "undisturbed"
    return train(steady(archive, out, backbone), progress=lambda _: None)


def test_on_a_ray_of_its_own_it_starts_no_process_that_has_nothing_to_do(
    undisturbed: TrainResult,
) -> None:
    started = {actor["ActorClassName"] for actor in ray_actors().values()}
    assert {"TrainController", "RayTrainWorker"} <= started
    assert not started & {
        "_AutoscalingCoordinatorActor",
        "DatasetManager",
        "PlacementGroupCleaner",
        "PreemptionWatcher",
    }


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
    for name in ("rows", "confusion", "accuracy", "macro_f1", "auroc", "per_class"):
        assert metrics[name] == dev[name], name
    # A mean of probabilities, whose last digits folding the batch norms changes.
    assert metrics["ece"] == pytest.approx(dev["ece"], abs=1e-6)
    assert sum(metrics["set_aside"].values()) == 1
    assert "14 rows" in table(metrics) and "14 rows" in table(dev)


def test_rows_that_do_not_fit_are_decoded_again_in_every_epoch(
    ray_cluster: None, archive: Path, tmp_path: Path
) -> None:
    """Any archive can be trained on, whatever the memory; every dev row counts once."""
    lines: list[str] = []
    cfg = config(archive, tmp_path / "out", train__window_rows=16)
    done = train(cfg, progress=lines.append)
    (said,) = (line for line in lines if line.startswith("rows are decoded in every epoch, 16 at"))
    assert "73 rows take 0.00 GB" in said
    assert done.metrics["dev"]["rows"] == 14 and done.metrics["dev"]["accuracy"] >= 0.85
    assert all(0 <= epoch["data_wait"] < 1 for epoch in done.metrics["epochs"])
    assert bundles.load(done.bundle).training.train.window_rows == 16


def test_the_model_learned_what_the_captions_say(undisturbed: TrainResult) -> None:
    assert undisturbed.metrics["dev"]["accuracy"] >= 0.85


def test_a_finished_run_leaves_its_history_and_nothing_to_do(
    undisturbed: TrainResult, archive: Path, backbone: Path
) -> None:
    """A repeated command must neither train again nor fail a script."""
    place = Path(f"{undisturbed.bundle}.run")
    names = {path.relative_to(place).parts[0] for path in place.rglob("*") if path.is_file()}
    assert names == {"history.json", "last.safetensors", "logs", "run.json"}
    best = safetensors.torch.load(Path(undisturbed.bundle, bundles.WEIGHTS).read_bytes())
    last = safetensors.torch.load((place / "last.safetensors").read_bytes())
    assert {name: tensor.shape for name, tensor in last.items()}.items() <= {
        name: tensor.shape for name, tensor in best.items()
    }.items()
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


def test_told_to_end_it_goes_on_where_it_was_with_another_number_of_workers(
    undisturbed: TrainResult,
    archive: Path,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM, which a machine that is shut down sends, is Ctrl-C; both leave a checkpoint. What
    comes out is what an undisturbed run gives: no row was skipped or taken twice."""
    monkeypatch.setattr(engine, "SAY_SECONDS", 0.0)
    out = tmp_path / "stopped"
    pressed: list[str] = []

    def press(line: str) -> None:
        if line.startswith("epoch 1/4") and not pressed:
            pressed.append(line)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(steady(archive, out, backbone), progress=press)
    assert pressed and not (out / bundles.MANIFEST).exists()
    with pytest.raises(ConfigError, match=r"unfinished.*model\.hidden is 16, asked 8"):
        train(steady(archive, out, backbone, model__hidden=8), progress=lambda _: None)

    lines: list[str] = []
    done = train(steady(archive, out, backbone, train__num_workers=1), progress=lines.append)
    assert any(line.startswith("going on from a checkpoint") for line in lines)
    np.testing.assert_allclose(losses(done), losses(undisturbed), rtol=1e-3)
    assert done.metrics["dev"]["confusion"] == undisturbed.metrics["dev"]["confusion"]


def recorded(place: Path) -> dict[str, int] | None:
    """Where the last checkpoint is that Ray has on record below ``place``: it takes one up every
    two seconds, and one that it has not when all is killed does not count."""
    for path in place.rglob(rundir.SNAPSHOT):
        try:
            latest = json.loads(path.read_bytes())["latest_checkpoint_result"]
        except ValueError:  # it is being written
            return None
        return None if latest is None else latest["metrics"]
    return None


def test_a_job_killed_with_all_its_processes_goes_on_inside_the_epoch(
    undisturbed: TrainResult, archive: Path, backbone: Path, tmp_path: Path
) -> None:
    """SIGKILL for driver, Ray and workers alike, as when the machine loses power; the same command
    with one worker instead of two learns from the rows that are left, and ends where the
    undisturbed run does."""

    def begun(workers: int, *end: int) -> subprocess.Popen[bytes]:
        cfg = steady(archive, tmp_path / "out", backbone, train__num_workers=workers)
        return subprocess.Popen(
            [sys.executable, sitting.__file__, cfg.model_dump_json(), tmp_path, *map(str, end)],
            start_new_session=True,
            env={**os.environ, "RAY_ADDRESS": "local"},
        )

    first = begun(2, 1, 3)
    try:
        deadline = time.monotonic() + 300
        while recorded(tmp_path) != {"epoch": 1, "step": 3}:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        sitting.kill_session(first.pid)
        first.wait()
    second = begun(1)
    try:
        assert second.wait(300) == 0
    finally:
        sitting.kill_session(second.pid)

    result = json.loads((tmp_path / "result.json").read_text())
    (line,) = (line for line in result["lines"] if line.startswith("going on from a checkpoint"))
    assert line.endswith("epoch 2 of 4, step 3 of 8 done")
    np.testing.assert_allclose(result["losses"], losses(undisturbed), rtol=1e-3)
    before, after = (taken for _, taken in sorted(learned(tmp_path).items()))
    assert max(before) == (1, 2) and min(after) == (1, 3) and max(after) == (3, 7)
    for epoch in range(4):
        rows = [row for (at, _), found in (before | after).items() if at == epoch for row in found]
        assert len(rows) == len(set(rows)) == 57


def test_a_worker_killed_while_training_from_s3_to_s3_costs_a_checkpoint_at_most(
    undisturbed: TrainResult,
    s3_endpoint: Endpoint,
    archive: Path,
    backbone: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Archive, checkpoints, curves and bundle in a bucket; the losses are the undisturbed run's.

    By the third epoch the first one's checkpoint is on record: a worker hands over a report only
    when the controller, which looks every other second, has taken the one before.
    """
    monkeypatch.setattr(engine, "SAY_SECONDS", 0.0)
    bucket = s3_endpoint.bucket()
    for path in sorted(archive.iterdir()):
        storage.write_file(storage.join(bucket, "archive", path.name), path)
    lines: list[str] = []
    heaps: list[bool] = []

    def kill(line: str) -> None:
        if line.startswith("epoch 3/4") and not any(seen.startswith("epoch 3/4") for seen in lines):
            worker = training_worker()
            heaps.append(b"MALLOC_ARENA_MAX=1" in Path(f"/proc/{worker}/environ").read_bytes())
            os.kill(worker, signal.SIGKILL)
        lines.append(line)

    cfg = steady(f"{bucket}/archive", f"{bucket}/bundle", backbone)
    done = train(cfg, progress=kill)
    assert heaps == [True], "a heap for each thread costs a training worker one row in twenty"
    (again,) = (line for line in lines if line.startswith("going on from a checkpoint: epoch "))
    assert again[len("going on from a checkpoint: epoch ")] in "234", again
    np.testing.assert_allclose(losses(done), losses(undisturbed), rtol=1e-3)
    assert bundles.load(f"{bucket}/bundle").labels == bundles.load(undisturbed.bundle).labels
    left = {item.path for item in storage.list_objects(f"{bucket}/bundle.run")}
    kept = {"history.json", "last.safetensors", "logs", "run.json"}
    assert {path.split("/")[0] for path in left} == kept


def test_a_controller_killed_is_said_and_the_same_call_goes_on(
    undisturbed: TrainResult, archive: Path, backbone: Path, tmp_path: Path
) -> None:
    """In the same process: what the dead one had reserved is free again. Its epochs are quick: of
    one that died before a checkpoint was on record, another one is killed."""
    lines: list[str] = []

    def kill(line: str) -> None:
        if line.startswith("epoch 3/4"):
            actors = ray_actors(actor_state_name="ALIVE").values()
            (pid,) = (a["Pid"] for a in actors if a["ActorClassName"] == "TrainController")
            os.kill(pid, signal.SIGKILL)

    for attempt in map(str, range(5)):
        cfg = steady(archive, tmp_path / attempt / "out", backbone)
        said = r"drives the training workers died .* the same command"
        with pytest.raises(RunError, match=said):
            train(cfg, progress=kill)
        if recorded(tmp_path / attempt) is not None:
            break
    done = train(cfg, progress=lines.append)
    assert any(line.startswith("going on from a checkpoint: epoch ") for line in lines)
    np.testing.assert_allclose(losses(done), losses(undisturbed), rtol=1e-3)


def test_grows_with_the_cluster_and_shrinks_after_a_notice(
    undisturbed: TrainResult, archive: Path, backbone: Path, tmp_path: Path
) -> None:
    """One worker, two, one again: the same rows in every step, the same losses; the notice leads to
    a checkpoint, after which one worker goes on."""
    record = tmp_path / "record"
    record.mkdir()
    cfg = steady(archive, tmp_path / "out", backbone, train__num_workers={"min": 1, "max": 2})
    done = subprocess.run(
        [sys.executable, elastic.__file__, cfg.model_dump_json(), str(record)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((record / "result.json").read_text())
    np.testing.assert_allclose(result["losses"], losses(undisturbed), rtol=1e-3)
    sittings = [taken for _, taken in sorted(learned(record).items())]
    whole: dict[tuple[int, int], list[int]] = {}
    for taken in sittings:
        whole |= taken
    assert len(whole) == 32 and len(sittings) >= 3
    for epoch in range(4):
        rows = [row for (at, _), found in whole.items() if at == epoch for row in found]
        assert len(rows) == len(set(rows)) == 57
    for taken in sittings:
        for at, rows in taken.items():
            assert set(rows) <= set(whole[at])  # a step that was cut off may lack a worker's rows
    assert any("taken away: checkpoint" in line for line in result["lines"])


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


# --- without Ray ---------------------------------------------------------------------------------


def test_a_side_that_no_training_row_lacks_is_said(tmp_path: Path) -> None:
    """What stands in for it would stay a random vector, and be scored with all the same."""
    cfg = config("a", tmp_path, model__missing=True)
    text = train_tokenizer(map(tiny.caption, range(50)), cfg.preprocess.text)
    preprocessor = Preprocessor(cfg.preprocess, text, "both", missing=True)
    wanted = Wanted(np.zeros(4, np.int32), np.array([False, False, True, True]))

    def said(cfg: TrainConfig, *lacking: str) -> list[str]:
        """Of four rows, the last two held out, each of which may lack something."""
        samples = [
            Sample(
                "a",
                i,
                str(i),
                None if what == "picture" else tiny.jpeg(i),
                None if what == "caption" else tiny.caption(i),
            )
            for i, what in enumerate(lacking)
        ]
        return engine.never_missing(cfg, [prepare_chunk("a", samples, wanted, preprocessor)])

    assert len(said(cfg, "", "", "picture", "caption")) == 2
    (line,) = said(cfg, "", "picture", "", "")
    assert "no training row lacks its caption" in line and "train.modality_dropout" in line
    assert not said(cfg, "caption", "picture", "", "")
    assert not said(config("a", tmp_path), "", "", "", "")
    dropped = config("a", tmp_path, model__missing=True, train__modality_dropout=0.1)
    assert not said(dropped, "", "", "", "")


def test_a_run_whose_loss_is_not_finite_leaves_its_best_weights(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day of training must not be lost to one step; the next command begins clean."""
    cfg, shards = plan.absolute(config(archive, tmp_path / "out")), list(list_shards(str(archive)))
    place, state = tmp_path / "out.run", {"epoch": 4, "step": 6, "outcome": loop.FAILED}
    said = r"not finite in epoch 5, step 7; a lower train\.lr .*may help"

    def failed(best: dict[str, Any] | None) -> str:
        done = state | {"best": best}
        trainer = SimpleNamespace(fit=lambda: SimpleNamespace(return_value=done))
        monkeypatch.setattr("mmray.engine.fit._trainer_type", lambda: lambda *_, **__: trainer)
        monkeypatch.setattr(engine, "ray", SimpleNamespace(put=lambda x: x, train=engine.ray.train))
        anything: Any = SimpleNamespace(names=(), members=lambda: None, refs=[])
        board: Any = SimpleNamespace(attend=lambda job, **_: job(), actor=None)
        run = engine._Training(plan.make_plan(cfg, shards), lambda _: None, anything)
        run.tracked = None
        workers = Workers(count=1, least=1, gpu=False, cpus=1)
        with pytest.raises(RunError, match=said) as error:
            run._fit(anything, anything, anything, None, b"", workers, board, None, None)
        return str(error.value)

    rundir.begin(str(place), cfg, shards)
    for name in ("best-1.safetensors", "best-3.safetensors", "tokenizer.json"):
        (place / name).write_text(name)
    kept = place / "failed" / "best-3.safetensors"
    assert failed({"epoch": 3}).endswith(f"; its best weights are kept: {kept}")
    assert sorted(path.name for path in place.rglob("*")) == [
        "best-3.safetensors",
        "failed",
        "tokenizer.json",
    ]
    assert not rundir.is_open(str(place))
    rundir.begin(str(place), cfg, shards)
    assert failed(None).endswith("may help") and kept.read_text() == "best-3.safetensors"
    rundir.begin(str(place), cfg, shards)
    (place / "best-2.safetensors").write_text("other")
    failed({"epoch": 2})
    assert [path.name for path in kept.parent.iterdir()] == ["best-2.safetensors"]


# --- before Ray ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data__label": "season"}, r"data\.label: got 'season'.*label, split"),
        ({"model__image__encoder": "resnet5"}, r"model\.image\.encoder: got 'resnet5'"),
        ({"model__image__weights": "no.safetensors"}, r"model\.image\.weights: no\.safetensors"),
        ({"preprocess__text__tokenizer": "no.json"}, r"preprocess\.text\.tokenizer: .*no\.json"),
        (
            {
                "train__augment": {"flip": True},
                "model__image__weights": "some.safetensors",
                "model__image__freeze": None,
            },
            r"train\.augment: .*frozen image encoder.*set model\.image\.freeze to false",
        ),
        ({"train__mlflow": "http://there"}, r"train\.mlflow: .*not installed"),
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


def test_a_second_command_on_a_run_is_refused(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would clear the first one's weights and checkpoints away, or both would write them."""
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was asked for"))
    cfg = config(archive, tmp_path / "out")
    place = tmp_path / "out.run"
    rundir.begin(str(place), plan.absolute(cfg), list(list_shards(str(archive))))
    (place / rundir.best_name(1)).write_bytes(b"of the first")
    with Lease(str(place), print):
        before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
        with pytest.raises(ConfigError, match=r"out\.run: another command works on it \(process"):
            train(cfg, progress=lambda _: None)
        assert before == {path: path.read_bytes() for path in place.iterdir() if path.is_file()}


def test_a_run_that_another_command_finished_meanwhile_is_left_as_it_is(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look at the run and its lease another command may have ended it."""
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was asked for"))
    made = bundles.read_manifest(tiny.bundle(str(tmp_path / "model")))
    looks = iter([None, made])
    monkeypatch.setattr(rundir, "finished", lambda *_: next(looks))
    assert not train(config(archive, tmp_path / "out"), progress=lambda _: None).trained


def test_a_run_whose_lease_is_taken_ends(ray_cluster: None) -> None:
    """Another machine has begun it again: two commands must not both write its checkpoints."""

    def taken() -> None:
        raise RunError("another command has taken over")

    with Board(print, taken) as board, pytest.raises(RunError, match="taken over"):
        board.attend(lambda: time.sleep(30))


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
    assert chosen.least == chosen.count


def test_more_workers_than_the_cluster_has_are_refused(tmp_path: Path) -> None:
    """Ray would wait for them for ever."""
    with pytest.raises(ConfigError, match=r"train\.num_workers: got 4; the cluster has 2 CPUs"):
        choose_workers(config(tmp_path, tmp_path, train__num_workers=4), machine(2, 0), [2])
    with pytest.raises(ConfigError, match=r"train\.use_gpu: got true; the cluster has 0 GPUs"):
        cfg = config(tmp_path, tmp_path, train__num_workers=None, train__use_gpu=True)
        choose_workers(cfg, machine(2, 0), [2])


def test_a_range_of_workers_needs_the_least_only(tmp_path: Path) -> None:
    cfg = config(tmp_path, tmp_path, train__num_workers={"min": 1, "max": 4})
    chosen = choose_workers(cfg, machine(2, 0), [2])
    assert (chosen.least, chosen.count, chosen.cpus) == (1, 4, 1)
    assert str(chosen).startswith("1 to 4 workers")
    assert choose_workers(cfg, machine(8, 0), [8]).cpus == 2
    few = config(tmp_path, tmp_path, train__num_workers={"min": 3, "max": 4})
    with pytest.raises(ConfigError, match=r"train\.num_workers: got 3; the cluster has 2 CPUs"):
        choose_workers(few, machine(2, 0), [2])


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"min": 3, "max": 2}, r"num_workers\.min: got 3; must not be more than max \(2\)"),
        ({"min": 1}, r"train\.num_workers\.max: missing"),
        ({"max": 2, "most": 3}, r"train\.num_workers\.most: unknown key; allowed here: max, min"),
        (9, r"train\.batch_size: got 8; must be at least train\.num_workers \(9\)"),
        (0, r"train\.num_workers"),
        ("many", r"train\.num_workers: got 'many'"),
        (True, r"train\.num_workers: got True"),
    ],
)
def test_a_number_of_workers_that_cannot_be_is_refused(
    workers: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, tmp_path, train__num_workers=workers)
    assert config(tmp_path, tmp_path, train__num_workers=3).train.batch_size == 8  # uneven shares


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_seed_that_no_generator_takes_is_refused(seed: Any, tmp_path: Path) -> None:
    """Not hours later, by a worker."""
    with pytest.raises(ConfigError, match=f"seed: got {seed}"):
        config(tmp_path, tmp_path, seed=seed)
    assert config(tmp_path, tmp_path, seed=2**32 - 1).seed == 2**32 - 1


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
