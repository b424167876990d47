"""The rows that a run set aside: which they are, and how a later try's scores take their place.

They are found by the reasons that the records of score files count; only files with one that is
asked for are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmray import ledger
from mmray.archive import rows
from mmray.errors import Conflict
from mmray.scoring_run import Run
from mmray.targets import Target


def asked(reason: str, reasons: Sequence[str]) -> bool:
    """Whether a reason begins with one of ``reasons``; none: any does."""
    return not reasons or reason.startswith(tuple(reasons))


def counted(record: ledger.ShardRecord, reasons: Sequence[str] = ()) -> dict[str, int]:
    """Rows of a shard set aside, by those of its reasons that are ``asked``."""
    return {reason: n for reason, n in record.reasons.items() if asked(reason, reasons)}


def read(out: str, shard: str, reasons: Sequence[str] = ()) -> pa.Table:
    """``row, key, error, error_stage`` of the rows of one shard that were set aside, in order."""
    columns = [rows.ROW, rows.KEY, rows.ERROR, rows.ERROR_STAGE]
    table = ledger.read_scores(ledger.scores_uri(out, shard), columns)
    return table.filter(pa.array(_mask(table, reasons)))


def _mask(scores: pa.Table, reasons: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which rows of a score file were set aside for one of ``reasons``."""
    errors = scores.column(rows.ERROR)
    mask: npt.NDArray[np.bool_] = pc.is_valid(errors).to_numpy().copy()
    for row in np.flatnonzero(mask) if reasons else ():
        mask[row] = asked(rows.reason(errors[int(row)].as_py()), reasons)
    return mask


def recommit(
    out: str,
    run: Run,
    target: Target,
    parts: str,
    reasons: Sequence[str],
    problem: str | None,
) -> ledger.ShardRecord:
    """Replace the rows of one score file that were set aside for ``reasons`` by those in ``parts``.

    ``parts`` is where they were written, as ``out`` is to ``ledger.write_part``. All other rows
    stay as they are, and so does the whole file when nothing in it changes; else it is replaced by
    one atomic put. Raises Conflict when the parts lack a row.
    """
    path = target.shard.path
    uri = ledger.scores_uri(out, path)
    scores = ledger.read_scores(uri).replace_schema_metadata(None)
    found = [
        ledger.read_scores(ledger.part_uri(parts, path, start, stop))
        for start, stop in ledger.covered_shard(parts, path)
    ]
    tried = pa.concat_tables([scores.schema.empty_table(), *found])
    place = np.full(scores.num_rows, -1)
    place[tried.column(rows.ROW).to_numpy()] = np.arange(tried.num_rows)
    again = _mask(scores, reasons)
    if (place[again] < 0).any():
        raise Conflict(
            f"{parts}: lacks row {np.flatnonzero(again & (place < 0))[0]} of {path}; is another "
            "retry at work here? run the same command again when it has ended"
        )
    source = np.where(again, scores.num_rows + place, np.arange(scores.num_rows))
    merged = pa.concat_tables([scores, tried]).take(pa.array(source)).combine_chunks()
    if merged.equals(scores.combine_chunks()):
        return ledger.read_record(uri)
    return ledger.put_scores(out, run, target, merged, problem)
