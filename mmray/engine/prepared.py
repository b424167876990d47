"""The rows a training run uses, prepared once, and how every worker sees all of them.

Prepared chunks lie in Ray's object store, one copy a node; workers map them into memory instead of
copying. A row costs its pixels: where those of all rows do not fit, only the rest is kept, and
``feed`` prepares the chunks again as they are needed.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from mmray.engine.careful import Careful
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
from mmray.engine.units import together
from mmray.engine.windows import Ints
from mmray.preprocess import Prepared, Preprocessor, TextTokenizer

if TYPE_CHECKING:
    from mmray.learn import Batch

Mask = npt.NDArray[np.bool_]
PIXELS = "pixels"

#: One chunk, prepared; it begins at ``byte`` of its tar, 0 where it cannot be entered there.
#: ``aside`` is JSON: [row, stage, error] of the rows that cannot be used; ``no_image`` and
#: ``no_text`` count training rows that lack it.
BLOCK_SCHEMA = pa.schema(
    [
        (rows.SHARD, pa.string()),
        *((name, pa.int64()) for name in ("start", "stop", "byte", "total")),
        ("problem", pa.string()),
        ("failure", pa.string()),
        *((name, pa.int64()) for name in ("train", "dev", "no_image", "no_text")),
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
    missing: bool = False  # as a Preprocessor's

    def build(self) -> Preprocessor:
        return _preprocessor(
            self.preprocess.model_dump_json(), self.tokenizer or "", self.modalities, self.missing
        )


@functools.lru_cache(maxsize=2)  # a worker process prepares many chunks
def _preprocessor(
    preprocess: str, tokenizer: str, modalities: Modalities, missing: bool
) -> Preprocessor:
    cfg = Preprocess.model_validate_json(preprocess)
    made = TextTokenizer.from_json(tokenizer, cfg.text) if tokenizer else None
    return Preprocessor(cfg, made, modalities, missing)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows of a shard to prepare: ``classes`` int32 [rows], the index of the class or set of
    labels, or -1 for a row that is not used; ``dev`` bool [rows]."""

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
    """All prepared chunks. ``dataset`` keeps the objects behind ``refs`` alive; ``chunks`` are
    their records, without the rows."""

    dataset: Any
    refs: list[Any]
    train: int  # rows
    dev: int
    aside: list[tuple[str, int, str, str]]  # shard, row, stage, error
    chunks: list[dict[str, Any]]

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
    keep_pixels: bool,
    board: Any = None,
) -> PreparedSet:
    """Prepare the wanted rows of an archive into the object store; without ``keep_pixels`` their
    pixels are made, to know that they can be, and dropped.

    Raises MmrayError when storage refuses.
    """
    dataset = chunks_dataset(
        root,
        Plan(Piece(shard) for shard in shards if shard.path in wanted),
        ReadOptions(columns=columns, images=recipe.modalities != "text"),
        readers=readers,
        cpus=1,
    ).map_batches(
        functools.partial(
            _prepare,
            wanted=ray.put(dict(wanted)),
            recipe=recipe,
            careful=Careful(),
            keep_pixels=keep_pixels,
            board=board,
        ),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )
    made = dataset.materialize()
    train = dev = 0
    aside, chunks = [], []
    for record in records(made.drop_columns(["payload"])):
        if record["aside"] is not None:
            train, dev = train + record["train"], dev + record["dev"]
            aside += [(record[rows.SHARD], *entry) for entry in json.loads(record["aside"])]
            chunks.append(record)
    return PreparedSet(made, made.to_arrow_refs(), train, dev, sorted(aside), chunks)


def _prepare(
    batch: pa.Table, *, wanted: Any, recipe: Recipe, careful: Careful, keep_pixels: bool, board: Any
) -> pa.Table:
    """Chunks -> ``BLOCK_SCHEMA``, a row a row."""

    def prepared(shard: str, samples: list[rows.Sample]) -> dict[str, Any]:
        if board is not None:
            board.add.remote(len(samples))
        ours = wanted_in(wanted)[shard]
        return prepare_chunk(shard, samples, ours, recipe.build(), careful, keep_pixels=keep_pixels)

    return map_chunks(batch, prepared, BLOCK_SCHEMA)


