"""WebDataset tars: consecutive members with one key are one sample.

Keys and order are those of the ``webdataset`` library: the key is the path up to the first dot of
the file name, the rest, in lower case, says what the member is. An image extension makes it the
image, ``txt`` the caption, ``json`` further fields (its ``caption`` is the caption where there is
no ``txt``), ``cls`` the field ``cls``. Members with other extensions are passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from mmray.archive.members import Member, Members
from mmray.archive.rows import Sample, ShardEnd
from mmray.archive.want import Want, not_utf8, too_large, whole_text

#: What an image member's name may end in. The content decides the format, not the name.
IMAGE_EXTENSIONS = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif",
    "heic", "heif", "jp2", "j2k", "jxl", "ppm", "pgm", "pbm", "pnm", "ico", "tga", "psd",
))  # fmt: skip
TEXT_EXTENSIONS = ("txt", "json", "cls")
MAX_TEXT_BYTES = 1 << 20  # of a caption, json or cls member

# Both as in webdataset.tariterators (base_plus_ext, skip_meta).
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and lower-case extension; None for what belongs to no sample."""
    match = None if _META.match(name) else _NAME.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def read_tar(
    stream: BinaryIO, shard: str, want: Want, caption_field: str | None = None
) -> Iterator[Sample | ShardEnd]:
    """The wanted samples of a tar in order, then one ShardEnd. Raises what ``stream`` raises.

    ``caption_field`` names a field of ``.json`` to be the caption rather than ``.txt``, where it
    is there.
    """
    members = Members(stream, want.byte)
    ended: set[str] = set()
    group: _Group | None = None
    rows = want.start if want.byte else 0
    inside = False  # whether the last member belongs to the open group
    for member in members:
        name = split_name(member.name)
        inside = name is not None
        if name is None:
            continue
        key, extension = name
        if group is None or key != group.key:
            if group is not None:
                yield from group.sample()
            if want.past(rows):
                yield ShardEnd(shard, rows)
                return
            byte = member.begin if members.enterable else 0
            group = _Group(shard, rows, byte, key, want, caption_field)
            if key in ended:
                group.fail(f"key came back: {key!r} had already ended")
            ended.add(key)
            rows += 1
        group.take(extension, member, members)
    if group is not None:
        if inside and members.cut:
            group.cut(f"shard cut: {members.problem}")
        yield from group.sample()
    yield ShardEnd(shard, rows, members.problem)


class _Group:
    """The members of one sample, as they come."""

    def __init__(
        self, shard: str, row: int, byte: int, key: str, want: Want, caption_field: str | None
    ) -> None:
        self.key = key
        self._caption_field = caption_field
        self._shard = shard
        self._row = row
        self._byte = byte
        self._want = want
        self._wanted = want.row(row)
        self._image: bytes | None = None
        self._image_name = ""
        self._texts: dict[str, bytes | None] = {}  # by extension; None: too large
        self._error: str | None = None

    def fail(self, error: str) -> None:
        """Set the sample aside; the first error stands."""
        if self._error is None:
            self._error = error

    def cut(self, error: str) -> None:
        """The last member is incomplete, so none of the texts may be taken for the sample's."""
        self._error = error
        self._texts.clear()

    def take(self, extension: str, member: Member, members: Members) -> None:
        if not self._wanted:
            return
        known = extension.rpartition(".")[2] in IMAGE_EXTENSIONS
        if member.sparse and (known or extension in TEXT_EXTENSIONS):
            self.fail(f"sparse member: {member.name!r} is stored as a sparse file")
        elif known:
            self._take_image(extension, member, members)
        elif extension in TEXT_EXTENSIONS:
            if extension in self._texts:
                what = "captions" if extension == "txt" else f"{extension} members"
                self.fail(f"two {what} under one key: {member.name!r}")
            elif member.size > MAX_TEXT_BYTES:
                self._texts[extension] = None
            else:
                self._texts[extension] = members.payload()

    def _take_image(self, extension: str, member: Member, members: Members) -> None:
        if self._image_name:
            self.fail(f"two images under one key: .{self._image_name} and .{extension}")
            return
        self._image_name = extension
        if member.size > self._want.max_image_bytes:
            self.fail(too_large(member.size, self._want.max_image_bytes))
        else:
            self._image = members.payload() if self._want.images else b""

    def sample(self) -> Iterator[Sample]:
        """The sample, unless it is not wanted."""
        if not self._wanted:
            return
        record = self._record()
        caption = self._caption(record)
        fields = dict(record) if isinstance(record, dict) else {}
        if (label := self._texts.get("cls")) is not None:
            fields["cls"] = label.decode("utf-8", "replace").strip()
        yield Sample(
            shard=self._shard,
            row=self._row,
            key=self.key,
            image=self._image if self._error is None else None,
            caption=caption,
            fields=self._want.pick(fields),
            error=self._error,
            error_stage=None if self._error is None else "read",
            byte=self._byte,
        )

    def _record(self) -> dict[str, Any] | str:
        """What ``.json`` holds; {} without one, or where nobody asks; why it is unreadable."""
        asked = self._want.fields or self._caption_field or "txt" not in self._texts
        if "json" not in self._texts or not asked:
            return {}
        data = self._texts["json"]
        if data is None:
            return f"json too large: over {MAX_TEXT_BYTES:,} bytes"
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            return f"json unreadable: {error}"
        if not isinstance(record, dict):
            return f"json unreadable: an object was expected, got {type(record).__name__}"
        return record

    def _caption(self, record: dict[str, Any] | str) -> str | None:
        named = isinstance(record, dict) and self._caption_field in record
        if "txt" in self._texts and not named:
            return self._decoded(self._texts["txt"])
        if isinstance(record, str):
            self.fail(record)
            return None
        caption = record.get(self._caption_field or "caption")
        if caption is None:
            return None
        if not isinstance(caption, str):
            self.fail(f"caption not text: the json has a {type(caption).__name__}")
            return None
        if whole_text(caption) != caption:
            self.fail("caption not UTF-8: the json escapes half a surrogate pair")
            return None
        return caption

    def _decoded(self, data: bytes | None) -> str | None:
        if data is None:
            self.fail(f"caption too large: over {MAX_TEXT_BYTES:,} bytes")
            return None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(not_utf8(error))
            return None
