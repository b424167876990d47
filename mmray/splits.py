"""Which rows train the model and which are held out, so that nothing is learned from its own test.

Rows that share an image (its encoded bytes) or a caption (normalised) form a group, transitively.
Where the archive names no split, a group is wholly "train" or wholly "dev"; where it does, the
archive is obeyed and what it leaks is counted.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray import groups
from mmray.archive.rows import ERROR, LABEL, ROW, SHARD, Sample, reason
from mmray.config import Data
from mmray.errors import ConfigError
from mmray.groups import DIGEST_BYTES, Ints, Mask, codes, to_numpy

TRAIN, DEV = "train", "dev"
SPLIT, IMAGE_DIGEST, CAPTION_DIGEST = "split", "image_digest", "caption_digest"

#: What a split needs to know of each row. Digests are null where there is nothing to compare.
IDENTITY_SCHEMA = pa.schema(
    [
        (SHARD, pa.string()),
        (ROW, pa.int64()),
        (LABEL, pa.string()),
        (SPLIT, pa.string()),
        (IMAGE_DIGEST, pa.binary(DIGEST_BYTES)),
        (CAPTION_DIGEST, pa.binary(DIGEST_BYTES)),
        (ERROR, pa.string()),
    ]
)

#: A larger group is held out only where smaller ones cannot fill the dev part: many copies of one
#: post would be many votes for one answer.
SMALL_GROUP = 5


# --- identity ------------------------------------------------------------------------------------


def identify(samples: Iterable[Sample], *, label: str, split: str | None) -> pa.Table:
    """The ``IDENTITY_SCHEMA`` table of some samples, read with ``label`` and ``split`` as fields.

    48 bytes of digests a row stand for its content, so millions of rows fit in one process.
    """
    columns: list[list[Any]] = [[] for _ in IDENTITY_SCHEMA]
    for sample in samples:
        row = (
            sample.shard,
            sample.row,
            label_text(sample.fields.get(label)),
            label_text(sample.fields.get(split)) if split is not None else None,
            _digest(sample.image),
            _digest(normal_caption(sample.caption or "").encode(errors="surrogatepass")),
            sample.error,
        )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, IDENTITY_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=IDENTITY_SCHEMA)


def label_text(value: Any) -> str | None:
    """A label as text: 1, 1.0 and "1" are one class; None, NaN and "" are no label."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


_URL = re.compile(r"(?:https?://|www\.)\S*")
_RETWEET = re.compile(r"^(?:\s*rt\s+@\w+\s*:?)+")


def normal_caption(text: str) -> str:
    """The part of a caption by which two of them are the same: lower case, without URLs and
    leading ``RT @user:``, whitespace collapsed. Empty where nothing else is there."""
    return " ".join(_RETWEET.sub(" ", _URL.sub(" ", text.lower())).split())


def _digest(data: bytes | None) -> bytes | None:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest() if data else None


# --- labels --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabelIndex:
    """The classes, sorted by name, and how many rows have each; ``unlabelled`` rows have none."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    unlabelled: int

    def codes(self, labels: pa.ChunkedArray | pa.Array) -> Ints:
        """int64 [N]: the position of each label in ``names``, -1 where it is null or unknown."""
        found = pc.index_in(labels, value_set=pa.array(self.names, pa.string()))
        index: Ints = to_numpy(pc.fill_null(found, -1))
        return index


def label_index(
    labels: pa.ChunkedArray | pa.Array, *, key: str, fields: Collection[str]
) -> LabelIndex:
    """The classes among ``labels``, the values of column or field ``key``.

    ``fields`` are the names that the archive has, for the error. Raises ConfigError when no row
    has a label, or all have the same.
    """
    counts: Counter[str | None] = Counter()
    for item in pc.value_counts(labels).to_pylist():
        counts[item["values"]] += item["counts"]
    unlabelled = counts.pop(None, 0)
    names = sorted(name for name in counts if name is not None)
    if not names:
        there = ", ".join(sorted(fields)) or "none"
        raise ConfigError(
            f"data.label: no usable row has a value for {key!r} (of {unlabelled}); "
            f"fields that are there: {there}"
        )
    if len(names) == 1:
        raise ConfigError(
            f"data.label: all {counts[names[0]]} labelled rows have {key} = {names[0]!r}; "
            "a classifier needs at least two classes"
        )
    return LabelIndex(tuple(names), tuple(counts[name] for name in names), unlabelled)


# --- the split -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What became of every row: ``rows`` = train + dev + unlabelled + unused + errors."""

    rule: str  # how the sides were chosen, for a person
    rows: int
    train: dict[str, int]  # rows of each label
    dev: dict[str, int]
    unlabelled: int
    unused: dict[str, int]  # labelled rows by the split value that is neither train nor dev
    errors: dict[str, int]  # rows that could not be read, by reason
    groups: int  # rows of both sides joined by equal image or caption, singles included
    largest_group: int  # rows
    leaks: dict[str, int]  # dev rows whose "image" or "caption" is in train too

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Split:
    """``sides`` [N]: "train", "dev" or null for each row that was given, in that order."""

    sides: pa.StringArray
    labels: LabelIndex  # of the rows of both sides
    report: SplitReport


