"""The rows a training run uses, prepared once, and how every worker sees all of them.

Prepared chunks lie in Ray's object store, one copy a node; workers map them into memory instead of
copying. All rows must therefore fit into it at once: a row costs its pixels.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmray import splits
from mmray.archive import rows
from mmray.archive.shards import Shard
from mmray.config import Columns, Modalities, Preprocess
from mmray.engine.ingest import ReadOptions, chunks_dataset
from mmray.engine.pieces import Piece, Plan
from mmray.engine.scan import (
    LabelledRows,
    by_shard,
    map_chunks,
    pack_table,
    records,
    unpack_table,
)
from mmray.errors import BadRow
from mmray.preprocess import Prepared, Preprocessor, TextTokenizer

if TYPE_CHECKING:
    from mmray.learn import Batch

Ints = npt.NDArray[np.int64]

#: One chunk, prepared. ``aside`` is JSON: [row, stage, error] of the rows that cannot be used.
BLOCK_SCHEMA = pa.schema(
    [
        (rows.SHARD, pa.string()),
        ("total", pa.int64()),
        ("problem", pa.string()),
        ("failure", pa.string()),
        ("train", pa.int64()),
        ("dev", pa.int64()),
        ("aside", pa.string()),
        ("payload", pa.large_binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How rows are prepared: a bundle's preprocessing, small enough to travel with every task."""

    preprocess: Preprocess
    tokenizer: str | None  # tokenizer.json
    modalities: Modalities

    def build(self) -> Preprocessor:
        return _preprocessor(
            self.preprocess.model_dump_json(), self.tokenizer or "", self.modalities
        )


