"""The training loop without Ray: one worker in this process, with Ray's part played by the test."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import tiny
import torch
from stage import Killed, Stage, learned, new_job, often, rank_of
from tensorboardX.proto.event_pb2 import Event

from mmray import augment, learn
from mmray.archive.rows import Sample
from mmray.config import TrainConfig, validate
from mmray.counts import AnswerCounts
from mmray.engine import frozen, loop
from mmray.engine.feed import Feed
from mmray.engine.prepared import BLOCK_SCHEMA, PreparedRows, Wanted, prepare_chunk
from mmray.engine.rundir import SOUP, best_name
from mmray.engine.scan import one_row
from mmray.model import FusionModel, ModelSpec, build_model, make_spec
from mmray.preprocess import Preprocessor, train_tokenizer

SIZE = 32
measure = loop._Worker._evaluate


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in TensorBoard's event files: name -> (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + size :]
    return found


def config(out: Path, **train: Any) -> TrainConfig:
    tree = {
        "data": {"archive": "none"},
        "out": str(out),
        "preprocess": {"image": {"size": SIZE}, "text": {"vocab_size": 300, "max_tokens": 16}},
        "model": {
            "text": {"dim": 16, "layers": 1, "heads": 2},
            "hidden": 16,
            "dropout": 0.2,
            "missing": "modality_dropout" in train,
        },
        "train": {"epochs": 3, "batch_size": 8, **train},
    }
    return validate(TrainConfig, tree, "test")


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    cfg = config(Path("none")).preprocess
    return Preprocessor(cfg, train_tokenizer(map(tiny.caption, range(50)), cfg.text), "both")


def samples_of(count: int) -> list[Sample]:
    return [Sample("a.tar", i, str(i), tiny.jpeg(i), tiny.caption(i)) for i in range(count)]


def blocks_of(samples: list[Sample], preprocessor: Preprocessor) -> list[pa.Table]:
    """Chunks of 10 rows, every fifth a dev row; row 3 is not used."""
    at = np.arange(len(samples))
    wanted = Wanted((at % 2).astype(np.int32), at % 5 == 0)
    wanted.classes[3] = -1
    found = []
    for start in range(0, len(samples), 10):
        chunk = samples[start : start + 10]
        where = {"shard": "a.tar", "start": start, "stop": start + len(chunk), "byte": start}
        values = dict.fromkeys(BLOCK_SCHEMA.names) | where
        values |= prepare_chunk("a.tar", chunk, wanted, preprocessor)
        found.append(one_row(values, BLOCK_SCHEMA))
    return found


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return samples_of(47)


@pytest.fixture(scope="module")
def blocks(samples: list[Sample], preprocessor: Preprocessor) -> list[pa.Table]:
    return blocks_of(samples, preprocessor)


def spec_for(cfg: TrainConfig, preprocessor: Preprocessor) -> ModelSpec:
    tokenizer = preprocessor.tokenizer
    assert tokenizer is not None
    return make_spec(
        cfg.model,
        num_classes=2,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        max_tokens=16,
        image_size=SIZE,
    )


def job(cfg: TrainConfig, place: Path, blocks: list[pa.Table], spec: ModelSpec) -> dict[str, Any]:
    return {"job": new_job(cfg, place, blocks, spec, tiny.LABELS)}


def weights(place: Path, done: dict[str, Any]) -> dict[str, torch.Tensor]:
    name = SOUP if "soup" in done["best"] else best_name(done["best"]["epoch"])
    data = (place / name).read_bytes()
    return safetensors.torch.load(data)


def without_times(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("seconds", "rows_per_s", "data_wait")
    return [{k: v for k, v in epoch.items() if k not in times} for epoch in epochs]


# --- rows ----------------------------------------------------------------------------------------


def test_prepared_rows_are_what_the_preprocessor_makes(
    blocks: list[pa.Table], samples: list[Sample], preprocessor: Preprocessor
) -> None:
    """Training must see the pixels and tokens that scoring will see."""
    shuffled = [blocks[i] for i in (3, 0, 4, 2, 1)]
    train = PreparedRows(shuffled, dev=False, image_size=SIZE)
    dev = PreparedRows(shuffled, dev=True, image_size=SIZE)
    used = [i for i in range(47) if i % 5 and i != 3]
    assert (len(train), len(dev)) == (len(used), 10)
    assert train.classes.tolist() == [i % 2 for i in used]
    for at, row in enumerate(used):
        expected, got = preprocessor.prepare(samples[row]), train.prepared(at)
        assert expected.pixels is not None and got.pixels is not None
        assert expected.tokens is not None and got.tokens is not None
        assert (expected.pixels == got.pixels).all()
        assert expected.tokens.tolist() == got.tokens.tolist()


def test_uneven_shares_weigh_every_row_the_same(
    blocks: list[pa.Table], preprocessor: Preprocessor, tmp_path: Path
) -> None:
    """The mean of the ranks' gradients, as DDP takes it, is that of the whole step."""
    cfg = config(tmp_path, grad_clip=None, precision="float32")
    spec = spec_for(cfg, preprocessor).model_copy(
        update={"config": cfg.model.model_copy(update={"dropout": 0.0})}
    )
    rows = PreparedRows(blocks, dev=False, image_size=SIZE)

    def gradients(at: list[int], n: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(spec).eval()  # batch norm would see each rank's rows apart
        optimizer = learn.make_optimizer(model, cfg.train)
        batch = rows.batch(np.array(at))
        learn.train_step(model, batch, optimizer, 0.0, cfg.train, rows=n)
        return [p.grad for p in model.parameters() if p.grad is not None]

    whole = gradients([0, 1, 2, 3, 4], 5)
    ranks = [gradients([0, 1, 2], 5 / 3), gradients([3, 4], 5 / 3), gradients([0], math.inf)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        torch.testing.assert_close(sum(parts) / 3, expected, rtol=1e-4, atol=1e-6)


# --- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "keys"),
    [
        ("stopped", {}),
        ("killed", {"average": "ema", "accumulate": 3, "augment": {"crop": 0.5, "colour": 0.4}}),
        ("stopped", {"average": "soup", "augment": {"flip": True}, "precision": "bf16"}),
    ],
)
def test_goes_on_inside_an_epoch_as_if_nothing_had_happened(
    how: str,
    keys: dict[str, Any],
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batch norm, dropout, optimizer, averages, pictures and row order go on where they were: the
    same weights."""
    cfg = config(tmp_path, **keys)
    spec = spec_for(cfg, preprocessor)
    Stage(tmp_path / "whole", monkeypatch.setattr)
    whole = loop.train_loop(job(cfg, tmp_path / "whole", blocks, spec))
    assert whole["outcome"] == loop.DONE and len(whole["epochs"]) == 3

    place = tmp_path / "parts"
    first = Stage(place, monkeypatch.setattr)
    task = job(cfg, place, blocks, spec)
    if how == "stopped":
        first.stop_after = 8  # of 5 steps an epoch: in the second
        assert loop.train_loop(task)["outcome"] == loop.STOPPED
    else:
        first.kill_after = 9
        with pytest.raises(Killed):
            loop.train_loop({"job": often(task["job"])})
    second = Stage(place, monkeypatch.setattr)
    done = loop.train_loop(task)
    assert any(line.startswith("going on from a checkpoint: epoch 2") for line in second.lines)
    assert done["outcome"] == loop.DONE
    assert without_times(done["epochs"]) == without_times(whole["epochs"])
    assert done["best"] == whole["best"]
    expected, got = weights(tmp_path / "whole", whole), weights(place, done)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_a_run_killed_before_its_last_checkpoints_are_on_record_still_has_its_best_weights(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A report returns before it is on record: the run goes on from the one before it, and what
    that says is the best must be there, or the run can never end."""
    cfg = config(tmp_path, epochs=3)
    spec = spec_for(cfg, preprocessor)
    played(monkeypatch, [0.5, 0.6, 0.7])
    first = Stage(tmp_path, monkeypatch.setattr)
    first.behind, first.kill_after = 2, 3
    with pytest.raises(Killed):
        loop.train_loop(job(cfg, tmp_path, blocks, spec))
    assert json.loads((first.last / "state.json").read_text())["epoch"] == 1
    played(monkeypatch, [0.4, 0.3])  # another number of workers, another dropout
    Stage(tmp_path, monkeypatch.setattr)
    done = loop.train_loop(job(cfg, tmp_path, blocks, spec))
    assert done["best"]["epoch"] == 1 and weights(tmp_path, done)


def test_best_weights_of_long_ago_are_let_go(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those of an earlier sitting; a run of a hundred epochs must not fill the disk."""
    cfg = config(tmp_path, epochs=8)
    played(monkeypatch, [0.1, 0.2, 0.3, 0.2, 0.4, 0.5, 0.6, 0.7])
    task = job(cfg, tmp_path, blocks, spec_for(cfg, preprocessor))
    Stage(tmp_path, monkeypatch.setattr).stop_after = 17
    assert loop.train_loop(task)["outcome"] == loop.STOPPED
    Stage(tmp_path, monkeypatch.setattr)
    assert loop.train_loop(task)["best"]["epoch"] == 8
    kept = sorted(int(path.stem.removeprefix("best-")) for path in tmp_path.glob("best-*"))
    assert kept == [5, 6, 7, 8]


def played(monkeypatch: pytest.MonkeyPatch, f1: list[float]) -> None:
    """Evaluations come to these figures."""
    figures = iter(f1)
    monkeypatch.setattr(
        loop._Worker,
        "_evaluate",
        lambda self: {**measure(self), "macro_f1": next(figures), "loss": 1.0},
    )


def test_every_seed_and_step_has_random_numbers_of_its_own(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout and changes of pictures; torch's generator on the CPU sees 32 bits of a seed. Else
    runs that differ by their seed say less of the spread than it seems."""
    drawn: list[int] = []
    draw, train_step = augment.draw, learn.train_step

    def watched_draw(rows: int, seed: int) -> torch.Tensor:
        drawn.append(seed & 0xFFFF_FFFF)
        return draw(rows, seed)

    def watched_step(*args: Any, **keys: Any) -> Any:
        drawn.append(torch.initial_seed() & 0xFFFF_FFFF)
        return train_step(*args, **keys)

    monkeypatch.setattr(augment, "draw", watched_draw)
    monkeypatch.setattr(learn, "train_step", watched_step)
    for seed in (0, 1, 2**32 - 1):
        cfg = config(tmp_path, epochs=1, augment={"flip": True}).model_copy(update={"seed": seed})
        place = tmp_path / str(seed)
        Stage(place, monkeypatch.setattr)
        loop.train_loop(job(cfg, place, blocks, spec_for(cfg, preprocessor)))
    assert len(drawn) == 3 * 5 * 2 == len(set(drawn))


def test_a_notice_that_a_machine_goes_away_leads_to_a_checkpoint(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, though the next was not due for long; and not again for every look."""
    cfg = config(tmp_path, epochs=1)
    monkeypatch.setattr(loop, "LOOK_SECONDS", -1.0)
    stage = Stage(tmp_path, monkeypatch.setattr)
    stage.notice_after, stage.kill_after = 2, 1
    with pytest.raises(Killed):
        loop.train_loop(job(cfg, tmp_path, blocks, spec_for(cfg, preprocessor)))
    state = json.loads((stage.last / "state.json").read_text())
    assert (state["epoch"], state["step"]) == (0, 3)
    again = Stage(tmp_path, monkeypatch.setattr)
    again.notice_after = 0
    assert loop.train_loop(job(cfg, tmp_path, blocks, spec_for(cfg, preprocessor)))["epoch"] == 1
    assert again.reports == 2  # one for the notice, one for the epoch
    assert any("taken away" in line for line in again.lines)


# --- averages, early stopping, curves ------------------------------------------------------------


def test_averaged_weights_are_what_is_measured_and_kept(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bundle of other weights than those measured would score otherwise than it says."""
    rows = PreparedRows(blocks, dev=True, image_size=SIZE)
    for average in ("ema", "soup"):
        place = tmp_path / average
        cfg = config(place, average=average, lr=3e-3)
        spec = spec_for(cfg, preprocessor)
        stage = Stage(place, monkeypatch.setattr)
        done = loop.train_loop(job(cfg, place, blocks, spec))
        model = build_model(spec)
        model.load_state_dict(weights(place, done))
        counts = AnswerCounts(tiny.LABELS)
        found = learn.evaluate_batches(model, [rows.batch(np.arange(10))], counts)
        dev = done["best"]["dev"]
        assert counts.report()["confusion"] == dev["confusion"]
        assert found.loss == pytest.approx(dev["loss"], rel=1e-4)
        last = safetensors.torch.load((stage.last / "model.safetensors").read_bytes())
        assert any(not torch.equal(last[name], t) for name, t in model.state_dict().items())


def test_a_soup_is_no_worse_than_its_best_epoch(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config(tmp_path, average="soup", lr=3e-3)
    Stage(tmp_path, monkeypatch.setattr)
    done = loop.train_loop(job(cfg, tmp_path, blocks, spec_for(cfg, preprocessor)))
    assert set(done["best"]["soup"]) <= {1, 2, 3}
    best = max((e["dev_macro_f1"], -e["dev_loss"]) for e in done["epochs"])
    assert (done["best"]["dev"]["macro_f1"], -done["best"]["dev"]["loss"]) >= best


def test_ends_after_patience_without_a_better_epoch(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the command is given again just then."""
    cfg = config(tmp_path, patience=2, epochs=9)
    played(monkeypatch, [0.4, 0.6, 0.5, 0.6, 0.9, 0.9])
    spec = spec_for(cfg, preprocessor)
    for lines in (True, False):
        stage = Stage(tmp_path, monkeypatch.setattr)
        done = loop.train_loop(job(cfg, tmp_path, blocks, spec))
        assert done["outcome"] == loop.DONE
        assert len(done["epochs"]) == 4 and done["best"]["epoch"] == 2
        assert lines == any("no better epoch in 2" in line for line in stage.lines)


def test_curves_of_a_run_are_there_for_tensorboard(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config(tmp_path)
    Stage(tmp_path, monkeypatch.setattr)
    done = loop.train_loop(job(cfg, tmp_path, blocks, spec_for(cfg, preprocessor)))
    seen = scalars(tmp_path / "logs")
    steps = list(range(3 * 5))
    for name in ("loss", "lr", "grad_norm", "rows_per_s", "data_wait_share"):
        assert [step for step, _ in seen[f"train/{name}"]] == steps, name
    lrs = [learn.lr_at(step, 15, cfg.train) for step in steps]
    assert [value for _, value in seen["train/lr"]] == pytest.approx(lrs)
    assert all(0 <= value < 1 for _, value in seen["train/data_wait_share"])
    for name in ("loss", "accuracy", "macro_f1"):
        want = [(4 + 5 * i, pytest.approx(e[f"dev_{name}"])) for i, e in enumerate(done["epochs"])]
        assert seen[f"dev/{name}"] == want
    off = config(tmp_path / "off", tensorboard=False, epochs=1)
    Stage(tmp_path / "off", monkeypatch.setattr)
    loop.train_loop(job(off, tmp_path / "off", blocks, spec_for(off, preprocessor)))
    assert not (tmp_path / "off" / "logs").exists()


# --- several workers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessPoolExecutor]:
    """Three processes, each a rank of what is asked of them."""
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def run_ranks(pool: ProcessPoolExecutor, world: int, made: loop.Job, **keys: Any) -> dict[str, Any]:
    """What a run of ``world`` processes gives; all ranks must come to the same."""
    waiting = [pool.submit(rank_of, world, rank, made, **keys) for rank in range(world)]
    first, *others = (future.result(timeout=300) for future in waiting)
    for other in others:
        assert (other["best"], other["outcome"]) == (first["best"], first["outcome"])
    return first


def steady_job(place: Path, preprocessor: Preprocessor, **keys: Any) -> loop.Job:
    """40 train rows in steps of 13, the last of one row, and 11 dev rows. What comes out does not
    depend on the number of workers: no batch norm that learns, no dropout."""
    cfg = config(place, batch_size=13, precision="float32", grad_clip=0.5, lr=1e-2, **keys)
    image = cfg.model.image.model_copy(update={"weights": "some.safetensors", "freeze": True})
    model = cfg.model.model_copy(update={"dropout": 0.0, "image": image})
    spec = spec_for(cfg, preprocessor).model_copy(update={"config": model})
    return new_job(cfg, place, blocks_of(samples_of(52), preprocessor), spec, tiny.LABELS)


def measured(done: dict[str, Any]) -> list[float]:
    return [epoch[name] for epoch in done["epochs"] for name in ("loss", "dev_loss")]


def test_one_two_and_three_workers_learn_the_same_and_count_the_same(
    ranks: ProcessPoolExecutor, preprocessor: Preprocessor, tmp_path: Path
) -> None:
    """Rows of every step, losses, weights, and counts of a dev set that no number divides; the
    number of workers decides how fast it goes, not what comes out."""
    keys = {"average": "ema", "class_weights": "balanced"}
    alone = steady_job(tmp_path / "1", preprocessor, **keys)
    one = rank_of(1, 0, alone)
    taken = learned(tmp_path / "1" / "record")["1 workers"]
    for epoch in range(3):
        rows = [row for step in range(4) for row in taken[epoch, step]]
        assert len(rows) == len(set(rows)) == 40
    for world, parts in ((2, 1), (3, 2)):
        place = tmp_path / str(world)
        made = steady_job(place, preprocessor, accumulate=parts, **keys)
        done = run_ranks(ranks, world, made)
        assert learned(place / "record")[f"{world} workers"] == taken
        np.testing.assert_allclose(measured(done), measured(one), rtol=1e-4)
        assert done["best"]["dev"]["confusion"] == one["best"]["dev"]["confusion"]
        assert done["best"]["dev"]["rows"] == 11
        expected, got = weights(tmp_path / "1", one), weights(place, done)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=1e-4)


def test_any_number_of_workers_drops_the_modalities_of_the_same_rows(
    ranks: ProcessPoolExecutor, preprocessor: Preprocessor, tmp_path: Path
) -> None:
    """Else models differ by the number of workers, and a run that goes on with another number is
    not the run that began."""
    keys = {"modality_dropout": 0.5, "epochs": 2}
    one = rank_of(1, 0, steady_job(tmp_path / "1", preprocessor, **keys))
    other = rank_of(
        1, 0, steady_job(tmp_path / "none", preprocessor, **keys | {"modality_dropout": 0.0})
    )
    assert not np.allclose(measured(other), measured(one), rtol=1e-3)
    for world in (2, 3):
        done = run_ranks(ranks, world, steady_job(tmp_path / str(world), preprocessor, **keys))
        np.testing.assert_allclose(measured(done), measured(one), rtol=1e-4)
        expected, got = weights(tmp_path / "1", one), weights(tmp_path / str(world), done)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=1e-4)


def test_a_worker_killed_in_mid_epoch_costs_nothing_but_time(
    ranks: ProcessPoolExecutor, preprocessor: Preprocessor, tmp_path: Path
) -> None:
    """Its fellows end with it; one worker alone goes on after the last checkpoint, inside the
    epoch: no row skipped, none repeated but those of the step that was not finished."""
    whole = rank_of(1, 0, steady_job(tmp_path / "whole", preprocessor))
    want = learned(tmp_path / "whole" / "record")["1 workers"]
    made = steady_job(tmp_path / "killed", preprocessor)
    with pytest.raises(BrokenProcessPool):
        run_ranks(ranks, 3, often(made), kill_at=(1, 2, 1))
    done = rank_of(1, 0, made)
    found = learned(tmp_path / "killed" / "record")
    before, after = found["3 workers"], found["1 workers"]
    unfinished = before.pop((1, 2), [])
    assert set(unfinished) <= set(want[1, 2])
    assert before | after == want
    assert not before.keys() & after.keys()
    np.testing.assert_allclose(measured(done), measured(whole), rtol=1e-4)
    assert done["best"]["dev"]["confusion"] == whole["best"]["dev"]["confusion"]


def test_a_loss_that_is_not_finite_ends_the_run(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of training on NaN would end in a bundle that scores nothing."""
    cfg = config(tmp_path, lr=1e30, grad_clip=None, warmup=0.0)
    Stage(tmp_path, monkeypatch.setattr)
    done = loop.train_loop(job(cfg, tmp_path, blocks, spec_for(cfg, preprocessor)))
    assert done["outcome"] == loop.FAILED and done["best"] is None


# --- frozen encoders -----------------------------------------------------------------------------


def test_features_computed_once_give_the_logits_of_the_whole_model(
    blocks: list[pa.Table], preprocessor: Preprocessor, tmp_path: Path
) -> None:
    """Else the bundle, which has the encoder, would score otherwise than the model trained."""
    cfg = config(tmp_path)
    model = _frozen_image(cfg, spec_for(cfg, preprocessor), tmp_path)
    rows = PreparedRows(blocks, dev=False, image_size=SIZE)
    at = np.array([5, 0, 30])
    plain = rows.batch(at)
    with torch.inference_mode():
        expected, _ = model.eval()(plain.pixels, plain.tokens, plain.mask)
    feed = Feed([rows], seed=0, rank=0, world=1)
    (made,) = frozen.precompute(model, [rows], feed, precision="float32", say=lambda *_: None)
    assert isinstance(model.image, frozen.Precomputed)
    batch = made.batch(at)
    assert batch.pixels is not None and batch.pixels.shape == (3, 256)
    with torch.inference_mode():
        got, _ = model.eval()(batch.pixels, batch.tokens, batch.mask, batch.pictured)
    torch.testing.assert_close(got, expected)
    assert not any(name.startswith("image.") for name in model.state_dict())


# --- pairs that lack something -------------------------------------------------------------------


@pytest.fixture(scope="module")
def incomplete(samples: list[Sample], preprocessor: Preprocessor) -> list[pa.Table]:
    """47 rows in chunks of 10: every third without its picture, every fourth of the rest without
    its caption, and all of the last chunk without a picture."""
    at = np.arange(len(samples))
    wanted = Wanted((at % 2).astype(np.int32), at % 5 == 0)
    does_without = Preprocessor(preprocessor.cfg, preprocessor.tokenizer, "both", missing=True)
    lacking = [
        replace(sample, image=None)
        if i % 3 == 0 or i >= 40
        else replace(sample, caption=None if i % 4 == 0 else sample.caption)
        for i, sample in enumerate(samples)
    ]
    found = []
    for start in range(0, len(samples), 10):
        chunk = lacking[start : start + 10]
        where = {"shard": "a.tar", "start": start, "stop": start + len(chunk), "byte": start}
        values = dict.fromkeys(BLOCK_SCHEMA.names) | where
        values |= prepare_chunk("a.tar", chunk, wanted, does_without)
        found.append(one_row(values, BLOCK_SCHEMA))
    return found


def test_prepared_rows_keep_what_is_not_there(incomplete: list[pa.Table]) -> None:
    train = PreparedRows(incomplete, dev=False, image_size=SIZE)
    used = [i for i in range(47) if i % 5]
    there = [(i % 3 != 0 and i < 40, i % 3 == 0 or i >= 40 or i % 4 != 0) for i in used]
    assert list(zip(train.pictured.tolist(), train.captioned.tolist(), strict=True)) == there
    rows = [train.prepared(i) for i in range(len(train))]
    assert [(row.pixels is not None, row.tokens is not None) for row in rows] == there


@pytest.mark.parametrize("sides", [("image",), ("image", "text")])
def test_features_computed_once_know_what_is_not_there(
    sides: tuple[str, ...], incomplete: list[pa.Table], preprocessor: Preprocessor, tmp_path: Path
) -> None:
    spec = spec_for(config(tmp_path), preprocessor)
    spec = spec.model_copy(update={"config": spec.config.model_copy(update={"missing": True})})
    model = build_model(spec).eval()
    for encoder in sides:
        model.get_submodule(encoder).settle(pretrained=True, frozen=True)  # type: ignore[operator]
    rows = PreparedRows(incomplete, dev=False, image_size=SIZE)
    at = np.arange(len(rows))
    plain = rows.batch(at)
    assert plain.pictured is not None and plain.mask is not None
    assert not plain.pictured.all() and not plain.mask.any(1).all()
    with torch.inference_mode():
        expected, _ = model(plain.pixels, plain.tokens, plain.mask, plain.pictured)
    feed = Feed([rows], seed=0, rank=0, world=1)
    (made,) = frozen.precompute(model, [rows], feed, precision="float32", say=lambda *_: None)
    batch = made.batch(at)
    with torch.inference_mode():
        got, _ = model.eval()(batch.pixels, batch.tokens, batch.mask, batch.pictured)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_training_goes_on_without_pictures_or_captions(
    incomplete: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same rows are left without in a step that is run again: the same weights."""
    cfg = config(tmp_path, modality_dropout=0.5, batch_size=4, epochs=2)
    spec = spec_for(cfg, preprocessor)
    found = []
    for place in (tmp_path / "a", tmp_path / "b"):
        Stage(place, monkeypatch.setattr)
        done = loop.train_loop(job(cfg, place, incomplete, spec))
        assert done["outcome"] == loop.DONE and done["epochs"][-1]["dev_accuracy"] > 0
        found.append(weights(place, done))
    assert {"no_image.vector", "no_text.vector"} <= found[0].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def _frozen_image(cfg: TrainConfig, spec: ModelSpec, folder: Path) -> FusionModel:
    image = cfg.model.image.model_copy(update={"weights": "some.safetensors", "freeze": True})
    frozen_cfg = cfg.model.model_copy(update={"image": image})
    return build_model(spec.model_copy(update={"config": frozen_cfg}))


def test_nothing_frozen_changes_nothing(
    blocks: list[pa.Table], preprocessor: Preprocessor, tmp_path: Path
) -> None:
    cfg = config(tmp_path)
    model = build_model(spec_for(cfg, preprocessor))
    rows = PreparedRows(blocks, dev=True, image_size=SIZE)
    feed = Feed([rows], seed=0, rank=0, world=1)
    (made,) = frozen.precompute(model, [rows], feed, precision="float32", say=lambda *_: None)
    assert not isinstance(model.image, frozen.Precomputed)
    batch = made.batch(np.array([1]))
    assert batch.pixels is not None and batch.pixels.dtype == torch.uint8
