"""Count how well a bundle does on the labelled rows of an archive: every row once.

chunks -> actors that hold the Predictor -> one receipt a chunk -> a confusion matrix. Written are
``metrics.json`` and ``predictions.parquet``, a row a row that was looked at.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from mmray import groups, storage
from mmray.archive import rows
from mmray.archive.shards import Shard
from mmray.bundle import Manifest, read_manifest
from mmray.counts import AnswerCounts
from mmray.engine import cluster
from mmray.engine.careful import Careful
from mmray.engine.choice import AUTO, Chosen, choose_rows, held_out, split_data
from mmray.engine.evaluator import (
    CHOSEN,
    OTHER_ROW,
    OTHER_SHARD,
    SPLIT,
    THERE,
    TRUE,
    Asked,
    Evaluator,
    own_caption,
    predictions_schema,
)
from mmray.engine.ingest import ReadOptions, chunks_dataset
from mmray.engine.negatives import Other, other_captions
from mmray.engine.pieces import Piece, Plan
from mmray.engine.placement import place
from mmray.engine.scan import (
    archive_shards,
    check_complete,
    check_field,
    peek,
    records,
    scan,
    unpack_table,
)
from mmray.errors import ConfigError
from mmray.labels import MATCH, MISMATCH, multi_hot
from mmray.report.progress import duration

METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"
SAY_SECONDS = 10.0

Progress = Callable[[str], None]


def evaluate(
    bundle: str,
    archive: str,
    *,
    out: str,
    split: str = AUTO,
    label: str | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Score and count the labelled rows of ``archive``; the content of ``metrics.json``.

    ``split``: a value of the split column the bundle was trained with; ``all``; or ``auto``, the
    rows it was not trained on: its dev value where the archive has that column, the rows held out
    by seed where this is the training archive, else all. ``label``: the column or field of the true
    label, by default that of the training.

    Raises ConfigError, before Ray starts where it can be known, RunError when rows were lost.
    """
    began = time.monotonic()
    bundle, archive = storage.absolute(bundle), storage.absolute(archive)
    manifest = read_manifest(bundle)
    data, match = manifest.training.data, manifest.task == "match"
    label = label or data.label
    shards = archive_shards(archive)
    samples = peek(archive, shards, data.columns)
    if not match:
        check_field(samples, label, "--label")
    if data.negatives_within is not None:
        check_field(samples, data.negatives_within, "data.negatives_within of the bundle")
    wanted = choose_rows(manifest, archive, shards, samples, split)

    resources = cluster.connect()
    others = None
    if wanted.side is not None or match:
        progress(f"reading all rows of {archive}, to tell which are to be counted")
        rows_there = scan(
            archive,
            shards,
            data=split_data(manifest),
            task=manifest.task,
            captions=match,
            readers=max(1, resources.cpus),
        ).rows
        if wanted.side is not None:
            wanted = held_out(wanted, manifest, rows_there)
        if match:
            others = other_captions(
                rows_there,
                wanted.mask(rows_there),
                data=split_data(manifest),
                seed=manifest.training.seed,
            )
    progress(f"evaluating {manifest.fingerprint[:12]} on {archive}: {wanted.text}")
    asked = Asked(manifest.task, label, data, wanted)
    found, problems = _predict(
        bundle, manifest, archive, shards, asked, others, resources, progress
    )
    chosen = found.filter(found[CHOSEN]).drop_columns([CHOSEN])
    metrics = _metrics(chosen, manifest, found, data.split, wanted)
    chosen = chosen.drop_columns([THERE])
    metrics |= {
        "bundle": {"uri": bundle, "fingerprint": manifest.fingerprint},
        "archive": archive,
        "label": None if match else label,
        "problems": problems,
        "seconds": round(time.monotonic() - began, 1),
    }
    sink = io.BytesIO()
    pq.write_table(chosen, sink, compression="zstd")
    storage.write_bytes(storage.join(out, PREDICTIONS), sink.getvalue())
    text = json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(out, METRICS), text.encode())
    return metrics


# --- predictions ---------------------------------------------------------------------------------


