"""Which rows train the model and which are held out, so that nothing is learned from its own test.

Rows that share an image (its encoded bytes, or nearly all bits of its perceptual hash), a caption
(normalised) or the value of ``data.group`` form a group, transitively. Where the archive names no
split, a group is wholly "train" or wholly "dev". Where it does, held-out rows are what it says, dev
and labelled rows of further values (a test split), and training rows that share something with one
of them are left out. What crosses is counted.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray import duplicates, groups
from mmray.archive.rows import ERROR, LABEL, ROW, SHARD, Sample, reason
from mmray.config import Data, Task, TextPreprocess
from mmray.duplicates import (
    CAPTION_DIGEST,
    GROUP,
    GROUP_DIGEST,
    IMAGE_DIGEST,
    PICTURE_HASH,
    Duplicates,
)
from mmray.errors import ConfigError
from mmray.groups import DIGEST_BYTES, Ints, Mask, to_numpy
from mmray.labels import LabelIndex, label_index, label_text, read_label
from mmray.preprocess import clean_text
from mmray.preprocess.perceptual import HASH_BYTES, perceptual_hash

TRAIN, DEV = "train", "dev"
SPLIT, WITHIN = "split", "negatives_within"

#: What a split needs to know of each row. Digests are null where there is nothing to compare.
IDENTITY_SCHEMA = pa.schema(
    [
        (SHARD, pa.string()),
        (ROW, pa.int64()),
        (LABEL, pa.string()),
        (SPLIT, pa.string()),
        (IMAGE_DIGEST, pa.binary(DIGEST_BYTES)),
        (PICTURE_HASH, pa.binary(HASH_BYTES)),
        (CAPTION_DIGEST, pa.binary(DIGEST_BYTES)),
        (GROUP_DIGEST, pa.binary(DIGEST_BYTES)),
        (WITHIN, pa.string()),
        (ERROR, pa.string()),
    ]
)

#: A larger group is held out only where smaller ones cannot fill the dev part: many copies of one
#: post would be many votes for one answer.
SMALL_GROUP = 5


# --- identity ------------------------------------------------------------------------------------


def identify(
    samples: Sequence[Sample],
    data: Data,
    task: Task = "classify",
    hashes: Sequence[bytes | None] | None = None,
) -> pa.Table:
    """The ``IDENTITY_SCHEMA`` table of some samples, read with the ``identity_fields`` of ``data``.

    96 bytes a row stand for its content, so millions of rows fit in one process. Pictures are
    decoded for their hashes, small, unless these are given; where ``data.near`` is 0 they are not.
    """
    if hashes is None:
        hashes = [picture_hash(sample) if data.near else None for sample in samples]
    columns: list[list[Any]] = [[] for _ in IDENTITY_SCHEMA]
    for sample, picture in zip(samples, hashes, strict=True):
        row = (
            sample.shard,
            sample.row,
            read_label(sample.fields.get(data.label), task, data.label_separator),
            _field(sample, data.split),
            _digest(sample.image),
            picture,
            _digest(_encoded(normal_caption(sample.caption or ""))),
            _digest(_encoded(_field(sample, data.group) or "")),
            _field(sample, data.negatives_within),
            sample.error,
        )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, IDENTITY_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=IDENTITY_SCHEMA)


def picture_hash(sample: Sample) -> bytes | None:
    """The perceptual hash of a sample's picture, where it has one."""
    return perceptual_hash(sample.image) if sample.image else None


def identity_fields(data: Data, task: Task = "classify") -> tuple[str, ...]:
    """The columns or fields of the archive that ``identify`` looks at."""
    label = None if task == "match" else data.label
    names = (label, data.split, data.group, data.negatives_within)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _field(sample: Sample, name: str | None) -> str | None:
    return None if name is None else label_text(sample.fields.get(name))