def assign(rows: pa.Table, *, data: Data, seed: int, fields: Collection[str] = ()) -> Split:
    """Decide the side of every row of an ``IDENTITY_SCHEMA`` table.

    With a ``data.split`` column that has values, ``data.train`` and ``data.dev`` are its values and
    other rows stay unused. Without, whole groups are held out until ``dev_fraction`` of each label
    is reached: the choice depends on content and ``seed``, not on the order of rows or shards.
    ``fields`` are the names that the archive has, for errors. Raises ConfigError.
    """
    usable = to_numpy(pc.is_null(rows[ERROR]))
    errors = Counter(reason(e) for e in rows[ERROR].drop_null().to_pylist())
    if not usable.any():
        found = ", ".join(f"{n} x {what}" for what, n in errors.most_common(3)) or "no rows at all"
        raise ConfigError(f"data.archive: {data.archive}: nothing to learn from: {found}")
    labelled = usable & to_numpy(pc.is_valid(rows[LABEL]))
    label_index(rows[LABEL].filter(pa.array(usable)), key=data.label, fields=fields)

    image, caption = codes(rows[IMAGE_DIGEST]), codes(rows[CAPTION_DIGEST])
    in_column = rows[SPLIT].filter(pa.array(labelled)).drop_null()
    unused: Counter[str] = Counter()
    if len(in_column):
        rule = f"column {data.split}: {data.train} / {data.dev}"
        train, dev = _by_column(rows[SPLIT], labelled, data)
        left = pc.fill_null(rows[SPLIT].filter(pa.array(labelled & ~train & ~dev)), "none")
        unused.update(left.to_pylist())
    else:
        rule = f"seeded: {data.dev_fraction:g} of each label, seed {seed}"
        dev = _by_seed(rows, labelled, image, caption, data.dev_fraction, seed)
        train = labelled & ~dev

    both = train | dev
    labels = label_index(rows[LABEL].filter(pa.array(both)), key=data.label, fields=fields)
    index = labels.codes(rows[LABEL])
    sizes = np.bincount(groups.components(image[both], caption[both]))
    report = SplitReport(
        rule=rule,
        rows=rows.num_rows,
        train=_per_label(labels, index[train]),
        dev=_per_label(labels, index[dev]),
        unlabelled=int((usable & ~labelled).sum()),
        unused=dict(unused),
        errors=dict(errors),
        groups=int((sizes > 0).sum()),
        largest_group=int(sizes.max()),
        leaks={"image": _leaks(image, train, dev), "caption": _leaks(caption, train, dev)},
    )
    sides = pa.array([TRAIN, DEV]).take(pa.array(dev.astype(np.int8), mask=~both))
    return Split(sides, labels, report)


