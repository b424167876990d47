"""Train a model on an archive's labelled pairs and write its bundle.

plan (no Ray) -> scan every row's label -> split -> tokenizer -> prepare rows -> Ray Train around
``learn`` -> bundle. A run that was stopped, however, goes on from its last checkpoint when the
same command is given again; one that is finished does nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.train

from mmray import splits, storage
from mmray.bundle import Bundle
from mmray.config import TrainConfig
from mmray.engine import cluster, rundir
from mmray.engine.board import Board
from mmray.engine.bundling import save_bundle
from mmray.engine.plan import Plan, absolute, initial_weights, make_plan, spec_of
from mmray.engine.prepared import PreparedSet, Recipe, prepare, wanted_rows
from mmray.engine.scan import LabelledRows, archive_shards, scan
from mmray.engine.workers import Workers, choose_workers
from mmray.errors import ConfigError, MmrayError, RunError
from mmray.preprocess import TextTokenizer, train_tokenizer
from mmray.report.progress import duration

if TYPE_CHECKING:
    from mmray.model import ModelSpec

SAY_SECONDS = 10.0  # between lines of progress
SAVE_SECONDS = 120.0  # between checkpoints inside an epoch
KEEP_CHECKPOINTS = 2
WORKER_FAILURES = 2  # in one sitting; each goes on from the last checkpoint
MEMORY_SHARE = 0.8  # of the object store, for prepared rows

#: Defaults for Ray's own part, which knows them by no other way.
ENVIRONMENT = {
    # Checkpoints go out through Arrow, whose checksums some S3 clones refuse with 411.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    # A report waits until the controller looks: by default for 2 s, longer than a small epoch.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training run came to. ``metrics`` is that of the bundle: ``dev`` (the report over all
    dev rows after the best epoch), ``epoch`` (the best, 1-based) and ``epochs`` (all of them)."""

    bundle: str
    fingerprint: str
    metrics: Mapping[str, Any]
    trained: bool  # False: it was there already
    seconds: float  # of this command

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(cfg: TrainConfig, *, progress: Progress) -> TrainResult:
    """Train what ``cfg`` says; ``progress`` gets a line now and then.

    Raises ConfigError before Ray starts for what can be known by then, RunError when training
    fails, KeyboardInterrupt when it was stopped (the same call then goes on).
    """
    began = time.monotonic()
    cfg = absolute(cfg)
    shards = archive_shards(cfg.data.archive)
    if (manifest := rundir.finished(cfg, shards)) is not None:
        place = rundir.place_of(cfg)
        if rundir.is_open(place):  # killed between the bundle and the tidying up
            rundir.close(place, cfg, shards, manifest.metrics)
        progress(f"nothing to do: {cfg.out} holds the finished bundle of this config")
        seconds = time.monotonic() - began
        return TrainResult(cfg.out, manifest.fingerprint, manifest.metrics, False, seconds)
    plan = make_plan(cfg, shards)
    bundle = _Training(plan, progress).run()
    rundir.close(plan.place, cfg, shards, bundle.metrics)
    seconds = time.monotonic() - began
    progress(f"bundle {bundle.fingerprint[:12]} in {duration(seconds)}: {cfg.out}")
    return TrainResult(cfg.out, bundle.fingerprint, bundle.metrics, True, seconds)


