"""One shard being written: a WebDataset tar or a Parquet file, the same bytes every time."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.archive.rows import CAPTION, IMAGE, KEY
from mmray.archive.tables import Pair
from mmray.archive.tar import IMAGE_EXTENSIONS
from mmray.archive.want import whole_text

PACK_ERROR = "pack_error"  # the field that keeps why a source's row cannot be used
MAX_KEY_CHARS = 90  # with an extension, what a plain tar header holds
GROUP_ROWS = 256
GROUP_BYTES = 64 << 20
PAGE_ROWS = 16  # between looks at a page's size; images fill pages quickly
_UNSAFE = re.compile(r'[./\\:*?"<>|\x00-\x1f\x7f]')

#: How the formats begin, for images whose file name does not say.
SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"\0\0\0\x0cjP  ", "jp2"),
)


class TarWriter:
    """``<key>.<image>``, ``<key>.txt``, ``<key>.json`` a pair; USTAR, or pax for long names.

    ``renamed`` counts keys that had to change; ``.json`` then has the ``original_key``.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._keys: set[str] = set()
        self.renamed = 0

    def add(self, pair: Pair, key: str) -> None:
        name = self._name(key)
        fields = dict(pair.fields)
        if pair.caption is None and CAPTION in fields:  # a reader would take it for the caption
            fields["source_caption"] = fields.pop(CAPTION)
        if name != key:
            fields["original_key"] = whole_text(key)
            self.renamed += 1
        if pair.error is not None:
            fields[PACK_ERROR] = whole_text(pair.error)
        if pair.image is not None:
            self.member(f"{name}.{image_extension(pair.suffix, pair.image)}", pair.image)
        if pair.caption is not None:
            self.member(f"{name}.txt", pair.caption.encode())
        if fields or (pair.image is None and pair.caption is None):
            self.member(f"{name}.json", json.dumps(fields, ensure_ascii=False).encode())

    def close(self) -> None:
        self._file.write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._file.write(b"\0" * (-self._file.tell() % tarfile.RECORDSIZE))
        self._file.close()

    def _name(self, key: str) -> str:
        """A member name for ``key``: no dots or slashes, not one that this shard has already."""
        safe = _UNSAFE.sub("_", whole_text(key))[:MAX_KEY_CHARS] or "_"
        name, number = safe, 1
        while name in self._keys:
            number += 1
            name = f"{safe}-{number}"
        self._keys.add(name)
        return name

    def member(self, name: str, data: bytes) -> None:
        """One file of the tar, under a name that is not from outside."""
        info = tarfile.TarInfo(name)  # mtime, uid, gid 0: the same pairs give the same bytes
        info.size = len(data)
        self._file.write(info.tobuf(tarfile.PAX_FORMAT))
        self._file.write(data)
        self._file.write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))


class ParquetWriter:
    """Columns ``key``, ``image``, ``caption`` and the further ones, in row groups of some MB."""

    def __init__(self, path: Path, types: Mapping[str, pa.DataType]) -> None:
        columns = {KEY: pa.string(), IMAGE: pa.binary(), CAPTION: pa.string()}
        self._schema = pa.schema([*columns.items(), *types.items()])
        self._file = pq.ParquetWriter(
            path, self._schema, compression="none", write_batch_size=PAGE_ROWS
        )
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self.renamed = 0

    def add(self, pair: Pair, key: str) -> None:
        row = {column_of(name): value for name, value in pair.fields.items()}
        if pair.error is not None:
            row[PACK_ERROR] = whole_text(pair.error)
        row |= {KEY: whole_text(key), IMAGE: pair.image, CAPTION: pair.caption}
        self._rows.append(row)
        self._bytes += len(pair.image or b"")
        if len(self._rows) == GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        arrays = [
            pa.array([fit(row.get(field.name), field.type) for row in self._rows], field.type)
            for field in self._schema
        ]
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows, self._bytes = [], 0


def column_of(name: str) -> str:
    """The Parquet column of a further field, clear of the pair's own columns."""
    return f"source_{name}" if name in (KEY, IMAGE, CAPTION) else name


def column_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """The narrowest type each field's values all fit: bool, int64, float64, else string."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds = found.setdefault(column_of(name), set())
            if value is not None:
                kinds.add(_kind(value))
    return {name: _type(kinds) for name, kinds in found.items()}


def fit(value: Any, kind: pa.DataType) -> Any:
    """``value`` as a column of this type takes it; what is no text becomes JSON."""
    if pa.types.is_string(kind) and value is not None and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if pa.types.is_float64(kind) and value is not None:
        return float(value)
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "text"
    return "float" if isinstance(value, float) else "text"


def _type(kinds: set[str]) -> pa.DataType:
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int"}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {"int", "float"} else pa.string()


def image_extension(suffix: str, image: bytes) -> str:
    """That of the file's name, else from its content; jpg for what nobody knows, so that readers
    see an image to set aside."""
    if suffix in IMAGE_EXTENSIONS:
        return suffix
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((name for start, name in SIGNATURES if image.startswith(start)), "jpg")
