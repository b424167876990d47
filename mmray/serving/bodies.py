"""Request bodies -> samples: multipart, JSON and NDJSON; decode, without a server.

Whatever cannot be read raises Refused, or, for one pair of several, stands in its place. Nothing is
fetched from anywhere: a picture is in the request, or there is none.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartState, parse_options_header

from mmray.archive.rows import Sample
from mmray.serving.answers import Refused
from mmray.serving.settings import Limits

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

JSON, FORM = "application/json", "multipart/form-data"
NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")
FIELDS = ("image", "caption")
MAX_PARTS = 8
MARKS = 8  # of JSON around a pair: brackets, commas
NOT_UTF8 = "caption not UTF-8"

Item = Sample | Refused


class One:
    """The body of a request with one pair, taken as it comes: the bytes of a form are looked at
    while they are in a cache, and copied once."""

    def __init__(self, content_type: str, limits: Limits) -> None:
        self._content_type, self._limits = content_type, limits
        self._kind, options = _content_type(content_type)
        self._form = _Form(options) if self._kind == FORM else None
        self._chunks: list[bytes] = []

    def take(self, chunk: bytes) -> None:
        """The bytes that come next. What is wrong with them is told at the end: a body is read
        whole before it is answered."""
        if self._form is not None:
            self._form.take(chunk)
        elif self._kind == JSON:
            self._chunks.append(chunk)

    def sample(self) -> Sample:
        """The pair, when all bytes are there. Raises Refused: 400, 413, 415 or 422."""
        if self._form is not None:
            return _sample(self._form.given(), 0, self._limits)
        if self._kind == JSON:
            return _sample(_pair(_json(b"".join(self._chunks), self._limits)), 0, self._limits)
        raise _unknown(self._content_type, (FORM, JSON))


def several(chunks: Sequence[bytes], content_type: str, limits: Limits) -> list[Item]:
    """The pairs in the body of a request with several; what is wrong with one is in its place.

    Raises Refused for a body that is no list at all, is empty or holds too many.
    """
    kind, body = _content_type(content_type)[0], b"".join(chunks)
    if kind == JSON:
        items = _json(body, limits, limits.batch_items)
        if not isinstance(items, list):
            raise Refused(422, "not a list", f"got {_kind(items)}; a list of pairs")
    elif kind in NDJSON:
        lines = body.count(b"\n")
        if lines > 2 * limits.batch_items:  # some may be empty
            raise Refused(413, "too many pairs", f"{lines} lines; at most {limits.batch_items}")
        items = [line for line in body.split(b"\n") if line.strip()]
    else:
        raise _unknown(content_type, (JSON, *NDJSON))
    if not items:
        raise Refused(422, "no pairs", "the list is empty")
    if len(items) > limits.batch_items:
        raise Refused(413, "too many pairs", f"got {len(items)}; at most {limits.batch_items}")
    found: list[Item] = []
    for i, item in enumerate(items):
        try:
            tree = _json(item, limits) if isinstance(item, bytes) else item
            found.append(_sample(_pair(tree), i, limits))
        except Refused as refused:
            found.append(refused)
    return found


# --- a pair --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Given:
    """What a request gives for a pair, as bytes where it came as bytes."""

    image: bytes | None = None
    caption: str | bytes | None = None


def _sample(given: _Given, row: int, limits: Limits) -> Sample:
    caption, error = given.caption, None
    if isinstance(caption, bytes):
        try:
            caption = caption.decode()
        except UnicodeDecodeError as wrong:
            caption, error = None, f"{NOT_UTF8}: {wrong.reason} at position {wrong.start}"
    if caption is not None and len(caption) > limits.caption_chars:
        raise Refused(
            413, "caption too long", f"{len(caption)} characters, cap {limits.caption_chars}"
        )
    stage = None if error is None else "caption"
    return Sample("request", row, str(row), given.image, caption, error=error, error_stage=stage)


def _pair(tree: Any) -> _Given:
    """A JSON object's pair."""
    if not isinstance(tree, dict):
        raise Refused(
            422, "not a pair", f"got {_kind(tree)}; an object with {' and '.join(FIELDS)}"
        )
    _check_names(tree)
    for name in FIELDS:
        if not isinstance(tree.get(name), (str, type(None))):
            raise Refused(422, f"{name} not text", f"got {_kind(tree[name])}")
    text = tree.get("image")
    if text is None:
        return _Given(None, tree.get("caption"))
    try:
        image = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Refused(
            422, "image not base64", "a picture in JSON is its bytes in base64 (RFC 4648, 4)"
        ) from None
    return _Given(image, tree.get("caption"))


