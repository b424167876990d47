"""Write archives: a table of image files, or another archive, as tar or Parquet shards.

The same source gives the same bytes. One row in, one row out, in order: a row whose image is
missing, or that cannot be used at all, is still a sample, counted by its reason.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmray import storage
from mmray.archive.columns import GUESSED
from mmray.archive.rows import LABEL, Sample, reason
from mmray.archive.shards import Shard, kind_of, list_archive, list_shards, read_shard
from mmray.archive.tables import TABLE_SUFFIXES, Pair, Table
from mmray.archive.want import ALL_FIELDS
from mmray.archive.writers import PACK_ERROR, ParquetWriter, TarWriter, column_types
from mmray.config import Columns
from mmray.errors import ConfigError, NotFound

Format = Literal["tar", "parquet"]
Progress = Callable[[int, int | None], None]  # rows done, of how many (None: not known)
EXAMPLES = 20  # missing images and shard problems named in a report


@dataclass(slots=True)
class PackReport:
    """What ``pack`` did. ``errors`` counts rows that cannot be used by reason; ``missing_images``
    those whose image file is not there; ``problems`` are the source's broken shards."""

    source: str
    dest: str
    format: Format
    rows: int = 0
    shards: int = 0
    bytes: int = 0
    images: int = 0
    captions: int = 0
    labels: int = 0
    missing_images: int = 0
    missing_examples: list[str] = field(default_factory=list)
    renamed_keys: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    columns: dict[str, str | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.dest}: {self.rows:,} pairs in {self.shards:,} {self.format} shards, "
            f"{self.bytes:,} bytes; {self.images:,} with image, {self.captions:,} with caption, "
            f"{self.labels:,} with label"
        ]
        if self.missing_images:
            named = ", ".join(self.missing_examples[:3])
            lines.append(f"  image file missing: {self.missing_images:,} (first: {named})")
        lines += [f"  {name}: {count:,}" for name, count in sorted(self.errors.items())]
        if self.renamed_keys:
            lines.append(f"  keys made safe or unique: {self.renamed_keys:,} (see original_key)")
        lines += [f"  source {problem}" for problem in self.problems]
        return "\n".join(lines)


