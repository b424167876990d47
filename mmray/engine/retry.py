"""Score again what a run set aside, and put the scores where the reasons were.

Passes (see ``passes``) read of every shard only the rows set aside. Their scores go to parts of
this command's own, which no other command takes up; when a shard's are all there, its score file is
replaced. Whatever ends this command, each score file is whole: the old one, or the new one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mmray import ledger, rejects, storage
from mmray.archive import rows
from mmray.backoff import COUNTS, said
from mmray.bundle import read_manifest
from mmray.config import Columns, validate
from mmray.engine import pace
from mmray.engine.asked import ScoreOptions
from mmray.engine.guard import ROW_SECONDS
from mmray.engine.losses import Losses
from mmray.engine.passes import InWork, Job
from mmray.engine.pieces import Piece
from mmray.engine.scorer import Committed, committed, start_committer
from mmray.errors import ConfigError
from mmray.lease import Lease
from mmray.report.progress import Console, Meter, duration
from mmray.report.summary import Totals, finished_summary, write_summary
from mmray.scoring_run import RUN, UNRAISED, Caps, Run, read_run, record_caps
from mmray.targets import Target

PLACE = "_run/retry"  # below OUT; a folder a command


def retry(
    out: str,
    console: Console,
    *,
    reasons: Sequence[str] = (),
    max_errors: float | None = None,
    actors: int | None = None,
    decoders: int | None = None,
    row_seconds: float = ROW_SECONDS,
    caps: Caps = UNRAISED,
) -> dict[str, Any]:
    """Score the rows of OUT again that were set aside for a reason beginning with one of
    ``reasons`` (none: for any), with the bundle, archive and options of its run.

    ``max_errors`` is the share in [0, 1] of them that may be set aside again; ``actors``,
    ``decoders`` and ``row_seconds`` as in ScoreOptions. Higher ``caps`` of pictures go into
    ``run.json`` and hold for later retries too. Returns the new summary with ``retried``:
    how many ``rows`` were tried, ``scored`` and ``set_aside`` again. Raises NotFound when OUT holds
    no run, ConfigError when its bundle changed, StorageError, RunError past the error budget.
    """
    out = storage.absolute(out)
    options = ScoreOptions(
        max_errors=max_errors,
        actors=actors,
        decoders=decoders,
        row_seconds=row_seconds,
        caps=caps,
    )
    COUNTS.take()  # an earlier command's
    read_run(out)  # before anything is written there
    with Lease(out, console.say) as lease:
        return _retry(out, console, reasons, options, lease)


def _retry(
    out: str, console: Console, reasons: Sequence[str], options: ScoreOptions, lease: Lease
) -> dict[str, Any]:
    run = read_run(out)
    tries = _find(out, run, reasons)
    if not tries:
        asked = f" for {', '.join(map(repr, reasons))}" if reasons else ""
        console.say(f"nothing to retry: no row of {out} is set aside{asked}")
        return finished_summary(out, run, console) | {"retried": _counts(0, 0)}
    _check_bundle(run)
    columns = validate(Columns, run.config.get("columns") or {}, storage.join(out, RUN))
    run = record_caps(out, run, options.caps)
    options = replace(options, columns=columns, caps=run.caps)
    count = sum(len(one.rows) for one in tries.values())
    console.say(f"trying {count:,} rows of {len(tries):,} shards again that {out} set aside")
    job = _Retrying(out, run, tries, reasons, options, console, lease)
    # Its counts end here: killed before it writes new ones, a later command adds them up again.
    storage.delete(storage.join(out, ledger.SUMMARY))
    job.run_to_end()
    storage.delete_all(storage.join(out, PLACE))
    totals = Totals()
    totals.read(out, run.targets.take(run.targets.among(ledger.done_shards(out))), console)
    summary = write_summary(out, run, totals, job.meter)
    retried = _counts(job.meter.rows, job.meter.set_aside)
    if job.meter.retries:
        console.say(said(job.meter.retries))
    console.say(
        f"scored {retried['scored']:,} of {retried['rows']:,} rows tried again, set aside "
        f"{retried['set_aside']:,}, in {duration(job.meter.seconds)}: {out}"
    )
    job.budget.check()
    return summary | {"retried": retried}


def _counts(tried: int, set_aside: int) -> dict[str, int]:
    return {"rows": tried, "scored": tried - set_aside, "set_aside": set_aside}


def _check_bundle(run: Run) -> None:
    found = read_manifest(run.bundle).fingerprint
    if found != run.fingerprint:
        raise ConfigError(
            f"{run.bundle}: its fingerprint is {found[:12]}, the run was scored by "
            f"{run.fingerprint[:12]}; put that bundle back, or score into another --out"
        )


# --- which rows ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Try:
    """The ``rows`` of a shard to try again (int64 [N], ascending), of ``total``; ``alone``, those
    of them that had killed their worker; ``size``, about how many bytes they are of the shard."""

    rows: npt.NDArray[np.int64]
    alone: frozenset[int]
    size: int
    total: int
    problem: str | None


def _find(out: str, run: Run, reasons: Sequence[str]) -> dict[int, _Try]:
    """What to try of every shard that has something, by its place in the run's listing."""

    def look(record: ledger.ShardRecord) -> _Try | None:
        return _try(out, record, reasons) if rejects.counted(record, reasons) else None

    looked = ledger.committed(out, run, look)
    return {index: tried for index, _, tried in looked if tried is not None}