def _check_names(found: Any) -> None:
    for name in found:
        if name not in FIELDS:
            raise Refused(
                422,
                "unknown field",
                f"got {str(name)[:40]!r}; a pair has {' and '.join(FIELDS)}, and no URL is fetched",
            )


def _json(body: bytes, limits: Limits, pairs: int = 1) -> Any:
    """What ``body`` says; nothing is built for one that says more than ``pairs`` pairs can."""
    most = pairs * (limits.caption_chars + MARKS)
    if sum(map(body.count, (b"[", b"{", b","))) > most:
        raise Refused(413, "too many values", f"no {pairs} pairs have more than {most}")
    try:
        return json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise Refused(400, "body not UTF-8", f"{error.reason} at {error.start}") from None
    except RecursionError:
        raise Refused(400, "body not JSON", "nested too deep") from None
    except ValueError as error:
        raise Refused(400, "body not JSON", str(error)[:100]) from None


def _kind(tree: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(tree), "a number")


# --- multipart (RFC 7578) ------------------------------------------------------------------------


@dataclass(slots=True)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: list[memoryview] = field(default_factory=list)  # of chunks, not copied

    def name_and_file(self) -> tuple[str, bool]:
        _, options = parse_options_header(self.headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise _not_a_form("a part without a name")
        return options[b"name"].decode("utf-8", "replace"), b"filename" in options


class _Parts:
    """The parts of a body, in memory; python-multipart calls back."""

    def __init__(self) -> None:
        self.found: list[_Part] = []
        self._name = b""
        self._value = b""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self.on_part_begin,
            "on_header_field": self.on_header_field,
            "on_header_value": self.on_header_value,
            "on_header_end": self.on_header_end,
            "on_part_data": self.on_part_data,
        }

    def on_part_begin(self) -> None:
        if len(self.found) == MAX_PARTS:
            raise Refused(413, "too many parts", f"more than {MAX_PARTS}")
        self.found.append(_Part())

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self.found[-1].headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.found[-1].data.append(memoryview(data)[start:end])


class _Form:
    """A form, as it comes; remembers what is wrong with it."""

    def __init__(self, options: dict[bytes, bytes]) -> None:
        self._parts = _Parts()
        self._wrong: Refused | None = None
        boundary = options.get(b"boundary")
        if not boundary:
            self._wrong = _not_a_form("its Content-Type names no boundary")
            return
        with self._noting():
            self._parser = MultipartParser(boundary, self._parts.callbacks())

    def take(self, chunk: bytes) -> None:
        if self._wrong is None:
            with self._noting():
                self._parser.write(chunk)

    def given(self) -> _Given:
        """The pair in it, when all is there; raises Refused."""
        if self._wrong is None and self._parser.state is not MultipartState.END:
            self._wrong = _not_a_form("it ends before its closing boundary")
        if self._wrong is not None:
            raise self._wrong
        given = _Given()
        for name, is_file, data in _named(self._parts):
            if name == "image" and not is_file:
                raise Refused(422, "image not a file", "give the part image a filename")
            if getattr(given, name) is not None:
                raise Refused(422, f"two parts {name}", "a pair has one")
            setattr(given, name, data)
        return given

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except FormParserError as error:
            self._wrong = _not_a_form(str(error)[:100])
        except Refused as refused:
            self._wrong = refused


def _not_a_form(why: str) -> Refused:
    return Refused(400, "body not multipart", why)


def _named(parts: _Parts) -> Iterator[tuple[str, bool, bytes]]:
    for part in parts.found:
        name, is_file = part.name_and_file()
        _check_names([name])
        data = b"".join(part.data)
        part.data.clear()  # nor are they kept
        yield name, is_file, data


# --- headers -------------------------------------------------------------------------------------


def _content_type(header: str) -> tuple[str, dict[bytes, bytes]]:
    kind, options = parse_options_header(header)
    return kind.decode("latin-1"), options


def _unknown(header: str, allowed: tuple[str, ...]) -> Refused:
    return Refused(
        415, "content type not supported", f"got {header[:80]!r}; send {' or '.join(allowed)}"
    )
