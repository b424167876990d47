"""Passes over shards: every row to score goes through Ray Data and comes back as a receipt.

What has no receipt after a pass lost its worker and goes into another pass, see ``losses``. A shard
is committed when receipts cover it. What is read of a shard, and what a commit does, is for the
kinds of ``Job`` to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from mmray import ledger
from mmray.archive import rows
from mmray.archive.shards import read_shard
from mmray.backoff import COUNTS
from mmray.budget import Budget
from mmray.engine import cluster, pace
from mmray.engine.asked import ScoreOptions
from mmray.engine.dataflow import scored
from mmray.engine.ingest import ReadOptions, running
from mmray.engine.losses import Losses, Witness
from mmray.engine.pieces import Piece, Plan, shared
from mmray.engine.placement import place
from mmray.engine.witness import called
from mmray.errors import MmrayError, RunError
from mmray.lease import Lease
from mmray.report.progress import Console, Meter, duration
from mmray.report.summary import Totals
from mmray.scoring_run import Run
from mmray.targets import Target

COMMITS_IN_FLIGHT = 64
CPUS_A_COMMITTER = 64
STALLED_PASSES = 3
LAST_COMMITS_S = 30.0
STAGES = ("read", "decode", "predict", "write")  # whose seconds a receipt has


@dataclass(slots=True)
class InWork:
    """What the driver knows of a shard in work."""

    target: Target
    size: int  # bytes of it to score
    covered: list[ledger.Interval] = field(default_factory=list)
    rows: int = 0  # covered; those covered twice count twice
    total: int | None = None
    problem: str | None = None
    bytes: int = 0

    def cover(self, intervals: Sequence[ledger.Interval]) -> int:
        """Take these rows as scored; says how many they are."""
        count = sum(stop - start for start, stop in intervals)
        self.covered += intervals
        self.rows += count
        return count

    def missing(self) -> list[ledger.Interval]:
        return ledger.gaps(sorted(self.covered), 0, self.total or 0)

    def complete(self) -> bool:
        return self.total is not None and self.rows >= self.total and not self.missing()


class Job(ABC):
    """One command's work on a run: passes until every shard is committed."""

    def __init__(
        self,
        out: str,
        run: Run,
        todo: npt.NDArray[np.bool_],
        options: ScoreOptions,
        console: Console,
        meter: Meter,
        lease: Lease,
    ) -> None:
        """``todo``: which of the run's targets to work on."""
        self._out, self._run, self._options, self._console = out, run, options, console
        self._todo = todo
        self._lease = lease
        self.meter, self.totals = meter, Totals()  # of this command, and what it committed
        self.budget = Budget(out, options.max_errors, int(todo.sum()))
        self._parts = out  # where parts go: below PARTS there
        self._read = ReadOptions(
            columns=options.columns,
            chunk_rows=run.chunk_rows,
            max_image_bytes=options.caps.max_image_bytes,
        )
        self._live: dict[int, InWork] = {}
        self._losses = Losses({})
        self._commits: list[Any] = []
        self._committers: list[Any] = []

    # --- what the kinds differ in --------------------------------------------------------------

    @abstractmethod
    def _pieces_of(self, index: int, target: Target) -> Iterator[Piece]:
        """What a first pass reads of a shard."""

    @abstractmethod
    def _open(self, index: int) -> InWork:
        """A shard, when the first is heard of it."""

    @abstractmethod
    def _start_committer(self) -> Any:
        """An actor with a method ``commit(target, total, problem)``."""

    # --- passes --------------------------------------------------------------------------------

    def run_to_end(self) -> None:
        self.meter.step("plan")
        resources = cluster.connect()
        self.meter.step("ray")
        pace.share()
        # Before the first shard ends, or commits would queue up behind their start.
        count = 1 + resources.cpus // CPUS_A_COMMITTER
        self._committers = [self._start_committer() for _ in range(count)]
        try:
            self._run_passes(resources)
        finally:
            self._end_commits()
        self.meter.retries.update(COUNTS.take())
        self._console.show(self.meter.line, force=True)
        self._console.end()
        if lost := self.meter.recovery_s:
            self._console.say(f"{duration(lost)} of it went to rows that had lost their worker")

    def _run_passes(self, resources: cluster.Resources) -> None:
        stalled, lost = 0, None
        for plan, witness in self._passes():
            if witness is not None and lost is None:
                lost = self.meter.seconds
            before = self._remaining()
            self._one_pass(plan, resources, witness)
            self._finish_commits(0)
            if witness is not None:
                self._losses.hear(witness, self._lost())
            stalled = 0 if self._remaining() < before else stalled + 1
            if stalled == STALLED_PASSES:
                raise RunError(
                    f"{self._out}: no progress in {stalled} passes over {self._todo.sum():,} "
                    f"shards, first {self._first()}: its readers die; look at the workers' logs"
                )
        if lost is not None:
            self.meter.recovery_s = self.meter.seconds - lost

    def _passes(self) -> Iterator[tuple[Plan, Any]]:
        """What to run; all but the first before a witness."""
        run = self._run
        plan = Plan(shared(self._pieces(), run.archive, run.targets, run.chunk_rows))
        if plan:
            yield plan, None
        while plan := Plan(self._pieces_again()):
            self._finish_commits(0)
            self._console.say(f"{len(plan):,} pieces lost their worker; running them again")
            yield plan, called(Witness)
        self._finish_commits(0)

    def _remaining(self) -> tuple[int, int, int]:
        """Shrinks with every pass that achieves something."""
        left = int(self._todo.sum())
        unknown = left - sum(shard.total is not None for shard in self._live.values())
        lost = sum(b - a for intervals in self._lost().values() for a, b in intervals)
        return left, unknown, lost - self._losses.known

    def _lost(self) -> dict[str, list[ledger.Interval]]:
        return {shard.target.shard.path: shard.missing() for shard in self._live.values()}

    def _first(self) -> str:
        return self._run.targets[int(self._todo.argmax())].shard.path

    # --- pieces --------------------------------------------------------------------------------

    def _left(self) -> Iterator[tuple[int, Target]]:
        targets = self._run.targets.take(self._todo)
        yield from zip(np.flatnonzero(self._todo).tolist(), targets, strict=True)

    def _pieces(self) -> Iterator[Piece]:
        for index, target in self._left():
            yield from self._pieces_of(index, target)

    def _pieces_again(self) -> Iterator[Piece]:
        """What the last pass left: lost rows, and whole shards whose reader died."""
        for index, target in self._left():
            held = self._live.get(index)
            if held is None or held.total is None:
                yield from self._pieces_of(index, target)
                continue
            for row in self._losses.guilty(target.shard.path, held.missing()):
                self._set_aside(held, row)
            yield from self._losses.pieces(Piece(target.shard, index), held.missing())
            self._commit_if_complete(index, held)

    def _set_aside(self, shard: InWork, row: int) -> None:
        """A row that killed its worker every time it was tried alone."""
        source = shard.target.shard
        stream = read_shard(
            self._run.archive,
            source,
            columns=self._options.columns,
            images=False,
            start=row,
            stop=row + 1,
        )
        key = next((item.key for item in stream if isinstance(item, rows.Sample)), "")
        error = f"{rows.WORKER_DIED}: the process scoring this row ended every time it was tried"
        aside = pa.Table.from_pylist(
            [
                {
                    "shard": source.path,
                    "row": row,
                    "key": key,
                    "error": error,
                    "error_stage": "predict",
                }
            ],
            schema=self._run.schema(),
        )
        ledger.write_part(self._parts, source.path, row, row + 1, aside)
        shard.cover([(row, row + 1)])
        self.meter.take(1, 1, 0)
        self.budget.take(1, 1)

    # --- a pass --------------------------------------------------------------------------------

    def _one_pass(self, plan: Plan, resources: cluster.Resources, witness: Any) -> None:
        placement = place(resources, self._options.actors, self._options.decoders)
        limits = self._options.row_seconds, self._options.caps.max_pixels
        dataset = scored(self._run, self._parts, plan, self._read, placement, limits, witness)
        with running(dataset) as batches:
            for batch in batches:
                for receipt in batch.to_pylist():
                    self._book(receipt)
                self._finish_commits(COMMITS_IN_FLIGHT)
                self._console.show(self.meter.line)
                self._lease.check()

    def _book(self, receipt: dict[str, Any]) -> None:
        self.meter.retries.update(dict(receipt["retries"]))
        if receipt["failure"] is not None:
            raise MmrayError(f"{receipt['failure']}; run the same command again to go on")
        index = receipt["index"]
        assert self._todo[index], f"{receipt['shard']}: a receipt for a shard that is done"
        shard = self._live.get(index)
        if shard is None:
            shard = self._live[index] = self._open(index)
        if receipt["total"] is not None:
            if shard.total is None and not receipt["total"] and receipt["problem"]:
                self.budget.take(unreadable=1)
            shard.total, shard.problem = receipt["total"], receipt["problem"]
        else:
            self._count(shard, receipt)
        self._commit_if_complete(index, shard)

    def _count(self, shard: InWork, receipt: dict[str, Any]) -> None:
        covers = receipt["covers"]
        count = shard.cover(list(zip(covers[::2], covers[1::2], strict=True)))
        meter = self.meter
        size = min(receipt["bytes"], shard.size - shard.bytes)
        shard.bytes += size
        if meter.first_rows_s is None:
            meter.step("workers")
            # What was done to the first rows is known; all before it was starting workers.
            work = sum(receipt[f"{stage}_s"] for stage in STAGES)
            meter.start["workers"] -= work
            meter.step("first rows")
            steps = "  ".join(f"{step} {seconds:.1f}s" for step, seconds in meter.start.items())
            self._console.say(f"first rows after {meter.seconds:.1f}s: {steps}")
        meter.take(count, receipt["set_aside"], size)
        meter.decided += receipt["decided"]
        for stage in STAGES:
            meter.spend(stage, receipt[f"{stage}_s"])
        self.budget.take(count, receipt["set_aside"])

    # --- commits -------------------------------------------------------------------------------

    def _commit_if_complete(self, index: int, shard: InWork) -> None:
        if not self._todo[index] or not shard.complete():
            return
        self._todo[index] = False
        del self._live[index]
        self.meter.done_bytes += shard.size - shard.bytes
        self._finish_commits(COMMITS_IN_FLIGHT)
        committer = self._committers[index % len(self._committers)]
        self._commits.append(committer.commit.remote(shard.target, shard.total, shard.problem))

    def _finish_commits(self, leave: int) -> None:
        """Take in what is committed by now, waiting until at most ``leave`` are on their way."""
        while self._commits:
            wait = len(self._commits) > leave
            finished, self._commits = ray.wait(
                self._commits,
                num_returns=len(self._commits) - (leave if wait else 0),
                timeout=1.0 if wait else 0,
            )
            for record, retries in ray.get(finished):
                self.meter.retries.update(retries)
                if isinstance(record, MmrayError):
                    raise record
                self.meter.done_shards += 1
                self.totals.add(record)
                if record.problem:
                    self._console.say(f"{record.shard}: {record.problem}")
            self._console.show(self.meter.line)
            if not wait:
                return

    def _end_commits(self) -> None:
        """Let go of the committers; none is at work on a shard when the next command takes it up.

        After an error what they are at is waited for; one that takes longer is ended on the way,
        as a node that fails would end it.
        """
        if self._commits:
            ray.wait(self._commits, num_returns=len(self._commits), timeout=LAST_COMMITS_S)
        for committer in self._committers:
            ray.kill(committer)
