"""Which columns of a Parquet file hold the image, the caption and the key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from mmray.config import Columns
from mmray.errors import ConfigError

#: Names that are taken for an image or a caption where none is given; compared in lower case.
IMAGE_NAMES = (
    "image", "images", "img", "image_bytes", "image_data", "jpg", "jpeg", "png", "webp", "picture",
    "photo",
)  # fmt: skip
CAPTION_NAMES = (
    "caption", "captions", "text", "txt", "sentence", "title", "alt_text", "description",
)  # fmt: skip
KEY_NAMES = ("__key__", "key", "id")
TYPES = "images are binary or struct<bytes, path>, captions are strings"
NAMES_SHOWN = 30  # of a file's columns, in a message

GUESSED = Columns()


@dataclass(frozen=True, slots=True)
class Found:
    """Column names; None where there is no such column. ``image_path`` is what to ask Parquet
    for: ``image.bytes`` where the column is Hugging Face's ``struct<bytes, path>``."""

    image: str | None
    image_path: str | None
    caption: str | None
    key: str | None
    others: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        return self.image is None and self.caption is None


def find_columns(schema: pa.Schema, columns: Columns) -> Found:
    """The columns that ``columns`` names, or that names and types suggest.

    Raises ConfigError, naming the columns there are, when a named column is missing or of another
    type, or when several could be meant. Finding none is no error: an archive may have no images.
    """
    image = _find(schema, "image", columns.image, IMAGE_NAMES, _is_image)
    caption = _find(schema, "caption", columns.caption, CAPTION_NAMES, _is_caption)
    taken = [name for name in (image, caption) if name is not None]
    key = next((n for n in KEY_NAMES if schema.names.count(n) == 1 and n not in taken), None)
    return Found(
        image=image,
        image_path=_bytes_of(schema, image),
        caption=caption,
        key=key,
        others=tuple(n for n in schema.names if n not in taken and schema.names.count(n) == 1),
    )


def require(schema: pa.Schema, columns: Columns, fields: Sequence[str], where: str) -> Found:
    """``find_columns``, and every one of ``fields`` must be there too.

    Raises ConfigError that begins with ``where``.
    """
    try:
        found = find_columns(schema, columns)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for name in fields:
        if name not in schema.names:
            raise ConfigError(f"{where}: no column {name!r}; {_there(schema.names)}")
    return found


def none_found(schema: pa.Schema, what: str) -> str:
    """Says that no column looks like ``what`` and how to name one."""
    return f"no {what} column found; {_there(schema.names)}; name it ({_options(what)})"


def _find(
    schema: pa.Schema,
    what: str,
    named: str | None,
    names: Iterable[str],
    fits: Callable[[pa.DataType], bool],
) -> str | None:
    if named is not None:
        if schema.names.count(named) != 1:
            how = "several columns" if named in schema.names else "no column"
            raise ConfigError(f"{how} {named!r} for the {what}; {_there(schema.names)}")
        if not fits(schema.field(named).type):
            kind = schema.field(named).type
            raise ConfigError(f"{what} column {named!r} is {kind}; {TYPES}")
        return named
    found = [f.name for f in schema if f.name.lower() in names and fits(f.type)]
    if len(found) > 1:
        raise ConfigError(
            f"{what} column is ambiguous: {', '.join(found)}; name one ({_options(what)})"
        )
    return found[0] if found else None


def _options(what: str) -> str:
    name = what if what in Columns.model_fields else "image"
    return f"--{name}-column, data.columns.{name}"


def _there(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"there are {', '.join(names[:NAMES_SHOWN])}{more}"


def _bytes_of(schema: pa.Schema, image: str | None) -> str | None:
    if image is None:
        return None
    return f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_caption(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return is_text(kind) or _is_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
