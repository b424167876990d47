"""Hand out what a run set aside, as its archive holds it: WebDataset tars and a manifest.

The tars are an archive that every verb reads: a pair is set aside there for what is wrong with its
own bytes, too. No name in them comes from the archive: a pair is called
``<ordinal of its shard>-<row>``.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mmray import ledger, rejects, storage
from mmray.archive import rows
from mmray.archive.originals import Original, originals
from mmray.archive.pack import Progress, overlaps
from mmray.archive.tar import MAX_TEXT_BYTES, TEXT_EXTENSIONS
from mmray.archive.want import whole_text
from mmray.archive.writers import TarWriter
from mmray.config import Columns, validate
from mmray.errors import ConfigError, NotFound
from mmray.scoring_run import RUN, Run, read_run
from mmray.targets import Target

MANIFEST = "manifest.csv"
#: ``file``: the pair's first in ``tar``, its image where it has one; both empty when nothing could
#: be handed out. ``caption``: as text, however broken, and no longer than this.
COLUMNS = (
    "tar", "file", rows.SHARD, rows.ROW, rows.KEY, rows.ERROR, rows.ERROR_STAGE, rows.CAPTION,
)  # fmt: skip
CAPTION_CHARS = 1000
TAR_ROWS, TAR_BYTES = 1000, 256 << 20


@dataclass(slots=True)
class Export:
    """What was handed out: ``rows`` in the manifest, ``without_bytes`` those of them that the
    archive has nothing readable of, ``files`` in ``tars``, and their ``bytes``."""

    dest: str
    rows: int = 0
    without_bytes: int = 0
    files: int = 0
    tars: int = 0
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        nothing = f", {self.without_bytes:,} without bytes to read" if self.without_bytes else ""
        return (
            f"{self.dest}: {self.rows:,} rows in {MANIFEST}{nothing}; {self.files:,} files, "
            f"{self.bytes:,} bytes in {self.tars:,} tars"
        )


def export(
    out: str, dest: str, *, reasons: Sequence[str] = (), progress: Progress | None = None
) -> Export:
    """Write the pairs that OUT set aside (``reasons`` as for ``rejects.asked``) into ``dest``.

    One pair's file is in memory at a time, and one tar on the local disk. The manifest is written
    last. Raises ConfigError when ``dest`` is not empty or lies where shards or scores are looked
    for, NotFound when OUT holds no run, StorageError.
    """
    out, dest = storage.absolute(out), storage.absolute(dest)
    run = read_run(out)
    _check_dest(out, run, dest)
    columns = validate(Columns, run.config.get("columns") or {}, storage.join(out, RUN))
    report = Export(dest)
    with tempfile.TemporaryDirectory() as scratch:
        manifest, tars = Path(scratch, MANIFEST), _Tars(report, Path(scratch))
        with manifest.open("w", encoding="utf-8", newline="") as text:
            lines = csv.DictWriter(text, COLUMNS)
            lines.writeheader()
            found = ledger.committed(out, run, lambda record: rejects.counted(record, reasons))
            for ordinal, target, counted in found:
                if counted:
                    rejected = rejects.read(out, target.shard.path, reasons).to_pylist()
                    lines.writerows(_shard(run, columns, ordinal, target, rejected, tars))
                    report.rows += len(rejected)
                    if progress is not None:
                        progress(report.rows, None)
        tars.close()
        storage.write_file(storage.join(dest, MANIFEST), manifest)
    report.without_bytes = report.rows - tars.rows
    return report


def _check_dest(out: str, run: Run, dest: str) -> None:
    for place in (run.archive, storage.join(out, ledger.SCORES), storage.join(out, "_run")):
        if overlaps(place, dest):
            raise ConfigError(f"{dest}: overlaps {place}; choose another place")
    try:
        first = next(iter(storage.list_objects(dest)), None)
    except NotFound:
        if storage.is_s3(dest):
            raise
        return
    if first is not None:
        raise ConfigError(f"{dest}: is not empty ({first.path}); choose an empty place")


def _shard(
    run: Run,
    columns: Columns,
    ordinal: int,
    target: Target,
    rejected: list[dict[str, Any]],
    tars: _Tars,
) -> Iterator[dict[str, Any]]:
    """The manifest's lines for one shard, when its pairs are in ``tars``."""
    lines = {row[rows.ROW]: {rows.SHARD: target.shard.path, **row} for row in rejected}
    files = originals(run.archive, target.shard, lines.keys(), columns)
    for row, pair in groupby(files, key=lambda file: file.row):
        tars.begin_pair()
        lines[row] |= _pair(f"{ordinal:06d}-{row:09d}", pair, columns, tars)
    yield from lines.values()


def _pair(stem: str, pair: Iterable[Original], columns: Columns, tars: _Tars) -> dict[str, Any]:
    """Put a pair's files into the tar; what the manifest says of them."""
    seen, names = Counter[str](), []
    texts: dict[str, bytes] = {}
    for file in pair:
        again = f"{seen[file.extension]}." if file.extension in seen else ""
        seen[file.extension] += 1
        names.append(f"{stem}.{again}{file.extension}")
        tars.add(names[-1], file.data)
        if file.extension in TEXT_EXTENSIONS and len(file.data) <= MAX_TEXT_BYTES:
            texts.setdefault(file.extension, file.data)
    first = min(names, key=lambda name: name.endswith(TEXT_EXTENSIONS))
    caption = _caption(texts, columns.caption)[:CAPTION_CHARS]
    return {"tar": tars.name, "file": first, rows.CAPTION: caption}


def _caption(texts: dict[str, bytes], named: str | None) -> str:
    """The caption to show, whatever is wrong with it; empty where there is none."""
    try:
        record = json.loads(texts.get("json", b"{}"))
    except (ValueError, RecursionError):
        record = {}
    fields = record if isinstance(record, dict) else {}
    if "txt" in texts and named not in fields:
        return texts["txt"].decode("utf-8", "replace")
    caption = fields.get(named or rows.CAPTION)
    return "" if caption is None else str(whole_text(str(caption)))


class _Tars:
    """Pairs into tars of some size, each written whole."""

    def __init__(self, report: Export, scratch: Path) -> None:
        self._report, self._scratch = report, scratch
        self._tar: TarWriter | None = None
        self._full_at = (0, 0)  # pairs and bytes
        self.rows = 0

    @property
    def name(self) -> str:
        return f"{self._report.tars:05d}.tar"

    def begin_pair(self) -> None:
        if self._tar is not None and (
            self.rows >= self._full_at[0] or self._report.bytes >= self._full_at[1]
        ):
            self.close()
        if self._tar is None:
            self._tar = TarWriter(self._scratch / self.name)
            self._full_at = self.rows + TAR_ROWS, self._report.bytes + TAR_BYTES
        self.rows += 1

    def add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        self._tar.member(name, data)
        self._report.files += 1
        self._report.bytes += len(data)

    def close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self._scratch / self.name
        storage.write_file(storage.join(self._report.dest, self.name), path)
        path.unlink()
        self._tar = None
        self._report.tars += 1
