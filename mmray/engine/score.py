"""Score an archive: todo -> read -> decode -> predict -> parts -> shard files.

A pass sends every piece still to do through Ray Data and gets receipts back. What has no receipt
after a pass lost its worker and goes into another pass, see ``losses``. A run's only state is the
files in OUT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmray import ledger, storage
from mmray.archive import rows
from mmray.archive.shards import read_shard
from mmray.bundle import Manifest, read_manifest
from mmray.engine import cluster
from mmray.engine.asked import ScoreOptions
from mmray.engine.asked import asked as what_is_asked
from mmray.engine.dataflow import scored
from mmray.engine.ingest import ReadOptions, running
from mmray.engine.losses import Losses, call_witness
from mmray.engine.pieces import Piece, Plan, shared
from mmray.engine.placement import place
from mmray.engine.scorer import start_committer
from mmray.errors import MmrayError, RunError
from mmray.lease import Lease
from mmray.report.progress import Console, Meter, duration
from mmray.report.summary import Totals, finished_summary, write_summary
from mmray.targets import Target

__all__ = ["ScoreOptions", "score"]

COMMITS_IN_FLIGHT = 64
CPUS_A_COMMITTER = 64
STALLED_PASSES = 3


def score(
    bundle: str, archive: str, out: str, options: ScoreOptions, console: Console
) -> dict[str, Any]:
    """Put a score, or the reason why not, on every pair of ``archive``; goes on where OUT stands.

    Returns the summary that is also written to ``OUT/_run/summary.json``. Raises ConfigError when
    OUT belongs to another run, StorageError when storage refuses, RunError past the error budget.
    """
    bundle, archive, out = map(storage.absolute, (bundle, archive, out))
    manifest = read_manifest(bundle)
    with Lease(out, console.say) as lease:
        return _score(bundle, manifest, archive, out, options, console, lease)


def _score(
    bundle: str,
    manifest: Manifest,
    archive: str,
    out: str,
    options: ScoreOptions,
    console: Console,
    lease: Lease,
) -> dict[str, Any]:
    asked = what_is_asked(bundle, manifest, archive, options)
    run, resumed = ledger.open_run(out, asked)
    done = ledger.done_shards(out)
    if asked.targets.among(done).all():
        console.say(f"nothing to do: all {len(asked.targets):,} shards are scored in {out}")
        return finished_summary(out, run, console)
    if resumed:
        console.say(f"going on: {len(done):,} of {len(run.targets):,} shards are done in {out}")
    before = run.targets.among(done)
    todo = run.targets.among(asked.targets.paths) & ~before
    del asked, done
    job = _Job(out, run, todo, options, console, lease)
    job.run_to_end()
    if before.any():
        job.totals.read(out, run.targets.take(before), console)
    summary = write_summary(out, run, job.totals, job.meter)
    console.say(
        f"scored {summary['scored']:,} of {summary['rows']:,} rows, set aside "
        f"{summary['set_aside']:,}, in {duration(job.meter.seconds)}: {out}"
    )
    return summary


# --- the run -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Shard:
    """What the driver knows of a shard in work."""

    target: Target
    covered: list[ledger.Interval] = field(default_factory=list)
    total: int | None = None
    problem: str | None = None
    bytes: int = 0

    def missing(self) -> list[ledger.Interval]:
        return ledger.gaps(sorted(self.covered), 0, self.total or 0)


def _results(tasks: Sequence[Any]) -> list[ledger.ShardRecord]:
    """What finished commits return; an error of ours comes as itself, without Ray's wrapping."""
    try:
        records: list[ledger.ShardRecord] = ray.get(tasks)
        return records
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MmrayError):
            raise error.cause from None
        raise


