"""The training loop without Ray: one worker in this process, with Ray's part played by the test."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import tiny
import torch

from mmray import learn
from mmray.archive.rows import Sample
from mmray.config import TrainConfig, validate
from mmray.engine import frozen, loop
from mmray.engine.checkpoint import pack_weights
from mmray.engine.loop import order_of, share_of
from mmray.engine.prepared import BLOCK_SCHEMA, PreparedRows, Wanted, _prepare_chunk
from mmray.engine.rundir import best_name
from mmray.engine.scan import one_row
from mmray.model import FusionModel, ModelSpec, build_model, make_spec
from mmray.preprocess import Preprocessor, train_tokenizer

SIZE = 32


def config(out: Path, **train: Any) -> TrainConfig:
    tree = {
        "data": {"archive": "none"},
        "out": str(out),
        "preprocess": {"image": {"size": SIZE}, "text": {"vocab_size": 300, "max_tokens": 16}},
        "model": {"text": {"dim": 16, "layers": 1, "heads": 2}, "hidden": 16, "dropout": 0.2},
        "train": {"epochs": 3, "batch_size": 8, **train},
    }
    return validate(TrainConfig, tree, "test")


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    cfg = config(Path("none")).preprocess
    return Preprocessor(cfg, train_tokenizer(map(tiny.caption, range(50)), cfg.text), "both")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [Sample("a.tar", i, str(i), tiny.jpeg(i), tiny.caption(i)) for i in range(47)]


@pytest.fixture(scope="module")
def blocks(samples: list[Sample], preprocessor: Preprocessor) -> list[pa.Table]:
    """47 rows in chunks of 10, every fifth a dev row; row 3 is not used."""
    at = np.arange(len(samples))
    wanted = Wanted((at % 2).astype(np.int32), at % 5 == 0)
    wanted.classes[3] = -1
    found = []
    for start in range(0, len(samples), 10):
        chunk = samples[start : start + 10]
        values = dict.fromkeys(BLOCK_SCHEMA.names) | {"shard": "a.tar"}
        values |= _prepare_chunk("a.tar", chunk, wanted, preprocessor)
        found.append(one_row(values, BLOCK_SCHEMA))
    return found


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


class Killed(BaseException):
    """Ends the worker where it stands, as a signal would."""


class Stage:
    """Plays Ray: one worker, checkpoints in a folder, a driver that says stop."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.last = place, place / "last"
        self.lines: list[str] = []
        self.stop_after = self.kill_after = math.inf  # steps; checkpoints
        self._steps = self._reports = 0
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        train = SimpleNamespace(
            get_context=lambda: context,
            get_checkpoint=lambda: self if self.last.exists() else None,
            report=self._report,
            Checkpoint=SimpleNamespace(from_directory=lambda folder: folder),
            torch=SimpleNamespace(get_device=lambda: torch.device("cpu")),
        )
        monkeypatch.setattr(loop, "ray", SimpleNamespace(get=lambda x: x, train=train))
        monkeypatch.setattr(loop, "Voice", lambda *_: self)

    def _report(self, _: dict[str, Any], checkpoint: str) -> None:
        shutil.rmtree(self.last, ignore_errors=True)
        shutil.copytree(checkpoint, self.last)
        self._reports += 1
        if self._reports >= self.kill_after:
            raise Killed

    # a checkpoint
    def as_directory(self) -> Stage:
        return self

    def __enter__(self) -> Path:
        return self.last

    def __exit__(self, *_: object) -> None:
        return None

    # a voice
    due = False

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stopped(self) -> bool:
        self._steps += 1
        return self._steps >= self.stop_after

    def flush(self) -> None:
        return None


def job(cfg: TrainConfig, place: Path, blocks: list[pa.Table], spec: ModelSpec) -> dict[str, Any]:
    torch.manual_seed(cfg.seed)
    made = loop.Job(
        cfg=cfg,
        spec=spec,
        labels=tiny.LABELS,
        blocks=blocks,
        weights=pack_weights(build_model(spec)),
        run=str(place),
        board=None,
        threads=1,
        say_seconds=math.inf,
        save_seconds=math.inf,
    )
    return {"job": made}