def _by_column(split: pa.ChunkedArray, labelled: Mask, data: Data) -> tuple[Mask, Mask]:
    sides = []
    for key, value in (("data.train", data.train), ("data.dev", data.dev)):
        side = labelled & to_numpy(pc.fill_null(pc.equal(split, value), False))
        if not side.any():
            counts = Counter(split.filter(pa.array(labelled)).drop_null().to_pylist())
            found = ", ".join(f"{name} ({n})" for name, n in counts.most_common(8))
            raise ConfigError(
                f"{key}: no labelled row has {data.split} = {value!r}; values that are there: "
                f"{found}; name one of them, or set data.split=null to split by seed"
            )
        sides.append(side)
    return sides[0], sides[1]


def _by_seed(
    rows: pa.Table, labelled: Mask, image: Ints, caption: Ints, fraction: float, seed: int
) -> Mask:
    """The rows to hold out: whole groups in seeded order, while each label's share has room."""
    at = np.flatnonzero(labelled)
    keys, known = groups.content_keys(rows[IMAGE_DIGEST], rows[CAPTION_DIGEST])
    for i in np.flatnonzero(labelled & ~known).tolist():
        keys[i] = groups.name_key(rows[SHARD][i], rows[ROW][i])
    group = groups.components(image[at], caption[at])
    order = groups.seeded_order(group, keys[at], seed)
    labels = codes(rows[LABEL])[at]
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    bounds = [*starts.tolist(), len(order)]
    if len(starts) < 2:
        raise ConfigError(
            f"data.dev_fraction: nothing can be held out: all {len(at)} labelled rows share images "
            "or captions with each other; name a split column with data.split"
        )
    names = rows[LABEL].combine_chunks().dictionary_encode().dictionary.to_pylist()
    room = _targets(np.bincount(labels, minlength=len(names)).tolist(), names, fraction)
    taken = _fill(bounds, labels[order].tolist(), room)
    if not taken:  # every group is larger than the dev part should be
        taken = [int(np.argmin(np.diff(bounds)))]
    dev = np.zeros(rows.num_rows, dtype=bool)
    for i in taken:
        dev[at[order[bounds[i] : bounds[i + 1]]]] = True
    return dev


def _fill(bounds: list[int], labels: list[int], room: list[int]) -> list[int]:
    """Indices of the groups to hold out: small ones first, then any that still fit ``room``."""
    taken: list[int] = []
    left = sum(room)
    for limit in (SMALL_GROUP, len(labels)):
        passed = set(taken)
        for i in range(len(bounds) - 1):
            if left == 0:
                return taken
            members = labels[bounds[i] : bounds[i + 1]]
            if len(members) > limit or i in passed or not room[members[0]]:
                continue
            need = Counter(members)
            if all(room[label] >= n for label, n in need.items()):
                for label, n in need.items():
                    room[label] -= n
                left -= len(members)
                taken.append(i)
    return taken


def _targets(counts: list[int], names: list[str], fraction: float) -> list[int]:
    """Rows of each label to hold out: ``fraction`` of all by largest remainder; every label keeps
    a row to learn from."""
    exact = [fraction * n for n in counts]
    room = [math.floor(x) for x in exact]
    more = round(fraction * sum(counts)) - sum(room)
    by_remainder = sorted(range(len(counts)), key=lambda i: (room[i] - exact[i], names[i]))
    for i in [i for i in by_remainder if room[i] + 1 < counts[i]][: max(more, 0)]:
        room[i] += 1
    return room


def _leaks(codes: Ints, train: Mask, dev: Mask) -> int:
    held_out = codes[dev]
    return int(np.isin(held_out[held_out >= 0], codes[train]).sum())


def _per_label(labels: LabelIndex, codes: Ints) -> dict[str, int]:
    counts = np.bincount(codes, minlength=len(labels.names)).tolist()
    return dict(zip(labels.names, counts, strict=True))


def warnings(report: SplitReport) -> list[str]:
    """What a person should know before training on this split, one line each."""
    lines = [
        f"{n} dev rows have a {what} that is in train too: dev figures will be too good"
        for what, n in report.leaks.items()
        if n
    ]
    for here, there, name in ((report.dev, report.train, DEV), (report.train, report.dev, TRAIN)):
        only = [label for label, n in here.items() if n and not there[label]]
        if only:
            lines.append(f"labels only in {name}: {', '.join(only)}")
    return lines + [f"set aside, {what}: {n} rows" for what, n in report.errors.items()]
