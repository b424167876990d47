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

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray import splits, storage
from mmray.archive import rows
from mmray.archive.shards import Shard
from mmray.bundle import Manifest, read_manifest
from mmray.engine import cluster
from mmray.engine.choice import AUTO, Chosen, choose_rows, held_out
from mmray.engine.ingest import ReadOptions, chunks_dataset
from mmray.engine.pieces import Piece, Plan
from mmray.engine.placement import place
from mmray.engine.scan import (
    archive_shards,
    check_complete,
    check_label,
    map_chunks,
    pack_table,
    peek,
    records,
    unpack_table,
)
from mmray.errors import ConfigError, MmrayError
from mmray.metrics import Confusion
from mmray.report.progress import duration

METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"
SAY_SECONDS = 10.0
TRUE, SPLIT, CHOSEN = "true_label", "split", "chosen"

Progress = Callable[[str], None]

#: What an actor gives for each chunk; ``payload`` is a packed table of ``predictions_schema``.
RECEIPT_SCHEMA = pa.schema(
    [
        (rows.SHARD, pa.string()),
        ("total", pa.int64()),
        ("problem", pa.string()),
        ("failure", pa.string()),
        ("payload", pa.large_binary()),
    ]
)


def predictions_schema(labels: Sequence[str]) -> pa.Schema:
    """Of predictions.parquet: a score file's columns, then the true label and the split value of
    each row. Rows that were not asked for have neither scores nor an error."""
    scores = rows.scores_schema(labels)
    return scores.append(pa.field(TRUE, pa.string())).append(pa.field(SPLIT, pa.string()))


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
    data = manifest.training.data
    label = label or data.label
    shards = archive_shards(archive)
    samples = peek(archive, shards, data.columns)
    check_label(samples, label, "--label")
    wanted = choose_rows(manifest, archive, shards, samples, split)

    resources = cluster.connect()
    if wanted.side is not None:
        progress(f"finding the rows of {archive} that were held out by seed")
        wanted = held_out(wanted, manifest, archive, shards, readers=max(1, resources.cpus))
    progress(f"evaluating {manifest.fingerprint[:12]} on {archive}: {wanted.text}")
    found, problems = _predict(
        bundle, manifest, archive, shards, label, wanted, resources, progress
    )
    chosen = found.filter(found[CHOSEN]).drop_columns([CHOSEN])
    metrics = _metrics(chosen, manifest, found, data.split, wanted)
    metrics |= {
        "bundle": {"uri": bundle, "fingerprint": manifest.fingerprint},
        "archive": archive,
        "label": label,
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


class _Evaluator:
    """An actor with one Predictor: a chunk in, its rows with scores and true labels out."""

    def __init__(
        self, bundle: str, fingerprint: str, label: str, column: str | None, wanted: Chosen
    ) -> None:
        import torch

        from mmray.bundle import load
        from mmray.predict import Predictor

        torch.set_num_threads(1)
        self._label, self._column, self._wanted = label, column, wanted
        self._refusal: str | None = None
        try:
            loaded = load(bundle)
            if loaded.fingerprint != fingerprint:
                raise MmrayError(f"{bundle}: changed since the evaluation began; run it again")
            self._predictor = Predictor(loaded)
            self._predictor.check_golden()
        except MmrayError as error:
            # Raised here it would reach the driver as a dead actor.
            self._refusal = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return map_chunks(batch, self._receipt, RECEIPT_SCHEMA)

    def _receipt(self, _: str, samples: list[rows.Sample]) -> dict[str, Any]:
        if self._refusal is not None:
            raise MmrayError(self._refusal)
        return {"payload": pack_table(self._predict(samples))}

    def _predict(self, samples: Sequence[rows.Sample]) -> pa.Table:
        """``predictions_schema`` and whether each row was chosen, all samples in order."""
        labels = self._predictor.labels
        true = [splits.label_text(sample.fields.get(self._label)) for sample in samples]
        chosen = [self._wanted.takes(sample) for sample in samples]
        at = [
            i
            for i, sample in enumerate(samples)
            if chosen[i] and (true[i] in labels or sample.error is not None)
        ]
        scored = self._predictor.score_table([samples[i] for i in at])
        place = dict(zip(at, range(len(at)), strict=True))
        table = scored.take(pa.array([place.get(i) for i in range(len(samples))], pa.int64()))
        schema = predictions_schema(labels)
        own = {
            rows.SHARD: [sample.shard for sample in samples],
            rows.ROW: [sample.row for sample in samples],
            rows.KEY: [sample.key for sample in samples],
            TRUE: true,
            SPLIT: [
                None if self._column is None else splits.label_text(s.fields.get(self._column))
                for s in samples
            ],
        }
        columns = [
            pa.array(own[field.name], field.type) if field.name in own else table[field.name]
            for field in schema
        ]
        made = pa.Table.from_arrays(columns, schema=schema)
        return made.append_column(CHOSEN, pa.array(chosen, pa.bool_()))


def _predict(
    bundle: str,
    manifest: Manifest,
    archive: str,
    shards: Sequence[Shard],
    label: str,
    wanted: Chosen,
    resources: cluster.Resources,
    progress: Progress,
) -> tuple[pa.Table, dict[str, str]]:
    """Every row of the archive once, in order of (shard, row), and what is wrong with shards."""
    data = manifest.training.data
    fields = tuple(name for name in dict.fromkeys((label, data.split)) if name is not None)
    pool = place(resources, decoders=0).scorers
    dataset = chunks_dataset(
        archive,
        Plan(Piece(shard) for shard in shards),
        ReadOptions(
            columns=data.columns,
            fields=fields,
            images=manifest.spec["config"]["modalities"] != "text",
        ),
        readers=pool.most,
    ).map_batches(
        _Evaluator,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_constructor_args=(bundle, manifest.fingerprint, label, data.split, wanted),
        compute=pool.strategy(pieces=len(shards)),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    empty = predictions_schema(manifest.labels).append(pa.field(CHOSEN, pa.bool_())).empty_table()
    tables, totals, problems = [empty], {}, {}
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
    check_complete(together, totals, shards)
    order = [(rows.SHARD, "ascending"), (rows.ROW, "ascending")]
    return together.sort_by(order), problems


# --- counts --------------------------------------------------------------------------------------


def _metrics(
    chosen: pa.Table, manifest: Manifest, found: pa.Table, column: str | None, wanted: Chosen
) -> dict[str, Any]:
    """Counts over the chosen rows. Raises ConfigError when none of them can be counted."""
    labels = pa.array(manifest.labels, pa.string())
    true, predicted = (
        pc.fill_null(pc.index_in(chosen[name], labels), -1).to_numpy()
        for name in (TRUE, rows.LABEL)
    )
    counted = (true >= 0) & (predicted >= 0)
    confusion = Confusion(manifest.labels)
    confusion.add(true[counted], predicted[counted])
    errors = Counter(rows.reason(error) for error in chosen[rows.ERROR].drop_null().to_pylist())
    there = Counter(chosen[TRUE].to_pylist())
    unknown = {n: there[n] for n in sorted(n for n in there if n and n not in manifest.labels)}
    no_label = pc.and_(pc.is_null(chosen[TRUE]), pc.is_null(chosen[rows.ERROR]))
    if not counted.any():
        values = Counter(found[SPLIT].drop_null().to_pylist()).most_common(8)
        listed = ", ".join(f"{value} ({n:,})" for value, n in values) or "none"
        seen = ", ".join(f"{label} ({n:,})" for label, n in unknown.items()) or "none"
        raise ConfigError(
            f"--split: no row to count among {wanted.text}: {chosen.num_rows:,} rows, "
            f"{sum(errors.values()):,} of them set aside, labels that the bundle does not know: "
            f"{seen}; values of {column}: {listed}"
        )
    return {
        **confusion.report(),
        "split": wanted.text,
        "rows_read": found.num_rows,
        "rows_chosen": chosen.num_rows,
        "set_aside": dict(errors.most_common()),
        "unlabelled": int(pc.sum(no_label).as_py() or 0),
        "unknown_labels": unknown,
    }


def table(metrics: Mapping[str, Any]) -> str:
    """A report, of an evaluation or of a bundle's dev rows, as text for a person."""
    low, high = metrics["accuracy_interval"]
    lines = [
        f"{metrics['rows']:,} rows  accuracy {metrics['accuracy']:.4f} (95 % {low:.3f} to "
        f"{high:.3f})  macro-F1 {metrics['macro_f1']:.4f}  weighted-F1 {metrics['weighted_f1']:.4f}"
    ]
    labels = metrics["labels"]
    width = max(len("label"), *map(len, labels))
    cell = max(9, *map(len, labels))
    head = ("precision", "recall", "F1", "rows")
    lines.append(f"{'label':<{width}}" + "".join(f"  {name:>9}" for name in head) + "  predicted:")
    lines[-1] += "".join(f"  {label:>{cell}}" for label in labels)
    for label, counts in zip(labels, metrics["confusion"], strict=True):
        of = metrics["per_class"][label]
        numbers = "".join(f"  {of[name]:>9.4f}" for name in ("precision", "recall", "f1"))
        predicted = "".join(f"  {n:>{cell},}" for n in counts)
        lines.append(f"{label:<{width}}{numbers}  {of['support']:>9,}            {predicted}")
    notes = [f"set aside, {reason}: {n:,}" for reason, n in metrics.get("set_aside", {}).items()]
    notes += [
        f"label unknown to the bundle, {name}: {n:,}"
        for name, n in metrics.get("unknown_labels", {}).items()
    ]
    if metrics.get("unlabelled"):
        notes.append(f"unlabelled: {metrics['unlabelled']:,}")
    return "\n".join(lines + notes)