#: All that preprocessing may do to a caption, at any length: texts that a model reads as the same
#: are the same. Mentions stay until ``RT @user:`` has been found.
_ALIKE = TextPreprocess(lowercase=True, urls="drop", mentions="keep", max_tokens=1 << 32)
_UNADDRESSED = TextPreprocess(lowercase=True, urls="drop", mentions="drop", max_tokens=1 << 32)
_RETWEET = re.compile(r"^(?:\s*rt\s+@\w+\s*:?)+")


def normal_caption(text: str) -> str:
    """The part of a caption by which two of them are the same: as ``clean_text`` cleans it, lower
    case, without URLs, mentions and leading ``RT @user:``. Empty where nothing else is there."""
    return clean_text(_RETWEET.sub(" ", clean_text(text, _ALIKE)), _UNADDRESSED)


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _digest(data: bytes | None) -> bytes | None:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest() if data else None


# --- the split -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What became of every row: ``rows`` = train_rows + dev_rows + left_out + unlabelled + unused +
    errors.

    By respect, in which rows can be the same, are ``leaks``, ``left_out`` and ``duplicates``: see
    ``mmray.duplicates``.
    """

    rule: str  # how the sides were chosen, for a person
    rows: int
    train: dict[str, int]  # rows of each label
    dev: dict[str, int]
    train_rows: int
    dev_rows: int
    unlabelled: int
    unused: dict[str, int]  # labelled rows of other split values, held out too; "none": of no value
    errors: dict[str, int]  # rows that could not be read, by reason
    groups: int  # rows of both sides joined by anything that they share, singles included
    largest_group: int  # rows
    leaks: dict[str, int]  # held-out rows that share it with a training row, before any is left out
    left_out: dict[str, int]  # training rows, each under the first respect that it leaks by
    duplicates: dict[str, Duplicates]  # in training and held-out rows, before any is left out

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Split:
    """``sides`` [N]: "train", "dev" or null for each row that was given, in that order."""

    sides: pa.StringArray
    labels: LabelIndex  # of the rows of both sides
    report: SplitReport


def assign(
    rows: pa.Table,
    *,
    data: Data,
    seed: int,
    fields: Collection[str] = (),
    task: Task = "classify",
) -> Split:
    """Decide the side of every row of an ``IDENTITY_SCHEMA`` table.

    With a ``data.split`` column that has values, ``data.train`` and ``data.dev`` are its values;
    rows of others have no side, but labelled ones are held out, too: an evaluation may ask for
    them. Without, whole groups are held out until ``dev_fraction`` of each label is reached: the
    choice depends on content and ``seed``, not on the order of rows or shards.
    ``fields`` are the names that the archive has, for errors. Raises ConfigError.
    """
    usable = to_numpy(pc.is_null(rows[ERROR]))
    errors = Counter(reason(e) for e in rows[ERROR].drop_null().to_pylist())
    if not usable.any():
        found = ", ".join(f"{n} x {what}" for what, n in errors.most_common(3)) or "no rows at all"
        raise ConfigError(f"data.archive: {data.archive}: nothing to learn from: {found}")
    labelled = usable & to_numpy(pc.is_valid(rows[LABEL]))
    index_of = functools.partial(label_index, data=data, task=task, fields=fields)
    every = index_of(rows[LABEL].filter(pa.array(usable)))

    tied = duplicates.ties(rows, data)
    if data.group is not None and not (labelled & (tied[GROUP] >= 0)).any():
        there = ", ".join(sorted(fields)) or "none"
        raise ConfigError(
            f"data.group: no labelled row has a value for {data.group!r}; fields that are there: "
            f"{there}"
        )
    binding = duplicates.binding(tied, data)
    in_column = rows[SPLIT].filter(pa.array(labelled)).drop_null()
    unused: Counter[str] = Counter()
    if len(in_column):
        rule = f"column {data.split}: {data.train} / {data.dev}"
        train, dev = _by_column(rows[SPLIT], labelled, data)
        left = rows[SPLIT].filter(pa.array(labelled & ~train & ~dev))
        unused.update(pc.fill_null(left, "none").to_pylist())
        held = labelled & ~train & to_numpy(pc.is_valid(rows[SPLIT]))
        if others := sorted(left.drop_null().unique().to_pylist()):
            rule += f"; held out too: {', '.join(others)}"
    else:
        rule = f"seeded: {data.dev_fraction:g} of each label, seed {seed}"
        strata = every.strata(every.codes(rows[LABEL]))
        dev = _by_seed(rows, labelled, strata, binding, data.dev_fraction, seed)
        train, held = labelled & ~dev, dev

    both = train | dev
    leaks = duplicates.crossing(tied, held, train)
    repeated = duplicates.conflicts(rows, tied, train | held)
    sizes = np.bincount(groups.components(*(code[both] for code in tied.values())))
    left_out = _leave_out(train, held, tied, data)
    both = train | dev
    labels = index_of(rows[LABEL].filter(pa.array(both)))
    index = labels.codes(rows[LABEL])
    report = SplitReport(
        rule=rule,
        rows=rows.num_rows,
        train=labels.counted(index[train]),
        dev=labels.counted(index[dev]),
        train_rows=int(train.sum()),
        dev_rows=int(dev.sum()),
        unlabelled=int((usable & ~labelled).sum()),
        unused=dict(unused),
        errors=dict(errors),
        groups=int((sizes > 0).sum()),
        largest_group=int(sizes.max()),
        leaks={respect: int(mask.sum()) for respect, mask in leaks.items()},
        left_out=left_out,
        duplicates=repeated,
    )
    sides = pa.array([TRAIN, DEV]).take(pa.array(dev.astype(np.int8), mask=~both))
    return Split(sides, labels, report)


def _leave_out(train: Mask, held: Mask, tied: dict[str, Ints], data: Data) -> dict[str, int]:
    """Take from ``train`` what ``held`` has too, in a respect that keeps rows on one side; how many
    rows that is, each under the first such respect. Held-out rows are never touched: figures over
    them stay comparable."""
    found = {}
    before = int(train.sum())
    binding = duplicates.binding(tied, data)
    for respect, leaking in duplicates.crossing(binding, train.copy(), held).items():
        found[respect] = int((train & leaking).sum())
        train &= ~leaking
    if not train.any():
        raise ConfigError(
            f"data.duplicates: all {before} training rows share something with a held-out row "
            f"({counted(found)}); set data.duplicates=report to train on them all the same"
        )
    return found


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{what} {n:,}" for what, n in counts.items() if n)


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
    rows: pa.Table,
    labelled: Mask,
    strata: Ints,
    binding: dict[str, Ints],
    fraction: float,
    seed: int,
) -> Mask:
    """The rows to hold out: whole groups in seeded order, while the share of each of ``strata``
    (int64 [N]) has room."""
    at = np.flatnonzero(labelled)
    keys, known = groups.content_keys(rows[IMAGE_DIGEST], rows[CAPTION_DIGEST])
    for i in np.flatnonzero(labelled & ~known).tolist():
        keys[i] = groups.name_key(rows[SHARD][i], rows[ROW][i])
    group = groups.components(np.full(len(at), -1), *(code[at] for code in binding.values()))
    order = groups.seeded_order(group, keys[at], seed)
    labels = strata[at]
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    bounds = [*starts.tolist(), len(order)]
    if len(starts) < 2:
        raise ConfigError(
            f"data.dev_fraction: nothing can be held out: all {len(at)} labelled rows share "
            "images, captions or groups with each other; name a split column with data.split"
        )
    room = _targets(np.bincount(labels).tolist(), fraction)
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


def _targets(counts: list[int], fraction: float) -> list[int]:
    """Rows of each label (sorted by name) to hold out: ``fraction`` of all by largest remainder;
    every label keeps a row to learn from."""
    exact = [fraction * n for n in counts]
    room = [math.floor(x) for x in exact]
    more = round(fraction * sum(counts)) - sum(room)
    by_remainder = sorted(range(len(counts)), key=lambda i: (room[i] - exact[i], i))
    for i in [i for i in by_remainder if room[i] + 1 < counts[i]][: max(more, 0)]:
        room[i] += 1
    return room
