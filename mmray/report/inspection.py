"""What was seen in an archive: counts that add up, as JSON and as text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_NAMES = 1000  # distinct labels or splits counted by name
OTHERS = "(others)"


@dataclass(slots=True)
class Counts:
    """What was seen in some shards; small, and adds up. Sizes are counted by value."""

    pairs: int = 0
    usable: int = 0  # picture and caption both sound
    usable_images: int = 0
    usable_captions: int = 0
    images: int = 0
    captions: int = 0
    empty: int = 0  # captions of white space only
    formats: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)  # pixels, as stored
    heights: Counter[int] = field(default_factory=Counter)
    kilobytes: Counter[int] = field(default_factory=Counter)  # encoded, rounded up
    chars: Counter[int] = field(default_factory=Counter)  # of captions
    labels: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        for item in dataclasses.fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, item.name, mine + theirs)
        limit(self.labels)
        limit(self.splits)


@dataclass(frozen=True, slots=True)
class Inspection:
    """``shards`` and ``bytes`` are all that were listed; the counts are of ``shards_read``."""

    archive: str
    label: str
    split: str
    shards: dict[str, int]  # by kind
    bytes: int
    sidecars: int  # img2dataset tables beside tars
    ignored: int  # other files
    shards_read: int
    counts: Counts

    def to_json(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "archive": self.archive,
            "shards": self.shards,
            "bytes": self.bytes,
            "ignored": {"sidecars": self.sidecars, "other": self.ignored},
            "shards_read": self.shards_read,
            "pairs": counts.pairs,
            "usable": counts.usable,
            "usable_images": counts.usable_images,
            "usable_captions": counts.usable_captions,
            "images": {
                "count": counts.images,
                "formats": dict(counts.formats.most_common()),
                "width": spread(counts.widths),
                "height": spread(counts.heights),
                "kilobytes": spread(counts.kilobytes),
            },
            "captions": {
                "count": counts.captions,
                "empty": counts.empty,
                "chars": spread(counts.chars),
            },
            "labels": {"field": self.label, "counts": dict(counts.labels.most_common())},
            "splits": {"field": self.split, "counts": dict(counts.splits.most_common())},
            "broken": dict(counts.broken.most_common()),
            "problems": counts.problems,
            "examples": counts.examples,
        }

    def __str__(self) -> str:
        return "\n".join([self.archive, *(f"  {line}" for line in _lines(self))])


def spread(values: Counter[int]) -> dict[str, int] | None:
    """Least, middle and greatest of counted values; None where there are none."""
    total = values.total()
    if not total:
        return None
    seen = 0
    ordered = sorted(values.items())
    for value, count in ordered:
        seen += count
        if 2 * seen >= total:
            return {"min": ordered[0][0], "median": value, "max": ordered[-1][0]}
    raise AssertionError("counts add up to their total")


def limit(names: Counter[str]) -> None:
    """A column that is no label, such as an id, must not fill the memory."""
    if len(names) > MAX_NAMES:
        for name, count in names.most_common()[MAX_NAMES - 1 :]:
            if name != OTHERS:
                del names[name]
                names[OTHERS] += count


# --- as text -------------------------------------------------------------------------------------


def _lines(found: Inspection) -> Iterator[str]:
    counts = found.counts
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.shards.items()))
    over = [(found.sidecars, "tables beside tars"), (found.ignored, "other files")]
    passed = ", ".join(f"{count:,} {what}" for count, what in over if count)
    yield f"shards    {kinds}; {size(found.bytes)}" + (f"; passed over: {passed}" if passed else "")
    part = sum(found.shards.values()) > found.shards_read
    where = f" in the first {found.shards_read:,} shards" if part else ""
    yield (
        f"pairs     {counts.pairs:,}{where}; usable: {counts.usable:,} as pairs, "
        f"{counts.usable_images:,} as pictures, {counts.usable_captions:,} as texts"
    )
    yield f"images    {counts.images:,}: {_names(counts.formats)}"
    if counts.widths:
        width, height = _range(counts.widths), _range(counts.heights)
        yield f"          width {width} px, height {height} px, {_range(counts.kilobytes)} KiB"
    yield (
        f"captions  {counts.captions:,}: {_range(counts.chars)} characters, {counts.empty:,} empty"
    )
    yield f"{found.label:<9} {_names(counts.labels)}"
    yield f"{found.split:<9} {_names(counts.splits)}"
    for index, (name, count) in enumerate(counts.broken.most_common()):
        yield f"{'' if index else 'broken':<9} {count:,} {name}"
    for index, problem in enumerate(counts.problems):
        yield f"{'' if index else 'problems':<9} {problem}"
    for index, one in enumerate(counts.examples):
        label = "" if one["label"] is None else f" -> {one['label']}"
        where = f"{one['shard']}[{one['row']}]"
        yield (
            f"{'' if index else 'examples':<9} {where} {one['key']}: {one['image']}, "
            f"{one['caption']!r}{label}"
        )


def _names(names: Counter[str], most: int = 12) -> str:
    shown = [f"{name} {count:,}" for name, count in names.most_common(most)]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "") if shown else "none"


def _range(values: Counter[int]) -> str:
    found = spread(values)
    if found is None:
        return "no"
    return f"{found['min']:,} to {found['max']:,} (median {found['median']:,})"


def size(count: float) -> str:
    """``59_300_000`` -> ``59.3 MB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes what is left")
