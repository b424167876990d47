"""Ray's part of training, played without Ray: ranks that are processes or this one, checkpoints in
a folder, a driver that says stop; and a record of the rows that were learned from."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mmray import learn
from mmray.engine import loop
from mmray.engine.checkpoint import pack_weights
from mmray.model import build_model

RECORD = "learned.jsonl"


class Killed(BaseException):
    """Ends the worker where it stands, as a signal would."""


class Stage:
    """Stands for Ray in ``loop``, for one rank of ``world``. ``put`` sets an attribute for a time,
    as ``monkeypatch.setattr`` does."""

    due = False  # of a voice

    def __init__(
        self,
        place: Path,
        put: Callable[[Any, str, Any], None],
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.place, self.last = place, place / "last"
        self.rank, self.world = rank, world
        self.lines: list[str] = []
        self.stop_after = self.kill_after = math.inf  # steps; checkpoints
        self.notice_after = math.inf  # looks
        self.behind = 0  # checkpoints that are reported and not on record yet
        self._reported: list[Path] = []
        self._steps = self._looks = self.reports = 0
        context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world)
        train = SimpleNamespace(
            get_context=lambda: context,
            get_checkpoint=lambda: self if self.last.exists() else None,
            get_preemption_info=self._notice,
            report=self._report,
            Checkpoint=SimpleNamespace(from_directory=lambda folder: folder),
            torch=SimpleNamespace(get_device=lambda: torch.device("cpu")),
        )
        put(loop, "ray", SimpleNamespace(get=lambda x: x, train=train))
        put(loop, "Voice", lambda *_: self)

    def _report(self, _: dict[str, Any], checkpoint: str | None = None) -> None:
        if checkpoint is not None:
            self._reported.append(self.place / f"reported-{self.reports}")
            shutil.copytree(checkpoint, self._reported[-1], dirs_exist_ok=True)
            if len(self._reported) > self.behind:
                shutil.rmtree(self.last, ignore_errors=True)
                self._reported.pop(0).rename(self.last)
        if self.world > 1:
            dist.barrier()
        self.reports += 1
        if self.reports >= self.kill_after:
            raise Killed

    def _notice(self) -> object | None:
        self._looks += 1
        return object() if self._looks > self.notice_after else None

    # a checkpoint
    def as_directory(self) -> Stage:
        return self

    def __enter__(self) -> Path:
        return self.last

    def __exit__(self, *_: object) -> None:
        return None

    # a voice
    def say(self, line: str) -> None:
        self.lines.append(line)

    def stopped(self) -> bool:
        self._steps += 1
        return self._steps >= self.stop_after

    def flush(self) -> None:
        return None


@contextmanager
def recorded(
    folder: Path, sitting: str | None = None, kill_at: tuple[int, int, int] | None = None
) -> Iterator[None]:
    """Every step of this process leaves a line in ``folder``: sitting, epoch, step, and its rows by
    their captions. ``kill_at`` (epoch, step, rank): this process dies there."""
    step, train_step = loop._Worker._step, learn.train_step
    seen: dict[str, Any] = {}

    def watched_step(worker: Any, *arguments: Any) -> Any:
        seen.setdefault(
            "sitting", sitting or f"from {worker._number():04d}, {worker.world} workers"
        )
        seen.update(epoch=worker.state.epoch, step=worker.state.step)
        if (worker.state.epoch, worker.state.step, worker.rank) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(worker, *arguments)

    def watched_train_step(model: Any, batch: learn.Batch, *args: Any, **keys: Any) -> Any:
        assert batch.tokens is not None and batch.mask is not None
        real = [t[m].numpy() for t, m in zip(batch.tokens, batch.mask, strict=True)]
        rows = [] if keys["rows"] == math.inf else [zlib.crc32(t.tobytes()) for t in real]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{os.getpid()}.{RECORD}").open("a") as file:
            file.write(json.dumps({**seen, "rows": rows}) + "\n")
        return train_step(model, batch, *args, **keys)

    loop._Worker._step = watched_step  # type: ignore[method-assign]
    learn.train_step = watched_train_step
    try:
        yield
    finally:
        loop._Worker._step = step  # type: ignore[method-assign]
        learn.train_step = train_step


def learned(folder: Path) -> dict[str, dict[tuple[int, int], list[int]]]:
    """Sitting -> (epoch, step) -> the rows of all its ranks, sorted."""
    found: dict[str, dict[tuple[int, int], list[int]]] = {}
    for path in sorted(folder.glob(f"*{RECORD}")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps = found.setdefault(record["sitting"], {})
            rows = steps.setdefault((record["epoch"], record["step"]), [])
            rows[:] = sorted(rows + record["rows"])
    return found


def rank_of(
    world: int, rank: int, job: loop.Job, kill_at: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """One rank of a training run in this process; what ``loop.train_loop`` gives."""
    place = Path(job.run)
    store = f"file://{place}.{world}.store"
    if world > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    before = loop.ray, loop.Voice  # type: ignore[attr-defined]
    try:
        Stage(place, setattr, rank=rank, world=world)
        with recorded(place / "record", f"{world} workers", kill_at):
            return loop.train_loop({"job": job})
    finally:
        loop.ray, loop.Voice = before  # type: ignore[attr-defined,misc]
        if world > 1:
            dist.destroy_process_group()


def new_job(
    cfg: Any, place: Path, blocks: list[Any], spec: Any, labels: tuple[str, ...]
) -> loop.Job:
    torch.manual_seed(cfg.seed)
    return loop.Job(
        cfg=cfg,
        spec=spec,
        labels=labels,
        sets=None,
        negatives=None,
        blocks=blocks,
        feeder=None,
        window=None,
        weights=pack_weights(build_model(spec)),
        run=str(place),
        board=None,
        threads=1,
        say_seconds=math.inf,
        save_seconds=math.inf,
    )


def often(job: loop.Job) -> loop.Job:
    """The same, with a checkpoint after every step."""
    return replace(job, save_seconds=-1.0, say_seconds=0.0)
