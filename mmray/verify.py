"""Prove a scoring run: every shard, every row once, rows = scored + set aside, one bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray import ledger, storage
from mmray.archive import rows
from mmray.archive.shards import list_shards
from mmray.errors import NotFound, StorageError
from mmray.scoring_run import Run, read_run
from mmray.targets import Target, Targets

Progress = Callable[[int, int | None], None]  # how many are done, and of how many


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


def verify(out: str, progress: Progress = lambda done, total: None) -> Verdict:
    """Check OUT against its own ``run.json`` and the archive as it is now.

    Reads of every score file its footer and the row numbers, a few bytes each: no scores. Raises
    NotFound when OUT holds no run; everything else that is wrong is a finding.
    """
    out = storage.absolute(out)
    run = read_run(out)
    verdict = Verdict(out, shards=len(run.targets))
    done = ledger.done_shards(out)
    there = run.targets.among(done)
    for target in run.targets.take(~there):
        verdict.findings.append(
            f"{target.shard.path}: not scored yet; run the same score command again"
        )
    for shard in _without(done, run.targets.paths):
        verdict.findings.append(f"{shard}: has scores but is not in the run's archive listing")
    checked = ledger.each(lambda target: _check(out, run, target), run.targets.take(there))
    for number, found in enumerate(checked, 1):
        if isinstance(found, ledger.ShardRecord):
            verdict.rows += found.rows
            verdict.scored += found.scored
            verdict.set_aside += found.set_aside
        else:
            verdict.findings += found
        progress(number, len(done))
    verdict.findings += _check_inputs(run)
    return verdict


def _check(out: str, run: Run, target: Target) -> ledger.ShardRecord | list[str]:
    """The shard's record when its score file holds, else what is wrong with it."""
    path = target.shard.path
    try:
        with ledger.opened(ledger.scores_uri(out, path)) as file:
            record = ledger.record_of(file)
            ordinals = file.read(columns=[rows.ROW]).column(rows.ROW).to_numpy()
            findings = [
                *_check_schema(path, run, file),
                *_check_rows(path, record, ordinals),
                *_check_counts(path, record, file.metadata),
                *_check_origin(run, target, record),
            ]
    except StorageError as error:
        return [str(error)]
    return findings or record


def _check_schema(path: str, run: Run, file: pq.ParquetFile) -> Iterator[str]:
    missing = [name for name in run.schema().names if name not in file.schema_arrow.names]
    if missing:
        yield f"{path}: columns missing from its score file: {', '.join(missing)}"


def _check_rows(path: str, record: ledger.ShardRecord, ordinals: Any) -> Iterator[str]:
    expected = np.arange(record.rows)
    if len(ordinals) != record.rows:
        yield f"{path}: holds {len(ordinals)} rows, its record says {record.rows}"
    if not np.array_equal(ordinals, expected):
        missing = np.setdiff1d(expected, ordinals)
        values, counts = np.unique(ordinals, return_counts=True)
        doubled = values[counts > 1]
        yield (
            f"{path}: rows are not 0 to {record.rows - 1} once each: {len(missing)} missing"
            f"{_first(missing)}, {len(doubled)} doubled{_first(doubled)}"
        )


def _check_counts(path: str, record: ledger.ShardRecord, footer: Any) -> Iterator[str]:
    """What the footer's statistics say of the columns ``error`` and ``shard``."""
    errors, shards = _statistics(footer, rows.ERROR), _statistics(footer, rows.SHARD)
    aside = sum(count - found.null_count for count, found in errors)
    if (record.scored + record.set_aside, record.set_aside) != (record.rows, aside):
        yield (
            f"{path}: {record.rows} rows, but its record says {record.scored} scored + "
            f"{record.set_aside} set aside, and {aside} rows have an error"
        )
    if {name for _, found in shards for name in (found.min, found.max)} - {path}:
        yield f"{path}: holds rows of another shard"


def _statistics(footer: Any, column: str) -> list[tuple[int, Any]]:
    """Of every row group that has rows, their number and a column's statistics."""
    found = []
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        chunks = (group.column(i) for i in range(group.num_columns))
        chunk = next((c for c in chunks if c.path_in_schema == column), None)
        if not group.num_rows:
            continue
        if chunk is None or chunk.statistics is None:
            raise ValueError(f"no statistics of the column {column!r}")
        found.append((group.num_rows, chunk.statistics))
    return found


def _first(ordinals: Any) -> str:
    return f" (first {ordinals[0]})" if len(ordinals) else ""


def _check_origin(run: Run, target: Target, record: ledger.ShardRecord) -> Iterator[str]:
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


def _check_inputs(run: Run) -> Iterator[str]:
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