def prepare_chunk(
    shard: str,
    samples: Sequence[rows.Sample],
    wanted: Wanted,
    preprocessor: Preprocessor,
    careful: Careful | None = None,
    *,
    keep_pixels: bool = True,
) -> dict[str, Any]:
    """The wanted samples of a chunk: a packed table, their number a side, those set aside. Without
    ``careful`` they are known to do no harm."""
    ours = [sample for sample in samples if wanted.classes[sample.row] >= 0]
    if careful is None:
        left, prepared = preprocessor.prepare_all(ours)
    else:
        left, prepared = careful.prepare_all(preprocessor, ours)
    ready = [row for row in prepared if row is not None]
    kept = [sample.row for sample in left if sample.error is None]
    aside = [(s.row, s.error_stage, s.error) for s in left if s.error is not None]
    dev = wanted.dev[kept]
    train = [row for row, held_out in zip(ready, dev, strict=True) if not held_out]
    counts = {
        "train": len(train),
        "dev": len(ready) - len(train),
        "no_image": sum(row.pixels is None for row in train),
        "no_text": sum(row.tokens is None for row in train),
        "aside": json.dumps(aside),
    }
    if not kept:
        return counts
    table = _table(shard, kept, wanted.classes[kept], dev, ready)
    if not keep_pixels and PIXELS in table.column_names:
        table = table.drop_columns([PIXELS])
    return {**counts, "payload": pack_table(table)}


_cached: tuple[Any, dict[str, Wanted]] | None = None


def wanted_in(ref: Any) -> dict[str, Wanted]:
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
    """Rows of one shard; ``pixels`` fixed-size binary, ``tokens`` list<int32>, where there are.
    Those of a row that is not ``pictured`` are zeros; one without a caption has no token."""
    pictured = np.array([row.pixels is not None for row in ready])
    columns: dict[str, Any] = {
        rows.SHARD: pa.array([shard] * len(kept), pa.string()),
        rows.ROW: pa.array(kept, pa.int64()),
        "class": pa.array(classes, pa.int32()),
        "dev": pa.array(dev, pa.bool_()),
        "pictured": pa.array(pictured),
    }
    pixels = [row.pixels for row in ready if row.pixels is not None]
    none = np.zeros(0, np.int32)
    tokens = [none if row.tokens is None else row.tokens for row in ready]
    if pixels:
        in_memory = [row.transpose(1, 2, 0) for row in pixels]
        packed = np.zeros((len(ready), *in_memory[0].shape), np.uint8)
        packed[pictured] = in_memory
        kind = pa.binary(packed[0].nbytes)
        columns[PIXELS] = pa.FixedSizeBinaryArray.from_buffers(
            kind, len(packed), [None, pa.py_buffer(packed)]
        )
    if any(map(len, tokens)):
        ends = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        columns["tokens"] = pa.ListArray.from_arrays(ends, np.concatenate(tokens))
    return pa.table(columns)


# --- a worker's view -----------------------------------------------------------------------------