class _Training:
    """One command's work on a run that has a plan."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.cfg, self.say = plan, plan.cfg, progress

    def run(self) -> Bundle:
        plan, cfg = self.plan, self.cfg
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        resources = cluster.connect()
        self.readers = max(1, resources.cpus)
        every: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = [node["Resources"] for node in every if node["Alive"]]
        workers = choose_workers(cfg, resources, [int(node.get("CPU", 0)) for node in nodes])
        with Board(self.say) as board:
            data = self._scan_and_split(board)
            tokenizer = self._tokenizer(data)
            if cfg.model.uses_image:
                self._check_memory(data, [node.get("object_store_memory", 0) for node in nodes])
            ready = self._prepare(data, tokenizer, board)
            spec = spec_of(cfg, len(data.labels), tokenizer)
            start = initial_weights(cfg, spec)
            if not plan.resumed:
                self._begin(tokenizer)
            done = self._fit(spec, data.labels, ready, start, workers, board)
        return save_bundle(plan, spec, data, ready, tokenizer, start, done)

    # --- rows ----------------------------------------------------------------------------------

    def _scan_and_split(self, board: Board) -> LabelledRows:
        plan, cfg = self.plan, self.cfg
        self.say(f"reading {len(plan.shards):,} shards of {plan.archive}")
        found = board.attend(
            lambda: scan(
                plan.archive,
                plan.shards,
                columns=cfg.data.columns,
                label=cfg.data.label,
                split=cfg.data.split,
                captions=cfg.model.uses_text and plan.tokenizer is None,
                readers=self.readers,
            )
        )
        split = splits.assign(found.rows, data=cfg.data, seed=cfg.seed, fields=plan.fields)
        report = split.report
        self.say(f"{report.rows:,} rows; split by {report.rule}")
        for side, counts in (("train", report.train), ("dev", report.dev)):
            each = ", ".join(f"{label} {n:,}" for label, n in counts.items())
            self.say(f"  {side} {sum(counts.values()):,}: {each}")
        if report.unlabelled or report.unused:
            unused = [f"{value} {n:,}" for value, n in report.unused.items()]
            self.say(f"  not used: {', '.join([f'unlabelled {report.unlabelled:,}', *unused])}")
        problems = [f"{shard}: {problem}" for shard, problem in found.problems.items()]
        for line in [*splits.warnings(report), *problems]:
            self.say(f"  note: {line}")
        return LabelledRows(found.rows, split)

    def _tokenizer(self, data: LabelledRows) -> TextTokenizer | None:
        if self.plan.tokenizer is not None or not self.cfg.model.uses_text:
            return self.plan.tokenizer
        captions = data.captions()
        tokenizer = train_tokenizer(captions, self.cfg.preprocess.text)
        self.say(f"tokenizer of {tokenizer.vocab_size:,} tokens from {len(captions):,} captions")
        return tokenizer

    def _begin(self, tokenizer: TextTokenizer | None) -> None:
        place = self.plan.place
        rundir.begin(place, self.cfg, self.plan.shards)
        if tokenizer is not None:
            kept = storage.join(place, rundir.TOKENIZER)
            storage.write_bytes(kept, tokenizer.to_json().encode())

    def _check_memory(self, data: LabelledRows, stores: list[float]) -> None:
        """Raise ConfigError when the prepared rows cannot lie in every node's object store."""
        size, report = self.cfg.preprocess.image.size, data.split.report
        used = sum(report.train.values()) + sum(report.dev.values())
        need, have = used * 3 * size * size, min(stores) * MEMORY_SHARE
        if need > have:
            raise ConfigError(
                f"preprocess.image.size: {used:,} rows of {size} x {size} pixels take "
                f"{need / 1e9:.1f} GB, Ray's object store has {have / 1e9:.1f} GB for them on its "
                "smallest node; choose a smaller size, or start Ray with more "
                "--object-store-memory"
            )

    def _prepare(
        self, data: LabelledRows, tokenizer: TextTokenizer | None, board: Board
    ) -> PreparedSet:
        plan, cfg, total = self.plan, self.cfg, data.rows.num_rows
        kept = tokenizer.to_json() if tokenizer else None
        ready = board.attend(
            lambda: prepare(
                plan.archive,
                plan.shards,
                wanted_rows(data),
                Recipe(cfg.preprocess, kept, cfg.model.modalities),
                columns=cfg.data.columns,
                readers=self.readers,
                board=board.actor,
            ),
            counted=lambda done: f"preparing rows: {done:,} of {total:,}",
        )
        for reason, n in ready.reasons().items():
            self.say(f"  note: set aside, {reason}: {n} rows")
        for side, n in (("train", ready.train), ("dev", ready.dev)):
            if not n:
                first = ready.aside[0] if ready.aside else None
                raise RunError(f"{plan.archive}: no {side} row can be prepared; first: {first}")
        return ready

    # --- training ------------------------------------------------------------------------------

    def _fit(
        self,
        spec: ModelSpec,
        labels: tuple[str, ...],
        ready: PreparedSet,
        start: bytes,
        workers: Workers,
        board: Board,
    ) -> dict[str, Any]:
        """Run the training workers to the end; what ``loop.train_loop`` gives."""
        from ray.train.torch import TorchTrainer

        from mmray.engine import loop

        place = self.plan.place
        rundir.drop_torn_snapshot(place)
        job = loop.Job(
            cfg=self.cfg,
            spec=spec,
            labels=labels,
            blocks=ready.refs,
            weights=ray.put(start),
            run=place,
            board=board.actor,
            threads=workers.cpus,
            say_seconds=SAY_SECONDS,
            save_seconds=SAVE_SECONDS,
        )
        gpu = {"GPU": 1} if workers.gpu else {}
        api: Any = ray.train  # its annotations are those of the API before V2
        trainer: Any = TorchTrainer(
            cast(Any, loop.train_loop),
            train_loop_config={"job": ray.put(job)},
            scaling_config=api.ScalingConfig(
                num_workers=workers.count,
                use_gpu=workers.gpu,
                resources_per_worker={"CPU": workers.cpus, **gpu},
            ),
            run_config=api.RunConfig(
                name=rundir.CHECKPOINTS,
                storage_path=place,
                checkpoint_config=api.CheckpointConfig(num_to_keep=KEEP_CHECKPOINTS),
                failure_config=api.FailureConfig(max_failures=WORKER_FAILURES),
                logging_config=api.LoggingConfig(log_level="ERROR"),
            ),
        )
        on = "GPU" if workers.gpu else f"CPU, {workers.cpus} threads each"
        self.say(f"training with {workers.count} workers on {on}")
        try:
            result = board.attend(
                trainer.fit, on_stop="stopping after this step, with a checkpoint (again: at once)"
            )
        except ray.train.WorkerGroupError as error:
            raise _cause(error) from error
        done: dict[str, Any] = result.return_value
        if done["outcome"] == loop.STOPPED:
            raise KeyboardInterrupt
        if done["outcome"] == loop.FAILED:
            rundir.clear(place)  # going on would only fail again
            raise RunError(
                f"the loss is not finite in epoch {done['epoch'] + 1}, step {done['step'] + 1}; "
                f"a lower train.lr (now {self.cfg.train.lr:g}) or train.grad_clip may help"
            )
        return done


def _cause(error: ray.train.WorkerGroupError) -> Exception:
    """The failure behind a worker group's: ours, a lost worker, or a bug (as it is)."""
    failures = list(error.worker_failures.values())
    for failure in failures:
        if isinstance(failure, MmrayError):
            return failure
    for failure in failures:
        if isinstance(failure, ray.exceptions.RayError):
            what = " ".join(str(failure).split())
            return RunError(
                f"a training worker was lost more than {WORKER_FAILURES} times ({what[:300]}); "
                "the same command goes on from the last checkpoint"
            )
    return error
