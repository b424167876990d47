"""What every training worker runs; ``learn`` is the step, this feeds it, counts and saves.

The order of rows follows from (seed, epoch), a step takes ``batch_size`` rows of it over all
workers, each its share. So the same rows make the same step with any number of workers, and a
checkpoint is an address: (epoch, step).
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmray import learn, storage
from mmray.config import TrainConfig
from mmray.engine import checkpoint
from mmray.engine.board import Voice
from mmray.engine.checkpoint import State
from mmray.engine.frozen import FeatureRows, precompute
from mmray.engine.prepared import Ints, PreparedRows
from mmray.engine.rundir import best_name
from mmray.metrics import Confusion
from mmray.model import FusionModel, ModelSpec, build_model
from mmray.report.progress import duration

EVAL_ROWS = 64  # a forward pass of the evaluation
DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True, slots=True)
class Job:
    """What workers are told; ``blocks`` and ``weights`` are object references."""

    cfg: TrainConfig
    spec: ModelSpec
    labels: tuple[str, ...]
    blocks: list[Any]
    weights: Any  # safetensors bytes: what training starts from
    run: str  # directory or s3:// prefix for what outlives the workers
    board: Any
    threads: int  # of torch, in each worker
    say_seconds: float
    save_seconds: float


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Train from the last checkpoint, or the start, to the end.

    Gives {"outcome": done | stopped | failed, "state": ..., "problem": ...}.
    """
    job: Job = ray.get(config["job"])
    torch.set_num_threads(job.threads)
    return _Worker(job).run()


