"""Train a model on an archive's labelled pairs and write its bundle.

plan (no Ray) -> scan every row's label -> split -> tokenizer -> prepare rows -> Ray Train around
``learn`` -> bundle. A run that was stopped, however, goes on from its last checkpoint when the
same command is given again; one that is finished does nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray

from mmray import splits, storage
from mmray.bundle import Bundle
from mmray.config import TrainConfig
from mmray.engine import cluster, rundir
from mmray.engine.board import Board
from mmray.engine.bundling import save_bundle
from mmray.engine.feeder import WINDOWS, Stream, feeding
from mmray.engine.fit import fit
from mmray.engine.negatives import Negatives, find_negatives
from mmray.engine.plan import Plan, absolute, initial_weights, make_plan, spec_of
from mmray.engine.prepared import PreparedSet, Recipe, Wanted, prepare, wanted_rows
from mmray.engine.scan import LabelledRows, archive_shards, scan
from mmray.engine.units import units_of
from mmray.engine.workers import Workers, choose_workers, decoders_beside
from mmray.errors import ConfigError, RunError
from mmray.labels import LabelIndex
from mmray.lease import Lease
from mmray.preprocess import TextTokenizer, train_tokenizer
from mmray.report import journal
from mmray.report.progress import duration
from mmray.report.split import notes

if TYPE_CHECKING:
    from mmray.model import ModelSpec

SAY_SECONDS = 10.0  # between lines of progress
SAVE_SECONDS = 120.0  # between checkpoints inside an epoch
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

    Raises ConfigError before Ray starts for what can be known by then, also that another command
    trains this; RunError when training fails; KeyboardInterrupt when it was stopped (the same call
    then goes on).
    """
    began = time.monotonic()
    cfg = absolute(cfg)
    shards = archive_shards(cfg.data.archive)
    place, manifest = rundir.place_of(cfg), rundir.finished(cfg, shards)
    # What is wrong with a config is said before anything is written, a lease too.
    plan = make_plan(cfg, shards) if manifest is None else None
    if manifest is None or rundir.is_open(place):
        with Lease(place, progress) as lease:
            manifest = rundir.finished(cfg, shards)  # perhaps by another command, meanwhile
            if manifest is None:
                if plan is None or plan.resumed != rundir.open_run(place, cfg, shards):
                    plan = make_plan(cfg, shards)
                bundle = _Training(plan, progress, lease).run()
                rundir.close(place, cfg, shards, bundle.metrics)
                seconds = time.monotonic() - began
                progress(f"bundle {bundle.fingerprint[:12]} in {duration(seconds)}: {cfg.out}")
                return TrainResult(cfg.out, bundle.fingerprint, bundle.metrics, True, seconds)
            if rundir.is_open(place):  # killed between the bundle and the tidying up
                rundir.close(place, cfg, shards, manifest.metrics)
    progress(f"nothing to do: {cfg.out} holds the finished bundle of this config")
    seconds = time.monotonic() - began
    return TrainResult(cfg.out, manifest.fingerprint, manifest.metrics, False, seconds)


