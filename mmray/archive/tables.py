"""CSV and JSONL tables that name an image file a row, as ``pack`` reads them."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmray import storage
from mmray.archive.columns import CAPTION_NAMES
from mmray.archive.rows import MAX_IMAGE_BYTES
from mmray.archive.want import too_large, whole_text
from mmray.config import Columns
from mmray.errors import ConfigError, NotFound

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (*DELIMITERS, *JSON_LINES)
PATH_NAMES = (
    "image", "image_path", "image_file", "img", "img_path", "file", "file_name", "filename",
    "file_path", "filepath", "path",
)  # fmt: skip
KEY_NAMES = ("key", "__key__", "id", "guid")
_DRIVE = re.compile(r"[A-Za-z]:|//")


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair on its way into an archive.

    ``suffix`` is the image file's, without the dot, or "". ``error`` is why the pair cannot be
    used; then it has neither image nor caption. ``missing`` names an image that is not there.
    """

    key: str | None = None
    image: bytes | None = None
    suffix: str = ""
    caption: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class _Line:
    """One row of a table: its values by column, or what is wrong with it."""

    values: Mapping[str, Any]
    error: str | None = None


class Table:
    """A table and the folder its image paths start from.

    Raises ConfigError where it is no such table, or a path leads out of the folder.
    """

    def __init__(self, uri: str, columns: Columns) -> None:
        self.uri = uri
        self.folder = uri.rpartition("/")[0] or "."
        self.problems: list[str] = []
        names = self._names()
        self._image = _column(uri, "image", columns.image, PATH_NAMES, names)
        self._caption = _column(uri, "caption", columns.caption, CAPTION_NAMES, names)
        self._key = next((name for name in KEY_NAMES if name in names), None)
        if self._image is None:
            raise ConfigError(
                f"{uri}: no column with image paths; there are {', '.join(names)}; name it with "
                "--image-column"
            )

    @property
    def columns(self) -> dict[str, str | None]:
        """What was taken for the image path, the caption and the key."""
        return {"image": self._image, "caption": self._caption, "key": self._key}

    def scan(self) -> Iterator[Pair]:
        """Each row without its image, after a check that no path leads out of the folder."""
        for number, line in enumerate(self._lines(), start=1):
            self._path(line, number)
            yield Pair(fields=self._fields(line))

    def pairs(self) -> Iterator[Pair]:
        """Each row with its image read. Raises StorageError."""
        for number, line in enumerate(self._lines(), start=1):
            yield self._pair(line, number)

    def _pair(self, line: _Line, number: int) -> Pair:
        key = line.values.get(self._key) if self._key else None
        name = None if key in (None, "") else str(key)
        fields = self._fields(line)
        caption = line.values.get(self._caption) if self._caption else None
        error = line.error or _caption_error(caption)
        path = self._path(line, number)
        if error is not None:
            return Pair(name, fields=fields, error=error)
        if path is None:
            return Pair(name, caption=caption, fields=fields, missing="(no path)")
        try:
            with storage.open_read(storage.join(self.folder, path)) as stream:
                image = stream.read(MAX_IMAGE_BYTES + 1)
        except NotFound:
            return Pair(name, caption=caption, fields=fields, missing=path)
        if len(image) > MAX_IMAGE_BYTES:
            error = too_large(len(image), MAX_IMAGE_BYTES)
            return Pair(name, fields=fields, error=error)
        suffix = posixpath.splitext(path)[1].lstrip(".").lower()
        return Pair(name, image, suffix, caption, fields)

    def _fields(self, line: _Line) -> dict[str, Any]:
        return {
            name: whole_text(value)
            for name, value in line.values.items()
            if name not in (self._image, self._caption) and value not in (None, "")
        }

    def _path(self, line: _Line, number: int) -> str | None:
        path = line.values.get(self._image) if self._image else None
        if path is None or path == "":
            return None
        plain = str(path).replace("\\", "/")
        steps = posixpath.normpath(plain).split("/")
        if plain.startswith("/") or _DRIVE.match(plain) or ".." in steps or "\0" in plain:
            raise ConfigError(
                f"{self.uri}: row {number}: image path {path!r} leads out of {self.folder}; paths "
                "must be relative to the table and stay below its folder"
            )
        return str(path)

    # --- formats ---------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        delimiter = DELIMITERS.get(_suffix(self.uri))
        if delimiter is not None:
            with self._text() as text:
                header = next(csv.reader(text, delimiter=delimiter), [])
        else:
            names: dict[str, None] = {}
            for line in self._lines():
                names |= dict.fromkeys(line.values)
            header = list(names)
        if not header or len(set(header)) < len(header):
            raise ConfigError(f"{self.uri}: needs a header of distinct columns, got {header}")
        return header

    def _lines(self) -> Iterator[_Line]:
        delimiter = DELIMITERS.get(_suffix(self.uri))
        with self._text() as text:
            if delimiter is None:
                yield from (_json_line(line) for line in text if line.strip())
            else:
                yield from self._csv_lines(text, delimiter)

    def _csv_lines(self, text: io.TextIOBase, delimiter: str) -> Iterator[_Line]:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            for cells in reader:
                if len(cells) > len(names):
                    error = f"more cells than columns: {len(cells)} cells, {len(names)} columns"
                    yield _Line(dict(zip(names, cells, strict=False)), error)
                elif cells:
                    yield _Line(dict(zip(names, cells, strict=False)))
        except csv.Error as error:
            raise ConfigError(f"{self.uri}: line {reader.line_num}: {error}") from None

    def _text(self) -> io.TextIOWrapper:
        """Bytes that are not UTF-8 come as lone surrogates, and are told row by row."""
        stream = storage.open_read(self.uri)
        return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")


def _suffix(uri: str) -> str:
    return posixpath.splitext(uri)[1].lower()


def _json_line(line: str) -> _Line:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Line({}, f"line unreadable: {error}")
    if not isinstance(record, dict):
        return _Line({}, f"line unreadable: an object was expected, got {type(record).__name__}")
    return _Line(record)


def _caption_error(caption: Any) -> str | None:
    if caption is not None and not isinstance(caption, str):
        return f"caption not text: got a {type(caption).__name__}"
    if caption is not None and whole_text(caption) != caption:
        return "caption not UTF-8: in the table"
    return None


def _column(
    uri: str, what: str, named: str | None, guesses: tuple[str, ...], names: list[str]
) -> str | None:
    if named is not None:
        if named not in names:
            raise ConfigError(f"{uri}: no column {named!r}; there are {', '.join(names)}")
        return named
    found = [name for name in names if name.lower() in guesses]
    if len(found) > 1:
        raise ConfigError(
            f"{uri}: {what} column is ambiguous: {', '.join(found)}; name one with --{what}-column"
        )
    return found[0] if found else None
