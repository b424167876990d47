"""What an archive holds and what of it is broken, before anybody pays for scoring it.

Every image is decoded as scoring would decode it, so the reasons are those a scoring run would
give. Shards are read by several processes; only counts come back.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmray.archive.columns import GUESSED
from mmray.archive.rows import Sample, reason
from mmray.archive.shards import Ignored, Shard, list_archive, read_shard
from mmray.config import Columns, Preprocess
from mmray.errors import BadRow, ConfigError
from mmray.preprocess import Preprocessor
from mmray.report.inspection import Counts, Inspection, limit

Progress = Callable[[int, int], None]  # shards done, of how many
MAX_PROBLEMS = 100
CAPTION_CHARS = 60  # of an example
NO_CAPTION, EMPTY_CAPTION = "no caption", "empty caption"  # as preprocess says it
DIED = "worker died: the process reading this shard ended twice; its pairs are not counted"


@dataclass(frozen=True, slots=True)
class Asked:
    """What to look for: the same for every shard."""

    root: str
    columns: Columns
    label: str
    split: str
    examples: int


def inspect(
    archive: str,
    *,
    columns: Columns = GUESSED,
    label: str = "label",
    split: str = "split",
    max_shards: int | None = None,
    examples: int = 3,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at every pair of an archive, or of its first ``max_shards`` shards.

    ``workers`` processes share the shards (None: one a CPU; 1: this process does it all).
    Raises ConfigError where there are no shards, StorageError.
    """
    found: list[Shard] = []
    ignored = Counter[bool]()
    for item in list_archive(archive):
        if isinstance(item, Ignored):
            ignored[item.sidecar] += 1
        else:
            found.append(item)
    if not found:
        raise ConfigError(f"{archive}: no .tar, .tar.gz, .tgz or .parquet shards")
    asked = Asked(archive, columns, label, split, examples)
    shards = found[:max_shards]
    counts = Counts()
    parts: dict[int, list[dict[str, Any]]] = {}
    for done, (index, part) in enumerate(_all_counts(asked, shards, workers), start=1):
        if part.examples:
            parts = dict(sorted([*parts.items(), (index, part.examples)])[:examples])
            part.examples = []
        counts.add(part)
        if progress is not None:
            progress(done, len(shards))
    counts.examples = [example for _, part in sorted(parts.items()) for example in part][:examples]
    counts.problems = sorted(counts.problems)[:MAX_PROBLEMS]
    return Inspection(
        archive,
        label,
        split,
        dict(Counter(shard.kind for shard in found)),
        sum(shard.size for shard in found),
        ignored[True],
        ignored[False],
        len(shards),
        counts,
    )


def inspect_shard(asked: Asked, shard: Shard) -> Counts:
    """The counts of one shard. Raises StorageError."""
    counts = Counts()
    preprocessor = Preprocessor(Preprocess(), None, "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd files; what is wrong is counted
        for item in read_shard(
            asked.root, shard, columns=asked.columns, fields=(asked.label, asked.split)
        ):
            if isinstance(item, Sample):
                _count(counts, item, preprocessor, asked)
            elif item.problem is not None:
                counts.problems.append(f"{item.shard}: {item.problem}")
    return counts


def _count(counts: Counts, sample: Sample, preprocessor: Preprocessor, asked: Asked) -> None:
    counts.pairs += 1
    for names, name in ((counts.labels, asked.label), (counts.splits, asked.split)):
        value = sample.fields.get(name)
        if value is not None:
            names[str(value)] += 1
            limit(names)
    if sample.caption is not None:
        counts.captions += 1
        counts.chars[len(sample.caption)] += 1
        counts.empty += not sample.caption.strip()
    if sample.image is not None:
        counts.images += 1
        counts.kilobytes[-(-len(sample.image) // 1024)] += 1
    image_fault = _image_fault(sample, preprocessor)
    caption_fault = _caption_fault(sample)
    counts.usable_images += image_fault is None
    counts.usable_captions += caption_fault is None
    shape = _measure(counts, sample.image) if sample.image and image_fault is None else ""
    fault = image_fault or caption_fault
    if fault is not None:
        counts.broken[fault] += 1
        return
    counts.usable += 1
    if len(counts.examples) < asked.examples:
        counts.examples.append(_example(sample, shape, asked))


def _image_fault(sample: Sample, preprocessor: Preprocessor) -> str | None:
    """The reason for which scoring would set the picture aside."""
    try:
        preprocessor.prepare(sample)
    except BadRow as error:
        return error.reason
    return None


def _caption_fault(sample: Sample) -> str | None:
    if sample.error is not None:
        return reason(sample.error)
    if sample.caption is None:
        return NO_CAPTION
    return None if sample.caption.strip() else EMPTY_CAPTION


def _measure(counts: Counts, data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            (width, height), kind = image.size, image.format or "other"
    except (OSError, Image.DecompressionBombError):  # Pillow's own limits, not scoring's
        counts.formats["other"] += 1
        return "other"
    counts.formats[kind] += 1
    counts.widths[width] += 1
    counts.heights[height] += 1
    return f"{kind} {width}x{height}"


def _example(sample: Sample, shape: str, asked: Asked) -> dict[str, Any]:
    caption = " ".join((sample.caption or "").split())
    if len(caption) > CAPTION_CHARS:
        caption = caption[: CAPTION_CHARS - 1] + "\u2026"
    return {
        "shard": sample.shard,
        "row": sample.row,
        "key": sample.key,
        "image": shape,
        "caption": caption,
        "label": sample.fields.get(asked.label),
    }


# --- processes -----------------------------------------------------------------------------------


def _all_counts(
    asked: Asked, shards: Sequence[Shard], workers: int | None
) -> Iterator[tuple[int, Counts]]:
    """(position, counts) of each shard, in the order in which they are done."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(shards))
    look = functools.partial(inspect_shard, asked)
    if workers == 1:
        yield from ((index, look(shard)) for index, shard in enumerate(shards))
        return
    todo = dict(enumerate(shards))
    try:
        for index, counts in _in_pool(look, list(todo.items()), workers):
            del todo[index]
            yield index, counts
    except BrokenProcessPool:  # a decoder took its process along; find out on which shard
        for index, shard in todo.items():
            try:
                yield from _in_pool(look, [(index, shard)], 1)
            except BrokenProcessPool:
                yield index, Counts(problems=[f"{shard.path}: {DIED}"])


def _in_pool(
    look: Callable[[Shard], Counts], todo: Sequence[tuple[int, Shard]], workers: int
) -> Iterator[tuple[int, Counts]]:
    waiting = iter(todo)
    running: dict[Future[Counts], int] = {}
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        while True:
            while len(running) < 2 * workers and (job := next(waiting, None)) is not None:
                running[pool.submit(look, job[1])] = job[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)