class _Job:
    """One command's work on a run: passes until every shard is committed."""

    def __init__(
        self,
        out: str,
        run: ledger.Run,
        todo: npt.NDArray[np.bool_],
        options: ScoreOptions,
        console: Console,
        lease: Lease,
    ) -> None:
        """``todo``: which of the run's targets to score."""
        self._out, self._run, self._options, self._console = out, run, options, console
        self._todo, self._lease = todo, lease
        self._live = self._with_parts(ledger.covered(out))
        done = run.targets.size - run.targets.take(todo).size
        self.meter = Meter(
            total_bytes=run.targets.size,
            total_shards=len(run.targets),
            done_bytes=done,
            resumed_bytes=done,
            done_shards=len(run.targets) - int(todo.sum()),
        )
        self.totals = Totals()
        self._losses = Losses()
        self._commits: list[Any] = []
        self._committers: list[Any] = []

    def _with_parts(self, parts: dict[str, list[ledger.Interval]]) -> dict[int, _Shard]:
        """The shards to do that an earlier command scored in part."""
        live: dict[int, _Shard] = {}
        places = pc.index_in(pa.array(parts, pa.string()), value_set=self._run.targets.paths)
        for (shard, covered), index in zip(parts.items(), places.to_pylist(), strict=True):
            if index is not None and self._todo[index]:
                live[index] = _Shard(self._run.targets[index], covered)
            else:
                ledger.drop_parts(self._out, shard)  # committed, but killed before it tidied up
        return live

    def run_to_end(self) -> None:
        self._console.say(
            f"scoring {self._todo.sum():,} shards of {self._run.archive} "
            f"with {self._run.fingerprint[:12]} into {self._out}"
        )
        resources = cluster.connect()
        # Before the first shard ends, or commits would queue up behind their start.
        count = 1 + resources.cpus // CPUS_A_COMMITTER
        self._committers = [start_committer(self._out, self._run) for _ in range(count)]
        plan, stalled, witness, lost = self._plan(), 0, None, 0.0
        while plan:
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
            plan = Plan(self._pieces_again())
            self._finish_commits(0)
            if plan:
                self._console.say(f"{len(plan):,} pieces lost their worker; running them again")
                witness, lost = call_witness(), lost or self.meter.seconds
        if lost:
            self.meter.recovery_s = self.meter.seconds - lost
        self._console.show(self.meter.line, force=True)
        self._console.end()

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

    def _pieces(self) -> Iterator[Piece]:
        """Of every shard to do, all that no part covers."""
        targets = self._run.targets.take(self._todo)
        for index, target in zip(np.flatnonzero(self._todo).tolist(), targets, strict=True):
            held = self._live.get(index)
            covered = tuple(ledger.joined(held.covered)) if held else ()
            yield Piece(target.shard, index, 0, target.stop, covered)

    def _plan(self) -> Plan:
        run = self._run
        return Plan(shared(self._pieces(), run.archive, run.targets, run.chunk_rows))

    def _pieces_again(self) -> Iterator[Piece]:
        """What the last pass left: lost rows, and whole shards whose reader died."""
        for piece in self._pieces():
            held = self._live.get(piece.index)
            if held is None or held.total is None:
                yield piece
                continue
            path = piece.shard.path
            for row in self._losses.guilty(path, held.missing()):
                self._set_aside(held, row)
            yield from self._losses.pieces(piece, held.missing())
            self._commit_if_covered(piece.index, held)

    def _set_aside(self, shard: _Shard, row: int) -> None:
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
        error = "worker died: the process scoring this row ended every time it was tried"
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
        ledger.write_part(self._out, source.path, row, row + 1, aside)
        shard.covered.append((row, row + 1))
        self.meter.take(1, 1, 0)

    # --- a pass --------------------------------------------------------------------------------

    def _one_pass(self, plan: Plan, resources: cluster.Resources, witness: Any) -> None:
        options = ReadOptions(columns=self._options.columns, chunk_rows=self._run.chunk_rows)
        placement = place(resources, self._options.actors, self._options.decoders)
        dataset = scored(
            self._run, self._out, plan, options, placement, self._options.row_seconds, witness
        )
        with running(dataset) as batches:
            for batch in batches:
                for receipt in batch.to_pylist():
                    self._book(receipt)
                self._finish_commits(COMMITS_IN_FLIGHT)
                self._console.show(self.meter.line)
                self._lease.check()

    def _book(self, receipt: dict[str, Any]) -> None:
        if receipt["failure"] is not None:
            raise MmrayError(f"{receipt['failure']}; run the same command again to go on")
        index = receipt["index"]
        assert self._todo[index], f"{receipt['shard']}: a receipt for a shard that is done"
        shard = self._live.get(index)
        if shard is None:
            shard = self._live[index] = _Shard(self._run.targets[index])
        if receipt["total"] is not None:
            shard.total, shard.problem = receipt["total"], receipt["problem"]
        else:
            self._count(shard, receipt)
        self._commit_if_covered(index, shard)

    def _count(self, shard: _Shard, receipt: dict[str, Any]) -> None:
        shard.covered.append((receipt["start"], receipt["stop"]))
        meter = self.meter
        size = min(receipt["bytes"], shard.target.shard.size - shard.bytes)
        shard.bytes += size
        meter.take(receipt["stop"] - receipt["start"], receipt["set_aside"], size)
        for stage in ("read", "decode", "predict", "write"):
            meter.spend(stage, receipt[f"{stage}_s"])
        budget = self._options.max_errors
        if budget is not None and meter.rows >= 100 and meter.set_aside > budget * meter.rows:
            raise RunError(
                f"{self._out}: {meter.set_aside:,} of {meter.rows:,} rows set aside, more than "
                f"--max-errors {budget:.3%} allows; finished rows are kept, the same command "
                "with a larger budget goes on"
            )

    # --- commits -------------------------------------------------------------------------------

    def _commit_if_covered(self, index: int, shard: _Shard) -> None:
        if shard.total is None or not self._todo[index] or shard.missing():
            return
        self._todo[index] = False
        del self._live[index]
        self.meter.done_bytes += shard.target.shard.size - shard.bytes
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
            for record in _results(finished):
                self.meter.done_shards += 1
                self.totals.add(record)
                if record.problem:
                    self._console.say(f"{record.shard}: {record.problem}")
            self._console.show(self.meter.line)
            if not wait:
                return
