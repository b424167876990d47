"""Golden pairs: what a bundle's model must score, so that whoever loads it can check that it does.

A golden table has a chunk's columns, then ``p_<label>``. ``error`` and ``error_stage`` are the
outcome: null where the pair must be scored, else why it must be set aside. Its metadata says how
far a probability may be off (``tolerance``), and which labels are in ``doubt`` in less than
float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from mmray import doubt
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.errors import BundleError

ROWS = 16
IMAGE_BYTES = 256 * 1024  # larger pictures are golden only where all are larger

#: The tolerance is ``NOISE`` times what bfloat16 alone does to the golden scores, within bounds.
#: Largest difference on 16 pairs, small models trained on tweets: a convolutional net 0.003 by
#: bfloat16, 0.03 by another resize, 0.38 by another normalisation, 0.40 by another text cleaning; a
#: MobileNetV2 0.021 by bfloat16, 0.12 by another resize, 0.14 by another normalisation, 0.29 by
#: another text cleaning.
NOISE, LEAST, MOST = 3.0, 0.01, 0.1
TOLERANCE, DOUBT = b"tolerance", b"doubt"


def schema(labels: Sequence[str]) -> pa.Schema:
    """Of a golden table: the columns of a chunk, then float32 ``p_<label>``."""
    outcome = [pa.field(name, pa.float32()) for name in rows.probability_columns(labels)]
    return pa.schema([*rows.CHUNK_SCHEMA, *outcome])


def candidates(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that may become golden: those that were read, without their further fields."""
    sound = [replace(sample, fields={}) for sample in samples if sample.error is None]
    small = [sample for sample in sound if len(sample.image or b"") <= IMAGE_BYTES]
    return small or sound