class PreparedRows:
    """Train or dev rows in order of (shard, row), whatever chunks they came in.

    ``classes``: int64 [N], the index of each row's class, or of its set of labels; ``pictured``,
    ``captioned``: bool [N], what it has; ``unit_of``: int64 [N], the unit of reading it is in;
    ``sizes``: int64 [U], the rows of each unit. When ``streamed``, the pixels of a unit are there
    between ``hold`` and ``release`` only.
    """

    def __init__(
        self, blocks: Sequence[pa.Table], *, dev: bool, image_size: int, streamed: bool = False
    ) -> None:
        self._size, self._streamed = image_size, streamed
        places: list[tuple[str, int, int]] = []
        tables: list[pa.Table] = []
        for block in blocks:
            where = block.select([rows.SHARD, "start", "byte"]).to_pylist()
            for place, payload in zip(where, block["payload"], strict=True):
                if not payload.is_valid:
                    continue
                table = unpack_table(payload.as_buffer())
                if (table["dev"].to_numpy() == dev).any():
                    places.append(tuple(place.values()))
                    tables.append(table)
        self._chunks = [_Chunk(table, image_size) for table in tables]
        self._held: dict[int, _Chunk] = {}
        index: list[pa.Table] = []
        for number, group in enumerate(together(places)):
            first = 0
            for i in group:
                at = np.flatnonzero(tables[i]["dev"].to_numpy() == dev)
                own = _described(tables[i]).take(at)
                own = own.append_column("chunk", pa.array(np.full(len(at), i)))
                own = own.append_column("at", pa.array(at))
                own = own.append_column("unit", pa.array(np.full(len(at), number)))
                index.append(own.append_column("inside", pa.array(first + np.arange(len(at)))))
                first += len(at)
        found = pa.concat_tables(index)
        self.classes: Ints = found["class"].to_numpy().astype(np.int64)
        self.pictured: Mask = found["pictured"].to_numpy()
        self.captioned: Mask = found["captioned"].to_numpy()
        self._chunk, self._at = found["chunk"].to_numpy(), found["at"].to_numpy()
        self.unit_of: Ints = found["unit"].to_numpy()
        self._inside = found["inside"].to_numpy()
        self.sizes: Ints = np.bincount(self.unit_of)

    def hold(self, unit: int, block: pa.Table) -> None:
        """Have the pixels of a unit, from its block of one row."""
        payload = block["payload"][0].as_buffer()
        self._held[unit] = _Chunk(unpack_table(payload), self._size)

    def release(self, units: Iterable[int]) -> None:
        """Let go of the pixels of these units."""
        for unit in units:
            self._held.pop(unit, None)

    def __len__(self) -> int:
        return len(self.classes)

    def prepared(self, i: int, *, pixels: bool = True, tokens: bool = True) -> Prepared:
        """Row ``i``, or what is asked for of it; its arrays are views of the object store and must
        not be written to."""
        held = self._held.get(int(self.unit_of[i]))
        if held is not None:
            row = held.prepared(int(self._inside[i]))
        else:
            row = self._chunks[self._chunk[i]].prepared(int(self._at[i]))
            assert not (self._streamed and pixels), f"row {i} is used outside its window"
        return Prepared(row.pixels if pixels else None, row.tokens if tokens else None)

    def batch(
        self,
        at: Ints,
        *,
        captions: Ints | None = None,
        pixels: bool = True,
        tokens: bool = True,
    ) -> Batch:
        """The rows ``at`` (one or more) as a batch on the CPU, with their labels.

        With ``captions``, each is shown with the caption of that row, and its label is whether that
        is its own.
        """
        from mmray.learn import collate

        ready = [self.prepared(i, pixels=pixels, tokens=tokens) for i in at]
        if captions is None:
            return collate(ready, self.classes[at].tolist())
        texts = [self.prepared(i, pixels=False, tokens=tokens) for i in captions]
        pairs = [replace(row, tokens=text.tokens) for row, text in zip(ready, texts, strict=True)]
        return collate(pairs, (captions == at).astype(np.int64).tolist())


def _described(table: pa.Table) -> pa.Table:
    """What is to be known of each row of a ``_table`` before it is taken."""
    known = table.select([rows.SHARD, rows.ROW, "class", "pictured"])
    captioned = pa.array(np.zeros(len(table), bool))
    if "tokens" in table.column_names:
        captioned = pc.greater(pc.list_value_length(table["tokens"]), 0)
    return known.append_column("captioned", captioned)


class _Chunk:
    """Views of one chunk's pixels and tokens."""

    def __init__(self, table: pa.Table, image_size: int) -> None:
        self._pixels = self._tokens = None
        self._pictured = table["pictured"].to_numpy()
        if PIXELS in table.column_names:
            column = table[PIXELS].chunk(0)
            flat = np.frombuffer(column.buffers()[1], np.uint8)
            shape = len(column), image_size, image_size, 3
            self._pixels = flat.reshape(shape).transpose(0, 3, 1, 2)
        if "tokens" in table.column_names:
            column = table["tokens"].chunk(0)
            self._tokens = column.values.to_numpy()
            self._ends = column.offsets.to_numpy()

    def prepared(self, at: int) -> Prepared:
        pixels = tokens = None
        if self._pixels is not None and self._pictured[at]:
            pixels = self._pixels[at]
        if self._tokens is not None and self._ends[at] < self._ends[at + 1]:
            tokens = self._tokens[self._ends[at] : self._ends[at + 1]]
        return Prepared(pixels, tokens)
