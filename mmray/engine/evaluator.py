"""The actor of an evaluation: a chunk in, its rows with scores and true labels out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmray.archive import rows
from mmray.config import Data, Task
from mmray.engine.careful import Careful
from mmray.engine.choice import Chosen
from mmray.engine.negatives import Other
from mmray.engine.scan import map_chunks, pack_table
from mmray.errors import MmrayError
from mmray.labels import MISMATCH, label_text, read_label
from mmray.preprocess import Prepared

TRUE, SPLIT, CHOSEN, THERE = "true_label", "split", "chosen", "there"
OTHER_SHARD, OTHER_ROW = "caption_shard", "caption_row"  # null: its own caption

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


def predictions_schema(labels: Sequence[str], task: Task = "classify") -> pa.Schema:
    """Of predictions.parquet: a score file's columns, then the true label and the split value of
    each row; for ``match``, too, which other row's caption it was shown with. Rows that were not
    asked for have neither scores nor an error."""
    scores = rows.scores_schema(labels)
    schema = scores.append(pa.field(TRUE, pa.string())).append(pa.field(SPLIT, pa.string()))
    if task != "match":
        return schema
    return schema.append(pa.field(OTHER_SHARD, pa.string())).append(pa.field(OTHER_ROW, pa.int64()))


def own_caption(table: pa.Table) -> pa.ChunkedArray:
    """bool [rows]: not a negative."""
    if OTHER_SHARD in table.column_names:
        return pc.is_null(table[OTHER_SHARD])
    return pc.is_valid(table[rows.SHARD])


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be counted: the task, the column of the true label, and which rows."""

    task: Task
    label: str
    data: Data
    wanted: Chosen

    @property
    def fields(self) -> tuple[str, ...]:
        names = (None if self.task == "match" else self.label, self.data.split)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def true_label(self, sample: rows.Sample) -> str | None:
        return read_label(sample.fields.get(self.label), self.task, self.data.label_separator)

    def split_value(self, sample: rows.Sample) -> str | None:
        column = self.data.split
        return None if column is None else label_text(sample.fields.get(column))


class Evaluator:
    """An actor with one Predictor: a chunk in, its rows with scores and true labels out.

    ``others``: for ``match``, in a tuple the reference of what ``other_captions`` gave; a row then
    comes out with its own caption and, where it has a negative, once more with the other one.
    """

    def __init__(
        self,
        bundle: str,
        fingerprint: str,
        asked: Asked,
        others: tuple[Any] | None,
        careful: Careful,
    ) -> None:
        import torch

        from mmray.bundle import load
        from mmray.predict import Predictor

        torch.set_num_threads(1)
        self._asked, self._careful = asked, careful
        self._others = {} if others is None else ray.get(others[0])
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
        """``predictions_schema`` whether each row was chosen and what of its pair the model was
        given; all samples in order, then the negatives."""
        asked, labels = self._asked, self._predictor.labels
        true = [asked.true_label(sample) for sample in samples]
        chosen = [asked.wanted.takes(sample) for sample in samples]
        shown: list[Other | None] = [None] * len(samples)
        if self._others:
            samples = list(samples)
            for sample in list(samples):
                other = self._others.get(sample.shard, {}).get(sample.row)
                if other is not None:
                    samples.append(replace(sample, caption=other.caption))
                    true.append(MISMATCH)
                    chosen.append(True)
                    shown.append(other)
        known = [t is not None and (asked.task == "multilabel" or t in labels) for t in true]
        at = [
            i
            for i, sample in enumerate(samples)
            if chosen[i] and (known[i] or sample.error is not None)
        ]
        preprocessor = self._predictor.preprocessor
        left, prepared = self._careful.prepare_all(preprocessor, [samples[i] for i in at])
        scored = self._predictor.score(left, prepared).table
        place = dict(zip(at, range(len(at)), strict=True))
        there = {i: _there(pair) for i, pair in zip(at, prepared, strict=True) if pair is not None}
        table = scored.take(pa.array([place.get(i) for i in range(len(samples))], pa.int64()))
        schema = predictions_schema(labels, asked.task)
        own = {
            rows.SHARD: [sample.shard for sample in samples],
            rows.ROW: [sample.row for sample in samples],
            rows.KEY: [sample.key for sample in samples],
            TRUE: true,
            SPLIT: [asked.split_value(sample) for sample in samples],
            OTHER_SHARD: [other and other.shard for other in shown],
            OTHER_ROW: [None if other is None else other.row for other in shown],
        }
        columns = [
            pa.array(own[field.name], field.type) if field.name in own else table[field.name]
            for field in schema
        ]
        made = pa.Table.from_arrays(columns, schema=schema)
        given = pa.array([there.get(i) for i in range(len(samples))], pa.string())
        return made.append_column(CHOSEN, pa.array(chosen, pa.bool_())).append_column(THERE, given)


def _there(pair: Prepared) -> str:
    if pair.pixels is not None and pair.tokens is not None:
        return "both"
    return "caption only" if pair.pixels is None else "picture only"
