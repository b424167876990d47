"""Decoding beside the scoring actors: a chunk of samples in, the same chunk prepared out.

What it adds to a chunk is the column ``PREPARED``; the pictures' bytes stay behind. A row that
cannot be used carries its reason in the sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from mmray.archive import rows
from mmray.engine import guard, ingest, pace
from mmray.errors import MmrayError
from mmray.preprocess import Prepared, Preprocessor

PREPARED = "prepared"
SECONDS = "decode_s"
_ROW = pa.struct([("pixels", pa.large_binary()), ("tokens", pa.list_(pa.int32()))])
DECODED_SCHEMA = pa.schema(
    [*ingest.CHUNKS_SCHEMA, (PREPARED, pa.large_list(_ROW)), (SECONDS, pa.float64())]
)


class Preparer:
    """What prepares rows in an actor: under an alarm; guarded where the actor has a witness, as
    then a row may kill."""

    def __init__(
        self, preprocessor: Preprocessor, limits: tuple[float, int], guarded: bool
    ) -> None:
        self._seconds, max_pixels = limits
        self._preprocessor = preprocessor.allowing(max_pixels)
        self._guard = guard.Guard(self._preprocessor, self._seconds) if guarded else None

    def __call__(self, samples: Sequence[rows.Sample]) -> guard.Ready:
        if self._guard is not None:
            return self._guard.prepare_all(samples)
        return guard.prepare_alarmed(self._preprocessor, samples, self._seconds)


class Decoder:
    """Prepares what a Scorer will score; ``limits`` and ``witness`` as there."""

    def __init__(self, bundle: str, limits: tuple[float, int], witness: Any = None) -> None:
        import torch

        from mmray.bundle import load

        torch.set_num_threads(1)
        guard.limit_memory()
        pace.share()
        self._witness = witness
        self._refusal: str | None = None
        try:
            preprocessor = load(bundle).build_preprocessor()
            self._prepare = Preparer(preprocessor, limits, guarded=witness is not None)
        except MmrayError as error:
            self._refusal = str(error)  # travels as a row, as a Scorer's does

    def __call__(self, batch: pa.Table) -> pa.Table:
        tables = [self._table(*chunk) for chunk in ingest.chunks_of(batch)]
        return pa.concat_tables(tables)

    def _table(self, record: dict[str, Any], samples: list[rows.Sample] | None) -> pa.Table:
        began = time.perf_counter()
        record["failure"] = record["failure"] or self._refusal
        record["retries"] = ingest.counted(record["retries"])
        columns = {f.name: pa.array([record.get(f.name)], f.type) for f in DECODED_SCHEMA}
        if samples is not None and self._refusal is None:
            if self._witness is not None:
                chunk = record["shard"], record["start"], record["stop"]
                ray.get(self._witness.begin.remote(*chunk))
            left, prepared = self._prepare(samples)
            bare = rows.to_table([replace(sample, image=None) for sample in left])
            columns["samples"] = ingest.one_list(*bare.to_struct_array().chunks)
            columns[PREPARED] = ingest.one_list(_packed(prepared))
            columns[SECONDS] = pa.array([time.perf_counter() - began])
        return pa.table(columns, schema=DECODED_SCHEMA)


def _packed(prepared: Sequence[Prepared | None]) -> pa.StructArray:
    pixels = [
        None if p is None or p.pixels is None else p.pixels.transpose(1, 2, 0).tobytes()
        for p in prepared
    ]
    tokens = [None if p is None else p.tokens for p in prepared]
    arrays = [pa.array(pixels, pa.large_binary()), pa.array(tokens, pa.list_(pa.int32()))]
    mask = pa.array([p is None for p in prepared])
    return pa.StructArray.from_arrays(arrays, fields=list(_ROW), mask=mask)


def prepared_rows(batch: pa.Table) -> Iterator[tuple[list[Prepared | None] | None, float]]:
    """Of every row of a batch that a Decoder has made: what is prepared, None for no chunk, and
    the seconds that took. Pixels are views of the batch."""
    for chunk, seconds in zip(batch[PREPARED], batch[SECONDS], strict=True):
        yield _unpacked(chunk.values) if chunk.is_valid else None, seconds.as_py() or 0.0


def _unpacked(packed: pa.StructArray) -> list[Prepared | None]:
    found: list[Prepared | None] = []
    for row in packed:
        if not row.is_valid:
            found.append(None)
            continue
        pixels, tokens = None, row["tokens"].values
        if row["pixels"].is_valid:
            flat = np.frombuffer(row["pixels"].as_buffer(), np.uint8)
            side = math.isqrt(len(flat) // 3)
            pixels = flat.reshape(side, side, 3).transpose(2, 0, 1)
        found.append(Prepared(pixels, None if tokens is None else tokens.to_numpy()))
    return found
