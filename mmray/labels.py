"""What rows are labelled with: one class, any number of labels, or nothing read at all (match).

A row's label is text. For ``multilabel`` it is the row's set: its labels sorted and joined by the
separator, "" for a row that has none of them; null is a row that nobody labelled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmray.config import Data, Task
from mmray.errors import ConfigError
from mmray.groups import Ints, to_numpy

MISMATCH, MATCH = "mismatch", "match"
MATCH_LABELS = (MISMATCH, MATCH)


def label_text(value: Any) -> str | None:
    """A label as text: 1, 1.0 and "1" are one class; None, NaN, "" and lists are no label."""
    if value is None or value == "" or value != value or isinstance(value, list):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def label_set(value: Any, separator: str) -> str | None:
    """A row's labels as the text of their set; ``value`` is a list of labels, or such text.

    None is no label set; an empty list or text is the empty set. Raises ConfigError for a label of
    a list that has the separator in it.
    """
    if isinstance(value, list):
        names = {text for text in map(label_text, value) if text is not None}
        for name in names:
            if separator in name:
                raise ConfigError(
                    f"data.label_separator: got {separator!r}, which is in the label {name!r}; "
                    "choose text that is in none"
                )
    elif value == "":
        names = set()
    elif (text := label_text(value)) is None:
        return None
    else:
        names = {part.strip() for part in text.split(separator)}
    return separator.join(sorted(names - {""}))


def read_label(value: Any, task: Task, separator: str) -> str | None:
    """What ``task`` makes of the value of a row's label column. Raises ConfigError."""
    if task == "match":
        return MATCH
    return label_set(value, separator) if task == "multilabel" else label_text(value)


def joined(labels: Sequence[str], chosen: npt.NDArray[np.bool_], separator: str) -> list[str]:
    """The chosen labels of every row as text, in the order of ``labels``; ``chosen``: bool [N, C].

    "" for a row without any.
    """
    return [
        separator.join(label for label, is_in in zip(labels, row, strict=True) if is_in)
        for row in chosen.tolist()
    ]


@dataclass(frozen=True, slots=True)
class LabelIndex:
    """The labels, sorted by name, and how many rows have each; ``unlabelled`` rows have none."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    unlabelled: int

    #: multilabel: the texts of all sets that occur, sorted; None where a row has one label
    sets: tuple[str, ...] | None = None
    separator: str = ""

    def codes(self, labels: pa.ChunkedArray | pa.Array) -> Ints:
        """int64 [N]: the position of each row's label in ``names`` (of its set in ``sets``), -1
        where it is null or unknown."""
        known = self.names if self.sets is None else self.sets
        found = pc.index_in(labels, value_set=pa.array(known, pa.string()))
        index: Ints = to_numpy(pc.fill_null(found, -1))
        return index

    def members(self) -> npt.NDArray[np.bool_] | None:
        """bool [sets, C]: which labels are in each set; None where a row has one label."""
        if self.sets is None:
            return None
        return multi_hot(self.sets, self.names, self.separator)

    def counted(self, codes: Ints) -> dict[str, int]:
        """How many of these rows have each label; ``codes`` as from ``codes``."""
        members = self.members()
        rows = np.bincount(codes, minlength=len(self.sets or self.names))
        counts = rows if members is None else rows @ members.astype(np.int64)
        return dict(zip(self.names, counts.tolist(), strict=True))

    def strata(self, codes: Ints) -> Ints:
        """int64 [N]: by which label each row is stratified: its own; of a set the rarest one, with
        the empty set as one more, so that the rare labels are spread well."""
        members = self.members()
        if members is None:
            return codes
        order = np.lexsort((np.arange(len(self.names)), np.array(self.counts)))
        rarest = order[members[:, order].argmax(axis=1)]
        rarest[~members.any(axis=1)] = len(self.names)
        strata: Ints = np.where(codes >= 0, rarest[codes], -1)
        return strata


def multi_hot(sets: Sequence[str], labels: Sequence[str], separator: str) -> npt.NDArray[np.bool_]:
    """bool [sets, C]: which ``labels`` are in each of ``sets``; others are passed over."""
    place = {label: i for i, label in enumerate(labels)}
    found = np.zeros((len(sets), len(labels)), dtype=bool)
    for row, text in zip(found, sets, strict=True):
        row[[place[name] for name in text.split(separator) if name in place]] = True
    return found


def label_index(
    labels: pa.ChunkedArray | pa.Array, *, data: Data, task: Task, fields: Collection[str]
) -> LabelIndex:
    """The labels among those of some rows, as ``read_label`` gives them.

    ``fields`` are the names that the archive has, for the error. Raises ConfigError when no row
    has a label, or there is only one.
    """
    counts: Counter[str | None] = Counter()
    for item in pc.value_counts(labels).to_pylist():
        counts[item["values"]] += item["counts"]
    unlabelled, key = counts.pop(None, 0), data.label
    found = {text: n for text, n in sorted(counts.items(), key=str) if text is not None}
    if not found:
        there = ", ".join(sorted(fields)) or "none"
        raise ConfigError(
            f"data.label: no usable row has a value for {key!r} (of {unlabelled}); "
            f"fields that are there: {there}"
        )
    if task == "match":
        return LabelIndex(MATCH_LABELS, (0, found[MATCH]), unlabelled)
    if task == "multilabel":
        return _index_of_sets(found, unlabelled, data)
    names = sorted(found)
    if len(names) == 1:
        raise ConfigError(
            f"data.label: all {found[names[0]]} labelled rows have {key} = {names[0]!r}; "
            "a classifier needs at least two classes"
        )
    return LabelIndex(tuple(names), tuple(found[name] for name in names), unlabelled)


def _index_of_sets(found: dict[str, int], unlabelled: int, data: Data) -> LabelIndex:
    counts: Counter[str] = Counter()
    for text, n in found.items():
        counts.update(dict.fromkeys(filter(None, text.split(data.label_separator)), n))
    names = sorted(counts)
    if len(names) < 2:
        raise ConfigError(
            f"data.label: the labels of {sum(found.values())} rows are {names}; multilabel needs "
            f"at least two (text is parted by data.label_separator, {data.label_separator!r})"
        )
    each = tuple(counts[name] for name in names)
    return LabelIndex(tuple(names), each, unlabelled, tuple(sorted(found)), data.label_separator)