def choose(
    samples: Sequence[Sample],
    scores: pa.Table,
    labels: Sequence[str],
    limit: int = ROWS,
    *,
    several: bool = False,
) -> pa.Table:
    """Some of ``samples`` with their ``scores``: half of them the least certain of every predicted
    label in turn, the rest spread over all, and, if there are any, one that must be set aside, one
    that is scored without a picture and one without a caption.

    A sure answer stays sure under many a wrong preprocessing; a doubtful one moves. ``several``
    labels may be given to a row, each by itself. Raises BundleError when no sample is scored.
    """
    names = rows.probability_columns(labels)
    found = scores.to_pylist()
    scored = [i for i, row in enumerate(found) if row[rows.ERROR] is None]
    if not scored:
        why = found[0][rows.ERROR] if found else "there are none"
        raise BundleError(f"no golden pairs: none of {len(found)} samples can be scored: {why}")
    aside = [i for i, row in enumerate(found) if row[rows.ERROR_STAGE] in ("image", "caption")][:1]
    incomplete = _incomplete(samples, scored)
    scored = [i for i in scored if i not in incomplete]
    room = max(1, limit - len(aside) - len(incomplete))
    doubtful = _doubtful([(i, found[i]) for i in scored], names, several)[: (room + 1) // 2]
    rest = [i for i in scored if i not in doubtful]
    wanted = min(room - len(doubtful), len(rest))
    spread = [rest[k * len(rest) // wanted] for k in range(wanted)]
    chosen = sorted(doubtful + spread + aside + incomplete)
    golden = rows.to_table([samples[i] for i in chosen])
    columns = dict(zip(golden.column_names, golden.columns, strict=True))
    columns |= {name: scores[name].take(chosen) for name in (rows.ERROR, rows.ERROR_STAGE, *names)}
    return pa.table(columns, schema=schema(labels))


def _incomplete(samples: Sequence[Sample], scored: Sequence[int]) -> list[int]:
    """Positions of the first scored that has no picture, and of the first that has no caption."""
    found: dict[str, int] = {}
    for i in scored:
        if samples[i].image is None:
            found.setdefault(rows.IMAGE, i)
        elif not (samples[i].caption or "").strip():
            found.setdefault(rows.CAPTION, i)
    return list(found.values())


def with_tolerance(golden: pa.Table, rough: pa.Table, labels: Sequence[str]) -> pa.Table:
    """``golden`` with the tolerance that follows from ``rough``, its scores in bfloat16."""
    names = rows.probability_columns(labels)
    pairs = zip(golden.to_pylist(), rough.to_pylist(), strict=True)
    noise = max(difference(must, got, names) for must, got in pairs)
    allowed = min(MOST, max(LEAST, NOISE * noise))
    return _noted(golden, TOLERANCE, allowed)


def with_doubt(
    golden: pa.Table, exact: pa.Table, rough: pa.Table, labels: Sequence[str], *, several: bool
) -> pa.Table:
    """``golden`` with the ``doubt.limit`` of a precision that makes ``rough`` of the scores of some
    rows that are ``exact`` in float32."""
    both = (rows.probabilities(table, labels) for table in (exact, rough))
    return _noted(golden, DOUBT, doubt.limit(*both, several=several))


def _noted(golden: pa.Table, name: bytes, value: float) -> pa.Table:
    return golden.replace_schema_metadata(
        {**(golden.schema.metadata or {}), name: f"{value:.4g}".encode()}
    )


def _doubtful(
    found: Sequence[tuple[int, Mapping[str, Any]]], names: Sequence[str], several: bool
) -> list[int]:
    """Positions by rising certainty, the predicted labels taking turns."""
    by_label: dict[str, list[tuple[float, int]]] = {}
    for i, row in found:
        scores = [row[name] for name in names]
        certainty = min(abs(p - 0.5) for p in scores) if several else max(scores)
        by_label.setdefault(row[rows.LABEL], []).append((certainty, i))
    turns: list[tuple[int, float, int]] = []
    for mine in by_label.values():
        turns += [(turn, certainty, i) for turn, (certainty, i) in enumerate(sorted(mine))]
    return [i for *_, i in sorted(turns)]


def tolerance(golden: pa.Table) -> float:
    """The largest difference of probabilities that ``golden`` allows."""
    return float(golden.schema.metadata[TOLERANCE])


def doubt_limit(golden: pa.Table | None) -> float:
    """The ``doubt.limit`` of the precision the bundle computes in; 0 where it has none."""
    noted = (golden.schema.metadata if golden is not None else None) or {}
    return float(noted.get(DOUBT, 0.0))


def inputs(golden: pa.Table) -> list[Sample]:
    """The samples of a golden table, as they come from an archive."""
    samples = rows.from_table(golden.select(rows.CHUNK_SCHEMA.names))
    return [replace(sample, error=None, error_stage=None) for sample in samples]


def compare(golden: pa.Table, scores: pa.Table, labels: Sequence[str]) -> float:
    """The largest difference between probabilities and what they must be.

    Raises BundleError, naming the first pair, when any differs by more than the tolerance, or is
    set aside where it must be scored, or the other way round, or for another reason.
    """
    allowed = tolerance(golden)
    names = rows.probability_columns(labels)
    pairs = list(zip(golden.to_pylist(), scores.to_pylist(), strict=True))
    differences = [difference(must, got, names) for must, got in pairs]
    off = [pair for pair, d in zip(pairs, differences, strict=True) if not d <= allowed]
    if off:
        must, got = off[0]
        raise BundleError(
            f"golden pair {must[rows.SHARD]} row {must[rows.ROW]} must give "
            f"{outcome(must, names)}; it gives {outcome(got, names)}; "
            f"{len(off)} of {len(pairs)} golden pairs differ by more than {allowed:g}"
        )
    return max(differences)


def difference(must: Mapping[str, Any], got: Mapping[str, Any], names: Sequence[str]) -> float:
    """Between two rows' probabilities the largest difference; infinite where only one is set aside,
    or both are for different reasons."""
    if must[rows.ERROR] is None and got[rows.ERROR] is None:
        return float(max(abs(must[name] - got[name]) for name in names))
    return 0.0 if _why(must) == _why(got) else math.inf


def _why(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    error = row[rows.ERROR]
    return row[rows.ERROR_STAGE], None if error is None else rows.reason(error)


def outcome(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """A row's scores, or its error, for a message."""
    if row[rows.ERROR] is not None:
        return f"the error {row[rows.ERROR]!r}"
    return ", ".join(f"{name} {row[name]:.3f}" for name in names)
