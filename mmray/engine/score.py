"""Score an archive: todo -> read -> decode -> predict -> parts -> shard files.

A pass sends every piece still to do through Ray Data and gets receipts back. What has no receipt
after a pass lost its worker; it is run again in halves until the row that kills stands alone, and
that row is set aside. See DESIGN: a run's only state is the files in OUT.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray
from ray.util.annotations import RayDeprecationWarning

from mmray import ledger, storage
from mmray.archive import rows
from mmray.archive.shards import read_shard
from mmray.bundle import read_manifest
from mmray.engine import cluster
from mmray.engine.asked import ScoreOptions
from mmray.engine.asked import asked as what_is_asked
from mmray.engine.ingest import Piece, ReadOptions, chunks_dataset
from mmray.engine.scorer import Scorer
from mmray.errors import MmrayError, RunError
from mmray.report.progress import Console, Meter, duration
from mmray.report.summary import write_summary

__all__ = ["ScoreOptions", "score"]

SCORER_CPUS = 0.9  # the rest of each core is for the readers
COMMITS_IN_FLIGHT = 16
ALONE_ATTEMPTS = 2  # a row that kills a worker twice, alone, is set aside
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
    asked = what_is_asked(bundle, manifest, archive, options)
    run, resumed = ledger.open_run(out, asked)
    done = ledger.done_shards(out)
    todo = [target for target in asked.targets if target.shard.path not in done]
    if not todo:
        console.say(f"nothing to do: all {len(asked.targets):,} shards are scored in {out}")
        return write_summary(out, run, seconds=0.0)
    if resumed:
        console.say(f"going on: {len(done):,} of {len(run.targets):,} shards are done in {out}")
    job = _Job(out, run, todo, options, console)
    job.run_to_end()
    summary = write_summary(out, run, seconds=job.meter.seconds, stages=job.meter.stages)
    console.say(
        f"scored {summary['scored']:,} of {summary['rows']:,} rows, set aside "
        f"{summary['set_aside']:,}, in {duration(job.meter.seconds)}: {out}"
    )
    return summary


# --- the run -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Shard:
    """What the driver knows of a shard in work."""

    target: ledger.Target
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


def _restart_without_retry() -> dict[str, int]:
    """A dead actor comes back, but what it held waits for the next pass: it may be the cause."""
    return {"max_restarts": -1, "max_task_retries": 0}


class _Job:
    """One command's work on a run: passes until every shard is committed."""

    def __init__(
        self,
        out: str,
        run: ledger.Run,
        todo: Sequence[ledger.Target],
        options: ScoreOptions,
        console: Console,
    ) -> None:
        self._out, self._run, self._options, self._console = out, run, options, console
        parts = ledger.covered(out)
        self._open = {
            target.shard.path: _Shard(target, parts.get(target.shard.path, [])) for target in todo
        }
        for shard in parts.keys() - self._open.keys():
            ledger.drop_parts(out, shard)  # committed, but killed before it could tidy up
        size = sum(target.shard.size for target in run.targets)
        done = size - sum(target.shard.size for target in todo)
        self.meter = Meter(
            total_bytes=size,
            total_shards=len(run.targets),
            done_bytes=done,
            resumed_bytes=done,
            done_shards=len(run.targets) - len(todo),
        )
        self._alone: Counter[tuple[str, int]] = Counter()
        self._commits: list[Any] = []
        self._commit = ray.remote(num_cpus=0)(ledger.commit)
        self._light_run: Any = None

    def run_to_end(self) -> None:
        self._console.say(
            f"scoring {len(self._open):,} shards of {self._run.archive} "
            f"with {self._run.fingerprint[:12]} into {self._out}"
        )
        resources = cluster.connect()
        self._light_run = ray.put(replace(self._run, targets=()))
        pieces, stalled = self._first_pieces(), 0
        while pieces:
            before = self._remaining()
            self._one_pass(pieces, resources)
            self._finish_commits(0)
            stalled = 0 if self._remaining() < before else stalled + 1
            if stalled == STALLED_PASSES:
                raise RunError(
                    f"{self._out}: no progress in {stalled} passes over {len(self._open)} shards, "
                    f"first {next(iter(self._open))}: its readers die; look at the workers' logs"
                )
            pieces = self._pieces_again()
        self._console.show(self.meter.line, force=True)
        self._console.end()

    def _remaining(self) -> tuple[int, int, int]:
        """Shrinks with every pass that achieves something."""
        unknown = sum(shard.total is None for shard in self._open.values())
        missing = [b - a for shard in self._open.values() for a, b in shard.missing()]
        return len(self._open), unknown, sum(missing) - len(missing) - sum(self._alone.values())

    # --- pieces --------------------------------------------------------------------------------

    def _first_pieces(self) -> list[Piece]:
        return [
            Piece(s.target.shard, 0, s.target.stop, tuple(ledger.joined(s.covered)))
            for s in self._open.values()
        ]

    def _pieces_again(self) -> list[Piece]:
        """What the last pass left: lost intervals in halves, whole shards whose reader died."""
        pieces: list[Piece] = []
        for shard in list(self._open.values()):
            if shard.total is None:
                stop = shard.target.stop
                pieces.append(
                    Piece(shard.target.shard, 0, stop, tuple(ledger.joined(shard.covered)))
                )
                continue
            for start, stop in shard.missing():
                pieces += self._halves(shard, start, stop)
            self._commit_if_covered(shard)
        if pieces:
            self._console.say(f"running {len(pieces):,} pieces again whose workers died")
        return pieces

    def _halves(self, shard: _Shard, start: int, stop: int) -> list[Piece]:
        name = shard.target.shard.path
        if stop - start == 1:
            if self._alone[name, start] >= ALONE_ATTEMPTS:
                self._set_aside(shard, start)
                return []
            self._alone[name, start] += 1
        middle = max(start + 1, (start + stop) // 2)
        bounds = [(start, middle), (middle, stop)]
        return [Piece(shard.target.shard, a, b, whole=False) for a, b in bounds if a < b]

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
        self.meter.rows += 1
        self.meter.set_aside += 1

    # --- a pass --------------------------------------------------------------------------------

    def _one_pass(self, pieces: Sequence[Piece], resources: cluster.Resources) -> None:
        options = ReadOptions(columns=self._options.columns, chunk_rows=self._run.chunk_rows)
        gpus = int(resources.gpus)
        actors = self._options.actors or gpus or max(1, int(resources.cpus))
        with warnings.catch_warnings():
            # Ray 2.64 takes the only ways to set max_restarts; pyproject.toml stops before it.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = self._dataset(pieces, options, actors, gpus)
        dataset.context.max_errored_blocks = -1  # what a dead worker held is run again below
        batches: Iterable[pa.Table] = dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        for batch in batches:
            for receipt in batch.to_pylist():
                self._book(receipt)
            self._console.show(self.meter.line)

    def _dataset(
        self, pieces: Sequence[Piece], options: ReadOptions, actors: int, gpus: int
    ) -> ray.data.Dataset:
        chunks = chunks_dataset(self._run.archive, pieces, options, readers=actors)
        return chunks.map_batches(
            Scorer,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_constructor_args=(
                self._run.bundle,
                self._run.fingerprint,
                self._out,
                self._run.embedding_dim is not None,
                1,
            ),
            compute=ray.data.ActorPoolStrategy(size=min(actors, max(1, len(pieces)))),
            num_cpus=SCORER_CPUS,
            num_gpus=1 if gpus else None,
            ray_remote_args_fn=_restart_without_retry,
        )

    def _book(self, receipt: dict[str, Any]) -> None:
        if receipt["failure"] is not None:
            raise MmrayError(f"{receipt['failure']}; run the same command again to go on")
        shard = self._open[receipt["shard"]]
        if receipt["total"] is not None:
            shard.total, shard.problem = receipt["total"], receipt["problem"]
        else:
            self._count(shard, receipt)
        self._commit_if_covered(shard)

    def _count(self, shard: _Shard, receipt: dict[str, Any]) -> None:
        shard.covered.append((receipt["start"], receipt["stop"]))
        meter = self.meter
        meter.rows += receipt["stop"] - receipt["start"]
        meter.set_aside += receipt["set_aside"]
        size = min(receipt["bytes"], shard.target.shard.size - shard.bytes)
        shard.bytes += size
        meter.done_bytes += size
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

    def _commit_if_covered(self, shard: _Shard) -> None:
        path = shard.target.shard.path
        if shard.total is None or path not in self._open or shard.missing():
            return
        del self._open[path]
        self.meter.done_bytes += shard.target.shard.size - shard.bytes
        self._finish_commits(COMMITS_IN_FLIGHT)
        self._commits.append(
            self._commit.remote(
                self._out, self._light_run, shard.target, shard.total, shard.problem
            )
        )

    def _finish_commits(self, leave: int) -> None:
        while len(self._commits) > leave:
            finished, self._commits = ray.wait(self._commits, timeout=1.0)
            for record in _results(finished):
                self.meter.done_shards += 1
                if record.problem:
                    self._console.say(f"{record.shard}: {record.problem}")
            self._console.show(self.meter.line)