@functools.lru_cache(maxsize=2)  # a worker process prepares many chunks
def _preprocessor(preprocess: str, tokenizer: str, modalities: Modalities) -> Preprocessor:
    cfg = Preprocess.model_validate_json(preprocess)
    made = TextTokenizer.from_json(tokenizer, cfg.text) if tokenizer else None
    return Preprocessor(cfg, made, modalities)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows of a shard to prepare: ``classes`` int32 [rows], the class index or -1 for a row
    that is not used; ``dev`` bool [rows]."""

    classes: npt.NDArray[np.int32]
    dev: npt.NDArray[np.bool_]


def wanted_rows(data: LabelledRows) -> dict[str, Wanted]:
    """Which rows to prepare, by shard."""
    used, dev = (
        mask.to_numpy(zero_copy_only=False)
        for mask in (
            pc.is_valid(data.split.sides),
            pc.fill_null(pc.equal(data.split.sides, splits.DEV), False),
        )
    )
    codes = np.where(used, data.split.labels.codes(data.rows[rows.LABEL]), -1)
    classes = by_shard(data.rows, codes.astype(np.int32))
    devs = by_shard(data.rows, dev)
    return {
        shard: Wanted(codes, devs[shard]) for shard, codes in classes.items() if (codes >= 0).any()
    }


@dataclass(frozen=True, slots=True)
class PreparedSet:
    """All prepared chunks. ``dataset`` keeps the objects behind ``refs`` alive."""

    dataset: Any
    refs: list[Any]
    train: int  # rows
    dev: int
    aside: list[tuple[str, int, str, str]]  # shard, row, stage, error

    def reasons(self) -> dict[str, int]:
        """Rows that cannot be used, by reason."""
        return dict(Counter(rows.reason(error) for _, _, _, error in self.aside).most_common())


def prepare(
    root: str,
    shards: Sequence[Shard],
    wanted: Mapping[str, Wanted],
    recipe: Recipe,
    *,
    columns: Columns,
    readers: int,
    board: Any = None,
) -> PreparedSet:
    """Prepare the wanted rows of an archive into the object store.

    Raises MmrayError when storage refuses.
    """
    dataset = chunks_dataset(
        root,
        Plan(Piece(shard) for shard in shards if shard.path in wanted),
        ReadOptions(columns=columns, images=recipe.modalities != "text"),
        readers=readers,
        cpus=1,
    ).map_batches(
        functools.partial(_prepare, wanted=ray.put(dict(wanted)), recipe=recipe, board=board),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )
    made = dataset.materialize()
    train = dev = 0
    aside = []
    for record in records(made.drop_columns(["payload"])):
        if record["aside"] is not None:
            train, dev = train + record["train"], dev + record["dev"]
            aside += [(record[rows.SHARD], *entry) for entry in json.loads(record["aside"])]
    return PreparedSet(made, made.to_arrow_refs(), train, dev, sorted(aside))


def _prepare(batch: pa.Table, *, wanted: Any, recipe: Recipe, board: Any) -> pa.Table:
    """Chunks -> ``BLOCK_SCHEMA``, a row a row."""

    def prepared(shard: str, samples: list[rows.Sample]) -> dict[str, Any]:
        if board is not None:
            board.add.remote(len(samples))
        return _prepare_chunk(shard, samples, _wanted(wanted)[shard], recipe.build())

    return map_chunks(batch, prepared, BLOCK_SCHEMA)


def _prepare_chunk(
    shard: str, samples: Sequence[rows.Sample], wanted: Wanted, preprocessor: Preprocessor
) -> dict[str, Any]:
    """The wanted samples of a chunk: a packed table, their number a side, those set aside."""
    ready: list[Prepared] = []
    kept: list[int] = []
    aside: list[tuple[int, str, str]] = []
    for sample in samples:
        if wanted.classes[sample.row] < 0:
            continue
        try:
            ready.append(preprocessor.prepare(sample))
            kept.append(sample.row)
        except BadRow as error:
            aside.append((sample.row, error.stage, str(error)))
    dev = wanted.dev[kept]
    counts = {"train": int((~dev).sum()), "dev": int(dev.sum()), "aside": json.dumps(aside)}
    if not kept:
        return counts
    return {**counts, "payload": pack_table(_table(shard, kept, wanted.classes[kept], dev, ready))}


_cached: tuple[Any, dict[str, Wanted]] | None = None


def _wanted(ref: Any) -> dict[str, Wanted]:
    """What ``ref`` holds, fetched once a process."""
    global _cached
    if _cached is None or _cached[0] != ref:
        _cached = (ref, ray.get(ref))
    return _cached[1]


def _table(
    shard: str,
    kept: Sequence[int],
    classes: npt.NDArray[np.int32],
    dev: npt.NDArray[np.bool_],
    ready: Sequence[Prepared],
) -> pa.Table:
    """Rows of one shard; ``pixels`` fixed-size binary, ``tokens`` list<int32>, where there are."""
    columns: dict[str, Any] = {
        rows.SHARD: pa.array([shard] * len(kept), pa.string()),
        rows.ROW: pa.array(kept, pa.int64()),
        "class": pa.array(classes, pa.int32()),
        "dev": pa.array(dev, pa.bool_()),
    }
    pixels = [row.pixels for row in ready if row.pixels is not None]
    tokens = [row.tokens for row in ready if row.tokens is not None]
    if pixels:
        packed = np.stack(pixels)
        kind = pa.binary(packed[0].nbytes)
        columns["pixels"] = pa.FixedSizeBinaryArray.from_buffers(
            kind, len(packed), [None, pa.py_buffer(packed)]
        )
    if tokens:
        ends = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        columns["tokens"] = pa.ListArray.from_arrays(ends, np.concatenate(tokens))
    return pa.table(columns)


# --- a worker's view -----------------------------------------------------------------------------


class PreparedRows:
    """Train or dev rows in order of (shard, row), whatever chunks they came in.

    ``classes``: int64 [N], the class index of each row.
    """

    def __init__(self, blocks: Sequence[pa.Table], *, dev: bool, image_size: int) -> None:
        self._chunks: list[_Chunk] = []
        index: list[pa.Table] = []
        for block in blocks:
            for payload in block["payload"].drop_null():
                table = unpack_table(payload.as_buffer())
                at = np.flatnonzero(table["dev"].to_numpy() == dev)
                own = table.select([rows.SHARD, rows.ROW, "class"]).take(at)
                own = own.append_column("chunk", pa.array(np.full(len(at), len(self._chunks))))
                index.append(own.append_column("at", pa.array(at)))
                self._chunks.append(_Chunk(table, image_size))
        order = [(rows.SHARD, "ascending"), (rows.ROW, "ascending")]
        found = pa.concat_tables(index).sort_by(order)
        self.classes: Ints = found["class"].to_numpy().astype(np.int64)
        self._chunk, self._at = found["chunk"].to_numpy(), found["at"].to_numpy()

    def __len__(self) -> int:
        return len(self.classes)

    def prepared(self, i: int, *, pixels: bool = True, tokens: bool = True) -> Prepared:
        """Row ``i``, or what is asked for of it; its arrays are views of the object store and must
        not be written to."""
        row = self._chunks[self._chunk[i]].prepared(int(self._at[i]))
        return Prepared(row.pixels if pixels else None, row.tokens if tokens else None)

    def batch(self, at: Ints, *, pixels: bool = True, tokens: bool = True) -> Batch:
        """The rows ``at`` (one or more) as a batch on the CPU, with their labels."""
        from mmray.learn import collate

        ready = [self.prepared(i, pixels=pixels, tokens=tokens) for i in at]
        return collate(ready, self.classes[at].tolist())


class _Chunk:
    """Views of one chunk's pixels and tokens."""

    def __init__(self, table: pa.Table, image_size: int) -> None:
        self._pixels = self._tokens = None
        if "pixels" in table.column_names:
            column = table["pixels"].chunk(0)
            flat = np.frombuffer(column.buffers()[1], np.uint8)
            self._pixels = flat.reshape(len(column), 3, image_size, image_size)
        if "tokens" in table.column_names:
            column = table["tokens"].chunk(0)
            self._tokens = column.values.to_numpy()
            self._ends = column.offsets.to_numpy()

    def prepared(self, at: int) -> Prepared:
        pixels = None if self._pixels is None else self._pixels[at]
        tokens = None
        if self._tokens is not None:
            tokens = self._tokens[self._ends[at] : self._ends[at + 1]]
        return Prepared(pixels, tokens)
