"""What every training worker runs; ``learn`` is the step, this feeds it, counts and saves.

The order of rows follows from (seed, epoch), a step takes ``batch_size`` rows of it over all
workers, each its share. So the same rows make the same step with any number of workers, and a
checkpoint is an address: (epoch, step).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmray import augment, learn, storage
from mmray.averaging import Ema, greedy_soup
from mmray.config import TrainConfig
from mmray.counts import quality
from mmray.engine import checkpoint
from mmray.engine.board import Voice
from mmray.engine.checkpoint import State
from mmray.engine.dev import Dev, summed
from mmray.engine.draws import Draws
from mmray.engine.feed import Feed
from mmray.engine.frozen import FeatureRows, precompute
from mmray.engine.negatives import Negatives
from mmray.engine.prepared import PreparedRows
from mmray.engine.rundir import LAST, LOGS, SOUP, best_name, epoch_name
from mmray.engine.telling import Teller
from mmray.engine.windows import Ints
from mmray.learn import Batch
from mmray.memory import keep_freed_memory
from mmray.model import FusionModel, ModelSpec, build_model
from mmray.model.speed import for_training
from mmray.objective import make_objective
from mmray.report.journal import Journal

LOOK_SECONDS = 2.0  # between looks for a notice that a machine will be taken away
NOTICED_SAVE_SECONDS = 10.0  # between checkpoints after it
# A report returns before its checkpoint is on record, and what is on record names its best: the
# weights that were the best before stay until a few more checkpoints were handed over.
KEEP_BESTS = 4
DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True, slots=True)
class Job:
    """What workers are told; ``blocks`` and ``weights`` are object references."""

    cfg: TrainConfig
    spec: ModelSpec
    labels: tuple[str, ...]
    sets: npt.NDArray[np.bool_] | None  # multilabel: bool [sets, C]
    negatives: Negatives | None  # match
    blocks: list[Any]
    feeder: Any  # of pixels that are not among the blocks; None where all are
    window: int | None  # rows that are decoded at a time, None: all
    weights: Any  # safetensors bytes: what training starts from
    run: str  # directory or s3:// prefix for what outlives the workers
    board: Any
    threads: int  # of torch, in each worker
    say_seconds: float
    save_seconds: float
    tracked: tuple[str, str] | None = None  # of ``Journal``


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Train from the last checkpoint, or the start, to the end.

    Gives {"outcome": done | stopped | failed, "state": ..., "problem": ...}.
    """
    job: Job = ray.get(config["job"])
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    return _Worker(job).run()