def _try(out: str, record: ledger.ShardRecord, reasons: Sequence[str]) -> _Try:
    found = rejects.read(out, record.shard, reasons)
    ordinals = found.column(rows.ROW).to_numpy()
    alone: frozenset[int] = frozenset()
    if rows.WORKER_DIED in record.reasons:
        errors = found.column(rows.ERROR).to_pylist()
        died = [rows.reason(error) == rows.WORKER_DIED for error in errors]
        alone = frozenset(ordinals[died].tolist())
    size = record.input_size * len(ordinals) // record.rows
    return _Try(ordinals, alone, size, record.rows, record.problem)


def _intervals(ordinals: Sequence[int]) -> list[ledger.Interval]:
    return ledger.joined((row, row + 1) for row in ordinals)


# --- the passes ----------------------------------------------------------------------------------


class _Retrying(Job):
    """Of every shard, what was set aside. Rows that had killed their worker are suspects from the
    start: they wait for the second pass, alone before a witness, and take no other with them."""

    def __init__(
        self,
        out: str,
        run: Run,
        tries: dict[int, _Try],
        reasons: Sequence[str],
        options: ScoreOptions,
        console: Console,
        lease: Lease,
    ) -> None:
        self._tries, self._reasons = tries, reasons
        todo = np.zeros(len(run.targets), dtype=np.bool_)
        todo[list(tries)] = True
        meter = Meter(total_bytes=sum(one.size for one in tries.values()), total_shards=len(tries))
        super().__init__(out, run, todo, options, console, meter, lease)
        self._parts = storage.join(out, PLACE, uuid.uuid4().hex)
        self._read = replace(self._read, scattered=True)
        suspects = {index: one.alone for index, one in tries.items() if one.alone}
        paths = {index: run.targets[index].shard.path for index in suspects}
        self._losses = Losses({paths[index]: alone for index, alone in suspects.items()})
        self._live = {index: self._open(index) for index in suspects}

    def _pieces_of(self, index: int, target: Target) -> Iterator[Piece]:
        tried = self._tries[index]
        others = _intervals([row for row in tried.rows.tolist() if row not in tried.alone])
        if others:
            yield Piece(target.shard, index).only(others)

    def _open(self, index: int) -> InWork:
        tried = self._tries[index]
        target = self._run.targets[index]
        shard = InWork(target, tried.size, total=tried.total, problem=tried.problem)
        shard.cover(ledger.gaps(_intervals(tried.rows.tolist()), 0, tried.total))
        return shard

    def _start_committer(self) -> Any:
        return start_committer(
            _Recommitter, self._out, self._run, self._parts, tuple(self._reasons)
        )


class _Recommitter:
    """Puts scores where the reasons were; it is called again when it dies, as this may be."""

    def __init__(self, out: str, run: Run, parts: str, reasons: tuple[str, ...]) -> None:
        self._out, self._run, self._parts, self._reasons = out, run, parts, reasons
        pace.share()

    def commit(self, target: Target, total: int, problem: str | None) -> Committed:
        where = self._out, self._run, target, self._parts
        return committed(lambda: rejects.recommit(*where, self._reasons, problem))