def _predict(
    bundle: str,
    manifest: Manifest,
    archive: str,
    shards: Sequence[Shard],
    asked: Asked,
    others: Mapping[str, Mapping[int, Other]] | None,
    resources: cluster.Resources,
    progress: Progress,
) -> tuple[pa.Table, dict[str, str]]:
    """Every row of the archive once, its negative after it, in order of (shard, row), and what is
    wrong with shards."""
    shared = None if others is None else (ray.put(others),)  # as a bare argument Ray would fetch it
    pool = place(resources, decoders=0).scorers
    dataset = chunks_dataset(
        archive,
        Plan(Piece(shard) for shard in shards),
        ReadOptions(
            columns=asked.data.columns,
            fields=asked.fields,
            images=manifest.spec["config"]["modalities"] != "text",
        ),
        readers=pool.most,
    ).map_batches(
        Evaluator,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_constructor_args=(bundle, manifest.fingerprint, asked, shared, Careful()),
        compute=pool.strategy(pieces=len(shards)),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    schema = predictions_schema(manifest.labels, manifest.task).append(pa.field(CHOSEN, pa.bool_()))
    tables = [schema.append(pa.field(THERE, pa.string())).empty_table()]
    totals, problems = {}, {}
    began = said = time.monotonic()
    for record in records(dataset):
        if record["total"] is not None:
            totals[record[rows.SHARD]] = record["total"]
        if record["problem"] is not None:
            problems[record[rows.SHARD]] = record["problem"]
        if record["payload"] is not None:
            tables.append(unpack_table(record["payload"]))
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            done = sum(table.num_rows for table in tables)
            left = (len(shards) - len(totals)) * (said - began) / max(1, len(totals))
            eta = duration(left) if totals else "?"
            progress(
                f"rows {done:,}  shards {len(totals):,}/{len(shards):,}  "
                f"{done / (said - began):,.0f} rows/s  ETA {eta}"
            )
    together = pa.concat_tables(tables)
    check_complete(together.filter(own_caption(together)), totals, shards)
    order = [(rows.SHARD, "ascending"), (rows.ROW, "ascending"), (TRUE, "ascending")]
    return together.sort_by(order), problems


# --- counts --------------------------------------------------------------------------------------


def _metrics(
    chosen: pa.Table, manifest: Manifest, found: pa.Table, column: str | None, wanted: Chosen
) -> dict[str, Any]:
    """Counts over the chosen rows, and over those with both picture and caption, or one of them, by
    themselves (``availability``) where there is more than one kind. Raises ConfigError when no row
    can be counted."""
    counts = _count(chosen, manifest)
    kinds = sorted(chosen[THERE].drop_null().unique().to_pylist())
    parts = {kind: _count(chosen.filter(pc.equal(chosen[THERE], kind)), manifest) for kind in kinds}
    parts = {kind: part for kind, part in parts.items() if part.rows}
    chosen, found = (table.filter(own_caption(table)) for table in (chosen, found))
    errors = Counter(rows.reason(error) for error in chosen[rows.ERROR].drop_null().to_pylist())
    unknown = _unknown_labels(chosen[TRUE], manifest)
    no_label = pc.and_(pc.is_null(chosen[TRUE]), pc.is_null(chosen[rows.ERROR]))
    if not counts.rows:
        values = Counter(found[SPLIT].drop_null().to_pylist()).most_common(8)
        listed = ", ".join(f"{value} ({n:,})" for value, n in values) or "none"
        seen = ", ".join(f"{label} ({n:,})" for label, n in unknown.items()) or "none"
        raise ConfigError(
            f"--split: no row to count among {wanted.text}: {chosen.num_rows:,} rows, "
            f"{sum(errors.values()):,} of them set aside, labels that the bundle does not know: "
            f"{seen}; values of {column}: {listed}"
        )
    metrics = {
        **counts.report(),
        **({"availability": {n: c.report() for n, c in parts.items()}} if len(parts) > 1 else {}),
        "split": wanted.text,
        "rows_read": found.num_rows,
        "rows_chosen": chosen.num_rows,
        "set_aside": dict(errors.most_common()),
        "unlabelled": int(pc.sum(no_label).as_py() or 0),
        "unknown_labels": unknown,
    }
    if manifest.task == "match":
        support = {name: of["support"] for name, of in metrics["per_class"].items()}
        metrics["without_negative"] = support[MATCH] - support[MISMATCH]
    return metrics


def _count(chosen: pa.Table, manifest: Manifest) -> AnswerCounts:
    """The rows that have scores and a label that is known; a negative whose caption is of a row
    that was set aside is left out, as it is in training."""
    scored = groups.to_numpy(pc.and_(pc.is_valid(chosen[rows.LABEL]), pc.is_valid(chosen[TRUE])))
    if manifest.task == "match":
        broken = chosen.filter(pc.is_valid(chosen[rows.ERROR])).select([rows.SHARD, rows.ROW])
        aside = set(zip(*(column.to_pylist() for column in broken.columns), strict=True))
        shown = zip(chosen[OTHER_SHARD].to_pylist(), chosen[OTHER_ROW].to_pylist(), strict=True)
        scored = scored & np.array([name not in aside for name in shown], dtype=bool)
    counted = chosen.filter(pa.array(scored))
    true: npt.NDArray[Any]
    if manifest.task == "multilabel":
        separator = manifest.training.data.label_separator
        true = multi_hot(counted[TRUE].to_pylist(), manifest.labels, separator)
    else:
        labels = pa.array(manifest.labels, pa.string())
        true = groups.to_numpy(pc.index_in(counted[TRUE], labels))
    names = rows.probability_columns(manifest.labels)
    counts = AnswerCounts(manifest.labels, manifest.task)
    counts.add(true, np.stack([groups.to_numpy(counted[name]) for name in names], axis=1))
    return counts


def _unknown_labels(true: pa.ChunkedArray, manifest: Manifest) -> dict[str, int]:
    """True labels that the bundle does not have, and how many rows have each."""
    there: Counter[str] = Counter()
    for text, n in Counter(true.drop_null().to_pylist()).items():
        several = manifest.task == "multilabel"
        names = text.split(manifest.training.data.label_separator) if several else [text]
        there.update(dict.fromkeys(names, n))
    return {name: there[name] for name in sorted(there) if name and name not in manifest.labels}