def order_of(epoch: int, rows: int, seed: int) -> Ints:
    """The order in which an epoch takes its rows."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def share_of(step: int, order: Ints, batch_size: int, rank: int, world: int) -> tuple[Ints, int]:
    """The rows of a rank in a step, perhaps none, and how many the whole step has."""
    at = order[step * batch_size : (step + 1) * batch_size]
    return np.array_split(at, world)[rank], len(at)


class _Worker:
    """One rank."""

    def __init__(self, job: Job) -> None:
        self.job, self.cfg = job, job.cfg
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.voice = Voice(job.board, job.say_seconds)
        blocks = ray.get(job.blocks)
        size = job.spec.image_size
        self.rows = [PreparedRows(blocks, dev=dev, image_size=size) for dev in (False, True)]
        self.plain = self._model()
        self.train_rows, self.dev_rows = self._features()
        self.model: torch.nn.Module = self.plain
        if self.world > 1:
            on_gpu = self.device.type == "cuda"
            self.model = DistributedDataParallel(
                self.plain,
                device_ids=[self.device] if on_gpu else None,
                gradient_as_bucket_view=True,
            )
        self.optimizer = learn.make_optimizer(self.model, self.cfg.train)
        counts = np.bincount(self.train_rows.classes, minlength=len(job.labels)).tolist()
        weights_C = learn.class_weights(counts, self.cfg.train)
        self.weights_C = None if weights_C is None else weights_C.to(self.device)
        self.steps = math.ceil(len(self.train_rows) / self.cfg.train.batch_size)
        self.state = self._resume()
        self.began = self.saved = time.monotonic()
        self.before = self.state.seconds
        self.taken = 0  # rows, in this sitting

    # --- setting up --------------------------------------------------------------------------

    def _model(self) -> FusionModel:
        model = build_model(self.job.spec)
        model.load_state_dict(safetensors.torch.load(ray.get(self.job.weights)))
        return model.to(self.device)

    def _features(self) -> tuple[FeatureRows, FeatureRows]:
        def say(done: int, total: int) -> None:
            if self.rank == 0 and self.voice.due:
                self.voice.say(f"features of frozen encoders: {done / total:.0%}")

        train, dev = precompute(
            self.plain,
            self.rows,
            precision=self.cfg.train.precision,
            rank=self.rank,
            world=self.world,
            say=say,
        )
        return train, dev

    def _resume(self) -> State:
        last = ray.train.get_checkpoint()
        if last is None:
            return State()
        with last.as_directory() as folder:
            state = checkpoint.load(folder, self.plain, self.optimizer, self.device)
        self._tell(
            f"going on from a checkpoint: epoch {state.epoch + 1} of {self.cfg.train.epochs}, "
            f"step {state.step} of {self.steps} done"
        )
        return state

    # --- the run -----------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        outcome = DONE
        while outcome == DONE and self.state.epoch < self.cfg.train.epochs:
            outcome = self._epoch()
        self.voice.flush()
        return {
            "outcome": outcome,
            "epoch": self.state.epoch,
            "step": self.state.step,
            "epochs": self.state.epochs,
            "best": self.state.best,
            "seconds": self.state.seconds,
        }

    def _epoch(self) -> str:
        state, cfg = self.state, self.cfg.train
        order = order_of(state.epoch, len(self.train_rows), self.cfg.seed)
        self.model.train()
        stop = False
        while state.step < self.steps:
            rows, loss, stop, save = self._step(order)
            if not math.isfinite(loss):
                return FAILED
            state.loss_sum += loss * rows
            state.rows += rows
            state.step += 1
            self.taken += rows
            self._say_progress()
            if state.step == self.steps:
                break  # the epoch's own checkpoint comes at once
            if stop or save:
                self._save()
            if stop:
                return STOPPED
        self._end_epoch()
        return STOPPED if stop and state.epoch < cfg.epochs else DONE

    def _step(self, order: Ints) -> tuple[int, float, bool, bool]:
        """One step: its rows and mean loss over all ranks, and what rank 0 wants next."""
        state, cfg = self.state, self.cfg.train
        own, total = share_of(state.step, order, cfg.batch_size, self.rank, self.world)
        number = state.epoch * self.steps + state.step
        # Dropout differs between ranks and steps, and is the same when a step is run again.
        mixed = (self.cfg.seed << 32) + number * self.world + self.rank
        torch.manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)
        # A rank without rows takes part with one that weighs nothing.
        batch = self.train_rows.batch(own if len(own) else order[:1]).to(self.device)
        result = learn.train_step(
            self.model,
            batch,
            self.optimizer,
            learn.lr_at(number, cfg.epochs * self.steps, cfg),
            cfg,
            weights_C=self.weights_C,
            rows=total / self.world if len(own) else math.inf,
        )
        wants = [0.0, 0.0]
        if self.rank == 0:
            late = time.monotonic() - self.saved >= self.job.save_seconds
            wants = [float(self.voice.stopped()), float(late)]
        seen = torch.tensor([0.0, *wants], dtype=torch.float64, device=self.device)
        seen[0] = result.loss.double() / self.world
        loss, stop, save = self._sum(seen).tolist()
        return total, loss, stop > 0, save > 0

    def _end_epoch(self) -> None:
        state = self.state
        report = self._evaluate()
        state.seconds = self._seconds()
        seen = {
            "epoch": state.epoch + 1,
            "loss": state.loss_sum / state.rows,
            "dev_loss": report["loss"],
            "dev_accuracy": report["accuracy"],
            "dev_macro_f1": report["macro_f1"],
            "seconds": round(state.seconds, 1),
        }
        state.epochs.append(seen)
        before = state.best
        better = before is None or _quality(report) > _quality(before["dev"])
        if better:
            state.best = {"epoch": state.epoch + 1, "dev": report}
            if self.rank == 0:
                name = best_name(state.epoch + 1)
                storage.write_bytes(
                    storage.join(self.job.run, name), checkpoint.pack_weights(self.plain)
                )
        self._tell(
            f"epoch {seen['epoch']}/{self.cfg.train.epochs}  loss {seen['loss']:.4f}  "
            f"dev loss {seen['dev_loss']:.4f}  dev accuracy {seen['dev_accuracy']:.4f}  "
            f"dev macro-F1 {seen['dev_macro_f1']:.4f}{'  best so far' if better else ''}"
        )
        state.epoch, state.step, state.loss_sum, state.rows = state.epoch + 1, 0, 0.0, 0
        self._save()
        if better and before is not None and self.rank == 0:
            storage.delete(storage.join(self.job.run, best_name(before["epoch"])))

    def _evaluate(self) -> dict[str, Any]:
        """The report over all dev rows, each counted once, the same on every rank."""
        if self.world > 1:
            for buffer in self.plain.buffers():  # batch-norm statistics drift apart between ranks
                dist.broadcast(buffer, 0)
        own = np.array_split(np.arange(len(self.dev_rows)), self.world)[self.rank]
        parts = (own[i : i + EVAL_ROWS] for i in range(0, len(own), EVAL_ROWS))
        found = learn.evaluate_batches(
            self.plain,
            (self.dev_rows.batch(part) for part in parts),
            self.job.labels,
            precision=self.cfg.train.precision,
            device=self.device,
        )
        counts = torch.from_numpy(found.confusion.matrix).to(self.device)
        loss = torch.tensor([found.loss_sum], dtype=torch.float64, device=self.device)
        whole = Confusion(self.job.labels, self._sum(counts).cpu().numpy())
        return {**whole.report(), "loss": float(self._sum(loss)) / max(1, whole.rows)}

    def _sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    # --- saving and telling ------------------------------------------------------------------

    def _save(self) -> None:
        """A checkpoint; every rank must come here."""
        self.state.seconds = self._seconds()
        where = {"epoch": self.state.epoch, "step": self.state.step}
        if self.rank:
            ray.train.report(where)
        else:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.save(folder, self.state, self.plain, self.optimizer)
                made = ray.train.Checkpoint.from_directory(folder)
                ray.train.report(where, checkpoint=made)
        self.saved = time.monotonic()

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def _say_progress(self) -> None:
        if self.rank or not self.voice.due:
            return
        state, seconds = self.state, time.monotonic() - self.began
        rate = self.taken / seconds
        left = (self.cfg.train.epochs - state.epoch) * len(self.train_rows) - state.rows
        self._tell(
            f"epoch {state.epoch + 1}/{self.cfg.train.epochs}  step {state.step}/{self.steps}  "
            f"loss {state.loss_sum / state.rows:.4f}  {rate:,.0f} rows/s  "
            f"ETA {duration(left / rate)}"
        )

    def _tell(self, line: str) -> None:
        if self.rank == 0:
            self.voice.say(line)


def _quality(report: dict[str, Any]) -> tuple[float, float]:
    """By what the best epoch is chosen: macro-F1, and of equals the lower loss."""
    return report["macro_f1"], -report["loss"]
