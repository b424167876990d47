"""What is wanted of a shard: which rows, whether the pictures too, which further columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmray.archive.rows import MAX_IMAGE_BYTES

#: As ``fields``: every further column there is, nested values included.
ALL_FIELDS = ("*",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """Rows ``start`` <= row < ``stop`` for which ``skip(row)`` is not true.

    ``fields`` names the further columns to give; ``ALL_FIELDS`` gives them all. Without
    ``images``, an image that is there is given as ``b""``. Images of more than
    ``max_image_bytes`` encoded bytes are set aside unread. ``byte``, if known, is where in a tar
    the row ``start`` begins; else what precedes it is passed over.
    """

    fields: Sequence[str] = ()
    images: bool = True
    start: int = 0
    stop: int | None = None
    skip: Callable[[int], bool] | None = None
    max_image_bytes: int = MAX_IMAGE_BYTES
    byte: int = 0

    def row(self, row: int) -> bool:
        """Whether this row is to come out; asked once a row, in order."""
        if row < self.start or self.past(row):
            return False
        return self.skip is None or not self.skip(row)

    def past(self, row: int) -> bool:
        """Whether this row and all after it are out of the window."""
        return self.stop is not None and row >= self.stop

    @property
    def all_fields(self) -> bool:
        return tuple(self.fields) == ALL_FIELDS

    def pick(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The wanted ones of a row's further columns: JSON scalars and lists of them, or anything
        for ALL_FIELDS."""
        if self.all_fields:
            return {name: whole_text(value) for name, value in found.items()}
        return {
            name: whole_text(found[name])
            for name in self.fields
            if name in found and not _nested(found[name])
        }


def _nested(value: Any) -> bool:
    """Whether a JSON value is an object, or a list that holds more than scalars."""
    inner = value if isinstance(value, list) else [value]
    return any(isinstance(item, (dict, list)) for item in inner)


def whole_text(value: Any) -> Any:
    """``value`` with what no UTF-8 file can hold (lone surrogates) replaced by ``?``."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, (dict, list)):
        return json.loads(whole_text(json.dumps(value, ensure_ascii=False)))
    return value


def not_utf8(error: UnicodeError) -> str:
    """The row error for a caption that is no text."""
    start = getattr(error, "start", 0)
    return f"caption not UTF-8: {getattr(error, 'reason', error)} at position {start}"


def too_large(size: int, limit: int) -> str:
    """The row error for an image above the cap on encoded bytes."""
    return f"image too large: {size:,} bytes, at most {limit:,} are read"