def weights(place: Path, done: dict[str, Any]) -> dict[str, torch.Tensor]:
    data = (place / best_name(done["best"]["epoch"])).read_bytes()
    return safetensors.torch.load(data)


def without_times(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in epochs]


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


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_an_epoch_takes_every_row_once_with_any_number_of_workers(world: int) -> None:
    """No tail row is dropped or doubled, and a step has the same rows for 1 worker and for N."""
    order = order_of(4, 43, seed=7)
    assert sorted(order) == list(range(43))
    for step in range(6):
        parts = [share_of(step, order, 8, rank, world) for rank in range(world)]
        whole, total = share_of(step, order, 8, 0, 1)
        assert np.concatenate([own for own, _ in parts]).tolist() == whole.tolist()
        assert {n for _, n in parts} == {total} == {len(whole)}
    assert order_of(5, 43, seed=7).tolist() != order.tolist()
    assert order_of(4, 43, seed=8).tolist() != order.tolist()


def test_uneven_shares_weigh_every_row_the_same(
    blocks: list[pa.Table], preprocessor: Preprocessor, tmp_path: Path
) -> None:
    """The mean of the ranks' gradients, as DDP takes it, is that of the whole step."""
    cfg = config(tmp_path, grad_clip=None)
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


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_goes_on_inside_an_epoch_as_if_nothing_had_happened(
    how: str,
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batch norm, dropout, optimizer and row order go on where they were: the same weights."""
    cfg = config(tmp_path)
    spec = spec_for(cfg, preprocessor)
    Stage(tmp_path / "whole", monkeypatch)
    whole = loop.train_loop(job(cfg, tmp_path / "whole", blocks, spec))
    assert whole["outcome"] == loop.DONE and len(whole["epochs"]) == 3

    place = tmp_path / "parts"
    first = Stage(place, monkeypatch)
    task = job(cfg, place, blocks, spec)
    if how == "stopped":
        first.stop_after = 8  # of 5 steps an epoch: in the second
        assert loop.train_loop(task)["outcome"] == loop.STOPPED
    else:
        first.kill_after = 9
        with pytest.raises(Killed):
            often = {"save_seconds": -1.0, "say_seconds": 0.0}
            loop.train_loop({"job": loop.Job(**{**_fields(task["job"]), **often})})
    second = Stage(place, monkeypatch)
    done = loop.train_loop(task)
    assert any(line.startswith("going on from a checkpoint: epoch 2") for line in second.lines)
    assert done["outcome"] == loop.DONE
    assert without_times(done["epochs"]) == without_times(whole["epochs"])
    assert done["best"] == whole["best"]
    expected, got = weights(tmp_path / "whole", whole), weights(place, done)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    assert len(list(place.glob("best-*"))) == 1  # older ones are gone


def _fields(made: loop.Job) -> dict[str, Any]:
    return {name: getattr(made, name) for name in made.__slots__}


def test_a_loss_that_is_not_finite_ends_the_run(
    blocks: list[pa.Table],
    preprocessor: Preprocessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of training on NaN would end in a bundle that scores nothing."""
    cfg = config(tmp_path, lr=1e30, grad_clip=None, warmup=0.0)
    Stage(tmp_path, monkeypatch)
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
    (made,) = frozen.precompute(
        model, [rows], precision="float32", rank=0, world=1, say=lambda *_: None
    )
    assert isinstance(model.image, frozen.Precomputed)
    batch = made.batch(at)
    assert batch.pixels is not None and batch.pixels.shape == (3, 256)
    with torch.inference_mode():
        got, _ = model.eval()(batch.pixels, batch.tokens, batch.mask)
    torch.testing.assert_close(got, expected)
    assert not any(name.startswith("image.") for name in model.state_dict())


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
    (made,) = frozen.precompute(
        model, [rows], precision="float32", rank=0, world=1, say=lambda *_: None
    )
    assert not isinstance(model.image, frozen.Precomputed)
    batch = made.batch(np.array([1]))
    assert batch.pixels is not None and batch.pixels.dtype == torch.uint8
