"""Prove a scoring run: every shard, every row once, rows = scored + set aside, one bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray import ledger, storage
from mmray.archive import rows
from mmray.archive.shards import list_shards
from mmray.errors import NotFound, StorageError
from mmray.targets import Target, Targets


@dataclass(slots=True)
class Verdict:
    """What was proved, and every finding against it; no finding means the run holds."""

    out: str
    shards: int = 0
    rows: int = 0
    scored: int = 0
    set_aside: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        names = ("out", "ok", "shards", "rows", "scored", "set_aside", "findings")
        return {name: getattr(self, name) for name in names}


def verify(out: str) -> Verdict:
    """Check OUT against its own ``run.json`` and the archive as it is now.

    Reads of every score file its footer and the ``row`` and ``error`` columns. Raises NotFound
    when OUT holds no run; everything else that is wrong is a finding.
    """
    out = storage.absolute(out)
    run = ledger.read_run(out)
    verdict = Verdict(out, shards=len(run.targets))
    done = ledger.done_shards(out)
    there = run.targets.among(done)
    for target in run.targets.take(~there):
        verdict.findings.append(
            f"{target.shard.path}: not scored yet; run the same score command again"
        )
    for shard in _without(done, run.targets.paths):
        verdict.findings.append(f"{shard}: has scores but is not in the run's archive listing")
    for found in ledger.each(lambda target: _check(out, run, target), run.targets.take(there)):
        if isinstance(found, ledger.ShardRecord):
            verdict.rows += found.rows
            verdict.scored += found.scored
            verdict.set_aside += found.set_aside
        else:
            verdict.findings += found
    verdict.findings += _check_inputs(run)
    return verdict


def _check(out: str, run: ledger.Run, target: Target) -> ledger.ShardRecord | list[str]:
    """The shard's record when its score file holds, else what is wrong with it."""
    path, uri = target.shard.path, ledger.scores_uri(out, target.shard.path)
    try:
        record, count = ledger.read_record(uri)
        table = ledger.read_scores(uri, [rows.SHARD, rows.ROW, rows.ERROR])
    except StorageError as error:
        return [str(error)]
    except (KeyError, ValueError) as error:
        return [f"{path}: columns missing from its score file: {error}"]
    findings = [*_check_rows(path, record, table), *_check_origin(run, target, record)]
    if count != record.rows:
        findings.append(f"{path}: holds {count} rows, its record says {record.rows}")
    return findings or record


def _check_rows(path: str, record: ledger.ShardRecord, table: Any) -> Iterator[str]:
    ordinals = table.column(rows.ROW).to_numpy()
    expected = np.arange(record.rows)
    if not np.array_equal(ordinals, expected):
        missing = np.setdiff1d(expected, ordinals)
        values, counts = np.unique(ordinals, return_counts=True)
        doubled = values[counts > 1]
        yield (
            f"{path}: rows are not 0 to {record.rows - 1} once each: {len(missing)} missing"
            f"{_first(missing)}, {len(doubled)} doubled{_first(doubled)}"
        )
    aside = len(table) - table.column(rows.ERROR).null_count
    if (record.scored + record.set_aside, record.set_aside) != (record.rows, aside):
        yield (
            f"{path}: {record.rows} rows, but its record says {record.scored} scored + "
            f"{record.set_aside} set aside, and {aside} rows have an error"
        )
    if table.column(rows.SHARD).unique().to_pylist() not in ([], [path]):
        yield f"{path}: holds rows of another shard"


def _first(ordinals: Any) -> str:
    return f" (first {ordinals[0]})" if len(ordinals) else ""


def _check_origin(run: ledger.Run, target: Target, record: ledger.ShardRecord) -> Iterator[str]:
    path = target.shard.path
    if record.shard != path:
        yield f"{path}: its record names shard {record.shard}"
    if record.fingerprint != run.fingerprint:
        theirs, ours = record.fingerprint[:12], run.fingerprint[:12]
        yield f"{path}: scored by bundle {theirs}, the run is {ours}"
    if (record.input_size, record.input_etag) != (target.shard.size, target.shard.etag):
        yield f"{path}: scored from another version of the shard than the run lists"
    if target.stop is not None and record.rows > target.stop:
        yield f"{path}: holds {record.rows} rows, the trial asked for {target.stop}"


def _check_inputs(run: ledger.Run) -> Iterator[str]:
    """Shards of the archive that changed, vanished or came since they were listed."""
    try:
        now = Targets.of(map(Target, list_shards(run.archive)))
    except NotFound as error:
        yield f"the archive is not there to check against: {error}"
        return
    for path in _without(run.targets.paths, now.paths):
        yield f"{path}: listed by the run, gone from the archive"
    for path in run.targets.changed(now):
        yield f"{path}: changed in the archive since it was scored"
    if run.trial is None and not run.config.get("shards"):
        for path in _without(now.paths, run.targets.paths):
            yield f"{path}: in the archive, but not in the run; run the same score command again"


def _without(paths: pa.ChunkedArray, known: pa.ChunkedArray) -> list[str]:
    left: list[str] = paths.filter(pc.invert(pc.is_in(paths, value_set=known))).to_pylist()
    return left