def pack(
    source: str,
    dest: str,
    *,
    format: Format = "tar",
    shard_rows: int = 1000,
    columns: Columns = GUESSED,
    label: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Write ``source`` as shards of ``shard_rows`` pairs into ``dest``.

    ``source`` is a .csv, .tsv or .jsonl file with image paths relative to it, a folder with one
    such file at its top, or an archive (a folder with both is an archive). ``columns`` and
    ``label`` name its columns; the label is written as ``label``, further columns as they are.
    ``overwrite`` removes shards that stand in ``dest``. Each shard is written whole or not at all.
    Raises ConfigError for a source or destination that will not do, before anything is written,
    and StorageError.
    """
    if shard_rows < 1:
        raise ConfigError(f"shard_rows: got {shard_rows}; must be at least 1")
    opened = _open(source, columns)
    _prepare(opened, dest, overwrite)
    total, types = _scan(opened, label, format)
    report = PackReport(source, dest, format, columns=opened.columns)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = (_labelled(pair, label) for pair in opened.pairs())
        for first in pairs:
            path = Path(scratch) / f"{report.shards:05d}.{format}"
            shard = chain([first], islice(pairs, shard_rows - 1))
            writer = TarWriter(path) if format == "tar" else ParquetWriter(path, types)
            with closing(writer):
                for pair in shard:
                    writer.add(pair, pair.key or f"{report.rows:09d}")
                    _count(report, pair)
                    if progress is not None:
                        progress(report.rows, total)
            storage.write_file(storage.join(dest, path.name), path)
            report.renamed_keys += writer.renamed
            report.bytes += path.stat().st_size
            report.shards += 1
            path.unlink()
    report.problems = opened.problems
    if label is not None and not report.labels:
        report.problems.append(f"{source}: no row has a label {label!r}")
    return report


def _count(report: PackReport, pair: Pair) -> None:
    report.rows += 1
    report.images += pair.image is not None
    report.captions += pair.caption is not None
    report.labels += pair.fields.get(LABEL) is not None
    if pair.missing is not None:
        report.missing_images += 1
        if len(report.missing_examples) < EXAMPLES:
            report.missing_examples.append(pair.missing)
    if pair.error is not None:
        name = reason(pair.error)
        report.errors[name] = report.errors.get(name, 0) + 1


def _labelled(pair: Pair, label: str | None) -> Pair:
    """The named label column is called ``label``, as training looks for it."""
    if label is None or label == LABEL or label not in pair.fields:
        return pair
    names = {label: LABEL, LABEL: f"source_{LABEL}"}
    fields = {names.get(name, name): value for name, value in pair.fields.items()}
    return dataclasses.replace(pair, fields=fields)


def _scan(
    opened: Table | _Archive, label: str | None, format: Format
) -> tuple[int | None, dict[str, pa.DataType]]:
    """Rows to come and the further columns' types. Before anything is written a table is checked
    whole; an archive is walked, without its images, only where Parquet needs the types."""
    if isinstance(opened, _Archive) and format == "tar":
        return None, {}
    rows = 0

    def fields() -> Iterator[Mapping[str, Any]]:
        nonlocal rows
        for pair in opened.scan():
            rows += 1
            yield _labelled(pair, label).fields

    types = column_types(fields())
    return rows, types | {PACK_ERROR: pa.string()}


# --- source and destination ----------------------------------------------------------------------


class _Archive:
    """An archive as a source. ``problems`` fills while its pairs are read."""

    def __init__(self, root: str, columns: Columns) -> None:
        self.uri = root
        self.problems: list[str] = []
        self.columns: dict[str, str | None] = {}
        self._columns = columns

    def scan(self) -> Iterator[Pair]:
        """The pairs without their images."""
        return self._read(images=False)

    def pairs(self) -> Iterator[Pair]:
        self.problems = []
        return self._read(images=True)

    def _read(self, images: bool) -> Iterator[Pair]:
        for shard in list_shards(self.uri):
            for item in read_shard(
                self.uri, shard, columns=self._columns, fields=ALL_FIELDS, images=images
            ):
                if isinstance(item, Sample):
                    yield _pair(item)
                elif item.problem is not None and len(self.problems) < EXAMPLES:
                    self.problems.append(f"{item.shard}: {item.problem}")


def _pair(sample: Sample) -> Pair:
    """A sample that cannot be used keeps its row, key, fields and reason: with its image or its
    caption it would be taken for a sound one."""
    if sample.error is not None:
        return Pair(sample.key, fields=sample.fields, error=sample.error)
    return Pair(sample.key, sample.image, "", sample.caption, sample.fields)


def _open(source: str, columns: Columns) -> Table | _Archive:
    name = source.lower()
    if name.endswith(TABLE_SUFFIXES):
        return Table(source, columns)
    if kind_of(source) is None:
        tables = []
        for item in list_archive(source):
            if isinstance(item, Shard):
                return _Archive(source, columns)
            if "/" not in item.path and item.path.lower().endswith(TABLE_SUFFIXES):
                tables.append(item.path)
        if len(tables) == 1:
            return Table(storage.join(source, tables[0]), columns)
        what = f"several tables ({', '.join(tables)}); name one" if tables else "none of them"
        raise ConfigError(
            f"{source}: must hold shards (.tar, .tar.gz, .tgz, .parquet), or a "
            f"{', '.join(TABLE_SUFFIXES)} table at its top; it has {what}"
        )
    return _Archive(source, columns)


def _prepare(opened: Table | _Archive, dest: str, overwrite: bool) -> None:
    """Nothing may stand where the shards go: old ones would be taken for part of the archive."""
    if kind_of(dest) is not None or (not storage.is_s3(dest) and Path(dest).is_file()):
        raise ConfigError(f"{dest}: names a file; give a directory or s3:// prefix for the shards")
    if isinstance(opened, _Archive) and overlaps(opened.uri, dest):
        raise ConfigError(f"{dest}: overlaps the source {opened.uri}; choose another place")
    try:
        first = next(iter(list_shards(dest)), None)
    except NotFound:
        if storage.is_s3(dest):
            raise
        return
    if first is None:
        return
    if not overwrite:
        raise ConfigError(f"{dest}: already holds shards ({first.path}); choose an empty place")
    for shard in list(list_shards(dest)):
        storage.delete(storage.join(dest, shard.path))


def overlaps(one: str, other: str) -> bool:
    """Whether either place is the other, or lies in it."""
    a, b = _real(one), _real(other)
    return f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/")


def _real(uri: str) -> str:
    return storage.absolute(uri) if storage.is_s3(uri) else str(Path(uri).resolve())