class _Worker:
    """One rank."""

    def __init__(self, job: Job) -> None:
        self.job, self.cfg = job, job.cfg
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.draws = Draws(self.cfg.seed, self.rank, self.world)
        self.voice = Voice(job.board, job.say_seconds)
        blocks, size = ray.get(job.blocks), job.spec.image_size
        self.rows = [
            PreparedRows(blocks, dev=dev, image_size=size, streamed=job.feeder is not None)
            for dev in (False, True)
        ]
        self.feed = Feed(
            self.rows,
            seed=self.cfg.seed,
            rank=self.rank,
            world=self.world,
            feeder=job.feeder,
            window=job.window,
        )
        self.plain = self._model()
        self.train_rows, dev_rows = self._features()
        self.model: torch.nn.Module = self.plain
        if self.world > 1:
            on_gpu = self.device.type == "cuda"
            self.model = DistributedDataParallel(
                self.plain,
                device_ids=[self.device] if on_gpu else None,
                gradient_as_bucket_view=True,
            )
        self.optimizer = learn.make_optimizer(self.model, self.cfg.train)
        averages = self.cfg.train.average == "ema"
        self.ema = Ema(self.plain, self.cfg.train.ema_decay) if averages else None
        self.scored = self.plain if self.ema is None else self.ema.model  # what is evaluated, kept
        classes = len(job.labels if job.sets is None else job.sets)
        counts = np.bincount(self.train_rows.classes, minlength=classes).tolist()
        made = make_objective(self.cfg.train, self.cfg.task, counts, job.sets)
        self.objective = made.to(self.device)
        others = None if job.negatives is None else job.negatives.dev
        self.dev = Dev(dev_rows, self.feed, self.cfg, job.labels, self.objective, others)
        self.steps = math.ceil(len(self.train_rows) / self.cfg.train.batch_size)
        self.state = self._resume()
        self.saved = self.looked = time.monotonic()
        self.before = self.state.seconds
        self.save_seconds = job.save_seconds
        self.teller = self._teller()

    # --- setting up --------------------------------------------------------------------------

    def _model(self) -> FusionModel:
        model = build_model(self.job.spec)
        model.load_state_dict(safetensors.torch.load(ray.get(self.job.weights)))
        return for_training(model.to(self.device))

    def _features(self) -> tuple[FeatureRows, FeatureRows]:
        def say(done: int, total: int) -> None:
            if self.rank == 0 and self.voice.due:
                self.voice.say(f"features of frozen encoders: {done / total:.0%}")

        train, dev = precompute(
            self.plain,
            self.rows,
            self.feed,
            precision=self.cfg.train.precision,
            say=say,
        )
        return train, dev

    def _resume(self) -> State:
        last = ray.train.get_checkpoint()
        if last is None:
            return State()
        average = None if self.ema is None else self.ema.model
        with last.as_directory() as folder:
            state = checkpoint.load(folder, self.plain, self.optimizer, self.device, average)
        return state

    def _teller(self) -> Teller:
        state, cfg, journal = self.state, self.cfg.train, None
        if self.rank == 0:
            folder = storage.join(self.job.run, LOGS) if cfg.tensorboard else None
            journal = Journal(
                folder, self.job.tracked, first_step=self._number(), say=self.voice.say
            )
        rows = len(self.train_rows)
        teller = Teller(self.voice, journal, self.cfg, steps=self.steps, rows=rows)
        if state != State():
            teller.line(
                f"going on from a checkpoint: epoch {state.epoch + 1} of {cfg.epochs}, "
                f"step {state.step} of {self.steps} done"
            )
        return teller

    # --- the run -----------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        outcome = DONE
        while outcome == DONE and not self._ended():
            outcome = self._epoch()
        if outcome == DONE:
            self._keep(LAST, self.scored)
            if self.cfg.train.average == "soup":
                self._soup()
        self.teller.close()
        return {
            "outcome": outcome,
            "epoch": self.state.epoch,
            "step": self.state.step,
            "epochs": self.state.epochs,
            "best": self.state.best,
            "seconds": self.state.seconds,
        }

    def _ended(self) -> bool:
        """Whether all epochs are done, or ``patience`` of them since the best."""
        cfg, state = self.cfg.train, self.state
        since = 0 if state.best is None else state.epoch - state.best["epoch"]
        return state.epoch >= cfg.epochs or (cfg.patience is not None and since >= cfg.patience)

    def _number(self) -> int:
        """Of the next step, over all epochs."""
        return self.state.epoch * self.steps + self.state.step

    def _epoch(self) -> str:
        state, cfg = self.state, self.cfg.train
        self.model.train()
        stop = False
        began, waited, before = time.monotonic(), self.feed.waited, state.rows
        batches = self.feed.batches(
            self.train_rows,
            state.epoch,
            state.step,
            cfg.batch_size,
            self.device,
            captions=self._captions(),
        )
        for batch, own, rows in batches:
            loss, stop, save = self._step(batch, own, rows)
            if not math.isfinite(loss):
                return FAILED
            state.loss_sum += loss * rows
            state.rows += rows
            state.step += 1
            self.teller.taken += rows
            self.teller.progress(state)
            if state.step == self.steps:
                break  # the epoch's own checkpoint comes at once
            if stop or save:
                self._save()
            if stop:
                return STOPPED
        batches.close()
        seconds = time.monotonic() - began
        self._end_epoch(
            rows_per_s=round((state.rows - before) / seconds, 1),
            data_wait=round((self.feed.waited - waited) / seconds, 4),
        )
        return STOPPED if stop and not self._ended() else DONE

    def _captions(self) -> Ints | None:
        """``match``: the row whose caption each row is shown with in this epoch, int64 [N]."""
        if self.job.negatives is None:
            return None
        order = self.feed.order(self.state.epoch, len(self.train_rows))
        return self.job.negatives.shown(order, self.cfg, self.state.epoch)

    def _step(self, batch: Batch, own: int, total: int) -> tuple[float, bool, bool]:
        """One step of ``total`` rows, of which ``own`` are this rank's: the mean loss over all of
        them, and whether to stop, and to save."""
        cfg, number = self.cfg.train, self._number()
        batch = self._augmented(batch, own, total)
        self.draws.begin(number)
        lr = learn.lr_at(number, cfg.epochs * self.steps, cfg)
        result = learn.train_step(
            self.model,
            batch,
            self.optimizer,
            lr,
            cfg,
            objective=self.objective,
            rows=total / self.world if own else math.inf,  # one that stands in weighs nothing
            drops=self.draws.drops(number, own, total),
        )
        if self.ema is not None:
            self.ema.update(self.plain, number)
        seen = torch.tensor([0.0, *self._wants()], dtype=torch.float64, device=self.device)
        seen[0] = result.loss.double() / self.world
        loss, stop, save, look = summed(seen).tolist()
        noticed = look > 0 and self._noticed()
        self.teller.waited = self.feed.waited
        self.teller.step(number, loss, lr, result.grad_norm)
        return loss, stop > 0, save > 0 or noticed

    def _augmented(self, batch: Batch, own: int, total: int) -> Batch:
        """The batch, changed as the config says."""
        changes = self.cfg.train.augment
        if not changes.changes or batch.pixels is None:
            return batch
        draws = self.draws.changes(self._number(), own, total)
        return replace(batch, pixels=augment.augment(batch.pixels, draws, changes))

    def _wants(self) -> list[float]:
        """What rank 0 wants of all: to stop, to save, to look for a notice."""
        if self.rank:
            return [0.0, 0.0, 0.0]
        now = time.monotonic()
        late, look = now - self.saved >= self.save_seconds, now - self.looked >= LOOK_SECONDS
        self.looked = now if look else self.looked
        return [float(self.voice.stopped()), float(late), float(look)]

    def _noticed(self) -> bool:
        """Whether a machine is about to be taken away, said for the first time."""
        if ray.train.get_preemption_info() is None or self.save_seconds <= NOTICED_SAVE_SECONDS:
            return False
        self.teller.line("a machine is about to be taken away: checkpoint")
        self.save_seconds = NOTICED_SAVE_SECONDS
        return True

    def _end_epoch(self, *, rows_per_s: float, data_wait: float) -> None:
        """Evaluate, and write down what the epoch came to; ``data_wait`` is the share of its time
        for which this rank waited for rows."""
        state = self.state
        report = self._evaluate()
        state.seconds = self._seconds()
        seen = {
            "epoch": state.epoch + 1,
            "loss": state.loss_sum / state.rows,
            "dev_loss": report["loss"],
            "dev_accuracy": report["accuracy"],
            "dev_macro_f1": report["macro_f1"],
            "dev_auroc": report["auroc"],
            "seconds": round(state.seconds, 1),
            "rows_per_s": rows_per_s,
            "data_wait": data_wait,
        }
        state.epochs.append(seen)
        state.qualities.append(list(_quality(report)))
        bests = state.bests()
        better = bests[-1] == state.epoch + 1
        if better:
            state.best = {"epoch": state.epoch + 1, "dev": report}
            self._keep(best_name(state.epoch + 1), self.scored)
        if self.cfg.train.average == "soup":
            self._keep(epoch_name(state.epoch + 1), self.scored)
        self.teller.epoch(self._number() - 1, seen, better=better)
        state.epoch, state.step, state.loss_sum, state.rows = state.epoch + 1, 0, 0.0, 0
        self._save()
        if better and len(bests) > KEEP_BESTS and self.rank == 0:
            storage.delete(storage.join(self.job.run, best_name(bests[-1 - KEEP_BESTS])))
        if self._ended() and state.epoch < self.cfg.train.epochs:
            self.teller.line(f"no better epoch in {self.cfg.train.patience}: that was the last")

    def _soup(self) -> None:
        """Make the mean of the epochs that go well together the best."""
        state = self.state
        assert state.best is not None

        def load(epoch: int) -> dict[str, Tensor]:
            kept = storage.read_bytes(storage.join(self.job.run, epoch_name(epoch)))
            return safetensors.torch.load(kept)

        def report(weights: Mapping[str, Tensor]) -> dict[str, Any]:
            self.plain.load_state_dict(weights)
            return self._evaluate()

        ranked = sorted(range(1, state.epoch + 1), key=lambda e: state.qualities[e - 1])[::-1]
        kept, weights = greedy_soup(
            ranked, load, lambda w: _quality(report(w)), tuple(state.qualities[ranked[0] - 1])
        )
        dev = report(weights)
        state.best = {"epoch": kept[0], "soup": sorted(kept), "dev": dev}
        self._keep(SOUP, self.plain)
        self.teller.line(
            f"soup of epochs {', '.join(map(str, sorted(kept)))}  dev loss {dev['loss']:.4f}  "
            f"dev accuracy {dev['accuracy']:.4f}  dev macro-F1 {dev['macro_f1']:.4f}"
        )

    def _evaluate(self) -> dict[str, Any]:
        return self.dev.report(self.scored, self.state.epoch, self.device)

    # --- saving and telling ------------------------------------------------------------------

    def _save(self) -> None:
        """A checkpoint; every rank must come here."""
        self.state.seconds = self._seconds()
        where = {"epoch": self.state.epoch, "step": self.state.step}
        if self.rank:
            ray.train.report(where)
        else:
            average = None if self.ema is None else self.ema.model
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.save(folder, self.state, self.plain, self.optimizer, average)
                made = ray.train.Checkpoint.from_directory(folder)
                ray.train.report(where, checkpoint=made)
        self.saved = time.monotonic()

    def _keep(self, name: str, model: torch.nn.Module) -> None:
        if self.rank == 0:
            storage.write_bytes(storage.join(self.job.run, name), checkpoint.pack_weights(model))

    def _seconds(self) -> float:
        return self.before + self.teller.seconds


def _quality(report: dict[str, Any]) -> tuple[float, ...]:
    """By what the best epoch is chosen: the figure of its task, and of equals the lower loss."""
    return quality(report), -report["loss"]
