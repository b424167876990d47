"""Score an archive: todo -> read -> decode -> predict -> parts -> shard files.

Passes (see ``passes``) cover every shard that has no score file yet, less the parts that an earlier
command left. A run's only state is the files in OUT.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmray import ledger, storage
from mmray.backoff import COUNTS, said
from mmray.budget import Budget
from mmray.bundle import Manifest, read_manifest
from mmray.engine.asked import ScoreOptions
from mmray.engine.asked import asked as what_is_asked
from mmray.engine.passes import InWork, Job
from mmray.engine.pieces import Piece
from mmray.engine.scorer import Committer, start_committer
from mmray.lease import Lease
from mmray.report.progress import Console, Meter, duration
from mmray.report.summary import finished_summary, write_summary
from mmray.scoring_run import Run, open_run
from mmray.targets import Target

__all__ = ["ScoreOptions", "score"]


def score(
    bundle: str, archive: str, out: str, options: ScoreOptions, console: Console
) -> dict[str, Any]:
    """Put a score, or the reason why not, on every pair of ``archive``; goes on where OUT stands.

    Returns the summary that is also written to ``OUT/_run/summary.json``. Raises ConfigError when
    OUT belongs to another run, StorageError when storage refuses, RunError past the error budget.
    """
    bundle, archive, out = map(storage.absolute, (bundle, archive, out))
    began = time.monotonic()
    COUNTS.take()  # an earlier command's
    manifest = read_manifest(bundle)
    with Lease(out, console.say) as lease:
        return _score(bundle, manifest, archive, out, options, console, lease, began)


def _score(
    bundle: str,
    manifest: Manifest,
    archive: str,
    out: str,
    options: ScoreOptions,
    console: Console,
    lease: Lease,
    began: float,
) -> dict[str, Any]:
    asked = what_is_asked(bundle, manifest, archive, options)
    run, resumed = open_run(out, asked)
    done = ledger.done_shards(out)
    if asked.targets.among(done).all():
        console.say(f"nothing to do: all {len(asked.targets):,} shards are scored in {out}")
        return _within_budget(out, finished_summary(out, run, console), options)
    if resumed:
        console.say(f"going on: {len(done):,} of {len(run.targets):,} shards are done in {out}")
    before = run.targets.among(done)
    todo = run.targets.among(asked.targets.paths) & ~before
    del asked, done
    job = _Scoring(out, run, todo, options, console, lease, began)
    if options.max_errors is not None:
        job.count_earlier(before)
    console.say(
        f"scoring {todo.sum():,} shards of {archive} with {run.fingerprint[:12]} into {out}"
    )
    job.run_to_end()
    if options.max_errors is None:  # else they were read first
        job.totals.read(out, run.targets.take(before), console)
    summary = write_summary(out, run, job.totals, job.meter)
    console.say(
        f"scored {summary['scored']:,} of {summary['rows']:,} rows, set aside "
        f"{summary['set_aside']:,}, in {duration(job.meter.seconds)}: {out}"
    )
    if job.meter.retries:
        console.say(said(job.meter.retries))
    return _within_budget(out, summary, options)


def _within_budget(out: str, summary: dict[str, Any], options: ScoreOptions) -> dict[str, Any]:
    """The summary of all that OUT holds. Raises RunError when it has too much set aside."""
    counts = summary["rows"], summary["set_aside"], summary.get("unreadable", 0)
    Budget(out, options.max_errors, summary["shards"], *counts).check()
    return summary


class _Scoring(Job):
    """Of every shard to do, all that no part covers."""

    def __init__(
        self,
        out: str,
        run: Run,
        todo: npt.NDArray[np.bool_],
        options: ScoreOptions,
        console: Console,
        lease: Lease,
        began: float,
    ) -> None:
        done = run.targets.size - run.targets.take(todo).size
        meter = Meter(
            total_bytes=run.targets.size,
            total_shards=len(run.targets),
            done_bytes=done,
            resumed_bytes=done,
            done_shards=len(run.targets) - int(todo.sum()),
            started=began,
        )
        super().__init__(out, run, todo, options, console, meter, lease)
        self.budget.shards = len(run.targets)
        self._take_up(ledger.covered(out))

    def count_earlier(self, done: npt.NDArray[np.bool_]) -> None:
        """Hold what earlier commands set aside against the budget too: of the shards that are
        ``done``, and in parts. Each of these files is opened."""
        totals = self.totals
        totals.read(self._out, self._run.targets.take(done), self._console)
        self.budget.take(totals.rows, totals.set_aside, totals.unreadable)
        parts = [
            ledger.part_uri(self._out, shard.target.shard.path, start, stop)
            for shard in self._live.values()
            for start, stop in shard.covered
        ]
        for rows, set_aside in ledger.each(ledger.counted, parts):
            self.budget.take(rows, set_aside)

    def _take_up(self, parts: dict[str, list[ledger.Interval]]) -> None:
        """The shards to do that an earlier command scored in part."""
        places = pc.index_in(pa.array(parts, pa.string()), value_set=self._run.targets.paths)
        for (shard, covered), index in zip(parts.items(), places.to_pylist(), strict=True):
            if index is not None and self._todo[index]:
                self._live[index] = self._open(index)
                self._live[index].cover(covered)
            else:
                ledger.drop_parts(self._out, shard)  # committed, but killed before it tidied up

    def _pieces_of(self, index: int, target: Target) -> Iterator[Piece]:
        held = self._live.get(index)
        covered = tuple(ledger.joined(held.covered)) if held else ()
        yield Piece(target.shard, index, 0, target.stop, covered)

    def _open(self, index: int) -> InWork:
        target = self._run.targets[index]
        return InWork(target, target.shard.size)

    def _start_committer(self) -> Any:
        return start_committer(Committer, self._out, self._run)