class _Training:
    """One command's work on a run that has a plan."""

    def __init__(self, plan: Plan, progress: Progress, lease: Lease) -> None:
        self.plan, self.cfg, self.say, self.lease = plan, plan.cfg, progress, lease

    def run(self) -> Bundle:
        plan, cfg = self.plan, self.cfg
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with journal.tracking(cfg, plan.place, resumed=plan.resumed, say=self.say) as tracked:
            self.tracked = tracked
            return self._to_bundle()

    def _to_bundle(self) -> Bundle:
        plan, cfg = self.plan, self.cfg
        resources = cluster.connect()
        self.readers = max(1, resources.cpus)
        every: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = [node["Resources"] for node in every if node["Alive"]]
        workers = choose_workers(cfg, resources, [int(node.get("CPU", 0)) for node in nodes])
        with Board(self.say, self.lease.check_taken) as board:
            data = self._scan_and_split(board)
            tokenizer = self._tokenizer(data)
            window = self._window(data, [node.get("object_store_memory", 0) for node in nodes])
            recipe = Recipe(
                cfg.preprocess,
                tokenizer.to_json() if tokenizer else None,
                cfg.model.modalities,
                cfg.model.missing,
            )
            wanted = wanted_rows(data)
            ready = self._prepare(data, wanted, recipe, window, board)
            spec = spec_of(cfg, len(data.labels), tokenizer)
            start = initial_weights(cfg, spec)
            if not plan.resumed:
                self._begin(tokenizer, window)
            negatives = self._negatives(data, ready) if cfg.task == "match" else None
            with contextlib.ExitStack() as stack:
                feeder = None
                if window is not None:
                    stream = self._stream(wanted, ready, recipe, window)
                    count = decoders_beside(workers, resources)
                    feeder = stack.enter_context(feeding(stream, count))
                done = self._fit(
                    spec, data.split.labels, ready, negatives, start, workers, board, feeder, window
                )
        self.lease.check_taken()
        alone = None if negatives is None else negatives.alone()
        return save_bundle(plan, spec, data, ready, tokenizer, start, done, without_negative=alone)

    # --- rows ----------------------------------------------------------------------------------

    def _scan_and_split(self, board: Board) -> LabelledRows:
        plan, cfg = self.plan, self.cfg
        self.say(f"reading {len(plan.shards):,} shards of {plan.archive}")
        found = board.attend(
            lambda: scan(
                plan.archive,
                plan.shards,
                data=cfg.data,
                task=cfg.task,
                captions=cfg.model.uses_text and plan.tokenizer is None,
                readers=self.readers,
            )
        )
        split = splits.assign(
            found.rows, data=cfg.data, seed=cfg.seed, fields=plan.fields, task=cfg.task
        )
        report = split.report
        self.say(f"{report.rows:,} rows; split by {report.rule}")
        sides = (("train", report.train_rows, report.train), ("dev", report.dev_rows, report.dev))
        for side, n, counts in sides:
            each = ", ".join(f"{label} {count:,}" for label, count in counts.items())
            self.say(f"  {side} {n:,}" + (f": {each}" if cfg.task != "match" else " pairs"))
        if report.unlabelled or report.unused:
            unused = [f"{value} {n:,}" for value, n in report.unused.items()]
            self.say(f"  not used: {', '.join([f'unlabelled {report.unlabelled:,}', *unused])}")
        problems = [f"{shard}: {problem}" for shard, problem in found.problems.items()]
        for line in [*notes(report), *problems]:
            self.say(f"  note: {line}")
        return LabelledRows(found.rows, split)

    def _tokenizer(self, data: LabelledRows) -> TextTokenizer | None:
        if self.plan.tokenizer is not None or not self.cfg.model.uses_text:
            return self.plan.tokenizer
        captions = data.captions()
        tokenizer = train_tokenizer(captions, self.cfg.preprocess.text)
        self.say(f"tokenizer of {tokenizer.vocab_size:,} tokens from {len(captions):,} captions")
        return tokenizer

    def _begin(self, tokenizer: TextTokenizer | None, window: int | None) -> None:
        place = self.plan.place
        rundir.begin(place, self.cfg, self.plan.shards, window)
        if tokenizer is not None:
            kept = storage.join(place, rundir.TOKENIZER)
            storage.write_bytes(kept, tokenizer.to_json().encode())

    def _window(self, data: LabelledRows, stores: list[float]) -> int | None:
        """How many rows are decoded at a time, None: all, as they fit into every node's object
        store. A run that goes on keeps to what it began with: the order of its rows follows."""
        cfg, report = self.cfg, data.split.report
        if not cfg.model.uses_image:
            return None
        used = report.train_rows + report.dev_rows
        each, have = 3 * cfg.preprocess.image.size**2, min(stores) * MEMORY_SHARE
        fits = used * each <= have
        fitting = None if fits else max(1, int(have / each / WINDOWS))
        window = cfg.train.window_rows or fitting
        if self.plan.resumed:
            window = rundir.window_of(self.plan.place)
        need = f"{used:,} rows take {used * each / 1e9:.2f} GB"
        room = f"the object store has {have / 1e9:.2f} GB for them"
        if window is not None and window < used:
            self.say(f"rows are decoded in every epoch, {window:,} at a time: {need}, {room}")
            return window
        if not fits:
            self.say(f"  note: all rows are kept, in part on disk: {need}, {room}")
        return None

    def _stream(
        self, wanted: Mapping[str, Wanted], ready: PreparedSet, recipe: Recipe, window: int
    ) -> Stream:
        plan, cfg = self.plan, self.cfg
        return Stream(
            root=plan.archive,
            shards={shard.path: shard for shard in plan.shards},
            columns=cfg.data.columns,
            wanted=ray.put(dict(wanted)),
            recipe=recipe,
            sides=(
                units_of(ready.chunks, wanted, dev=False),
                units_of(ready.chunks, wanted, dev=True),
            ),
            window=window,
            epochs=cfg.train.epochs,
            seed=cfg.seed,
        )

    def _prepare(
        self,
        data: LabelledRows,
        wanted: Mapping[str, Wanted],
        recipe: Recipe,
        window: int | None,
        board: Board,
    ) -> PreparedSet:
        plan, cfg, total = self.plan, self.cfg, data.rows.num_rows
        ready = board.attend(
            lambda: prepare(
                plan.archive,
                plan.shards,
                wanted,
                recipe,
                columns=cfg.data.columns,
                readers=self.readers,
                keep_pixels=window is None,
                board=board.actor,
            ),
            counted=lambda done: f"preparing rows: {done:,} of {total:,}",
        )
        for reason, n in ready.reasons().items():
            self.say(f"  note: set aside, {reason}: {n} rows")
        for line in never_missing(cfg, ready.chunks):
            self.say(f"  note: {line}")
        for side, n in (("train", ready.train), ("dev", ready.dev)):
            if not n:
                first = ready.aside[0] if ready.aside else None
                raise RunError(f"{plan.archive}: no {side} row can be prepared; first: {first}")
        return ready

    def _negatives(self, data: LabelledRows, ready: PreparedSet) -> Negatives:
        aside = {(shard, row) for shard, row, *_ in ready.aside}
        found = find_negatives(data, aside, self.cfg)
        for side, n in found.alone().items():
            if n:
                self.say(f"  note: {n:,} {side} rows have no negative: always shown as they are")
        if found.alone()[splits.DEV] == ready.dev or found.alone()[splits.TRAIN] == ready.train:
            within = self.cfg.data.negatives_within
            raise ConfigError(
                f"data.negatives_within: got {within!r}; no row of a side has another one with the "
                "same value and another picture and caption; name another column, or null"
            )
        return found

    # --- training ------------------------------------------------------------------------------

    def _fit(
        self,
        spec: ModelSpec,
        labels: LabelIndex,
        ready: PreparedSet,
        negatives: Negatives | None,
        start: bytes,
        workers: Workers,
        board: Board,
        feeder: Any,
        window: int | None,
    ) -> dict[str, Any]:
        """Run the training workers to the end; what ``loop.train_loop`` gives."""
        from mmray.engine import loop

        job = loop.Job(
            cfg=self.cfg,
            spec=spec,
            labels=labels.names,
            sets=labels.members(),
            negatives=negatives,
            blocks=ready.refs,
            feeder=feeder,
            window=window,
            weights=ray.put(start),
            run=self.plan.place,
            board=board.actor,
            threads=workers.cpus,
            say_seconds=SAY_SECONDS,
            save_seconds=SAVE_SECONDS,
            tracked=self.tracked,
        )
        self.say(f"training with {workers}")
        return fit(job, workers, board)


def never_missing(cfg: TrainConfig, chunks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the model is to do without and cannot learn to, a line each."""
    if not cfg.model.missing or cfg.train.modality_dropout:
        return []
    return [
        f"model.missing: no training row lacks its {what}, so that scores without one mean "
        "nothing; train.modality_dropout teaches the model to do without"
        for what, name in (("picture", "no_image"), ("caption", "no_text"))
        if not sum(chunk[name] for chunk in chunks)
    ]
