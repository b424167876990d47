"""The files in a tar, from a forward stream, that never ends silently.

``tarfile.open`` takes a damaged header in mid-file for the end of the archive and says nothing; a
shard would lose its tail unnoticed. So only the header codec of ``tarfile`` is used here.
Format: POSIX.1-2017 pax, section "ustar Interchange Format", and GNU tar's "Basic Tar Format".
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
END = b"\0" * BLOCK
GZIP_MAGIC = b"\x1f\x8b"
MAX_EXTENSION_BYTES = 1 << 20  # of a pax or long-name header; more is damage
READ_BYTES = 1 << 16

#: First bytes of what people rename to .tar, for the message.
FOREIGN = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; only gzip is read",
    b"BZh": "bzip2-compressed; only gzip is read",
    b"\xfd7zXZ": "xz-compressed; only gzip is read",
    b"<": "a web page or an error answer, perhaps",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar; its first header, extended ones included, is at byte ``begin`` of
    the (unpacked) tar."""

    name: str
    size: int
    begin: int
    sparse: bool = False


class Members:
    """Iterate over a tar's regular files; ``payload()`` gives the current one's bytes, once.

    Afterwards ``problem`` says what is wrong with the tar, or is None, ``cut`` whether the last
    member given is incomplete, and ``enterable`` whether it can be read from the middle: from a
    member's ``begin``. gzip is told by its first bytes, not by a file's name.
    """

    def __init__(self, stream: BinaryIO, begin: int = 0) -> None:
        magic = stream.read(len(GZIP_MAGIC))
        stream.seek(0)
        self.enterable = magic != GZIP_MAGIC
        self._stream: _Plain | _Gunzip = (
            _Plain(stream, begin) if self.enterable else _Gunzip(stream)
        )
        self._left = 0
        self.problem: str | None = None
        self.cut = False

    def payload(self) -> bytes:
        """The bytes of the member just given; short where the tar ends in it (then ``cut``)."""
        data = self._stream.read(self._left)
        self._left -= len(data)
        self.cut = self._left > 0
        return data

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self._walk()
        except _EndedError as end:
            self.problem = str(end)
        fault = self._stream.fault
        if fault and self.problem is None:
            self.problem = f"corrupt at byte {self._stream.position} (unpacked): {fault}"
        elif fault:
            self.problem = f"{self.problem} ({fault})"

    def _walk(self) -> Iterator[Member]:
        shared: dict[str, str] = {}  # pax values for all later members
        own: dict[str, str] = {}  # for the next member
        begin = None
        while True:
            at = self._stream.position
            begin = at if begin is None else begin
            info, block = self._header(at)
            if info is None:
                return
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                own |= self._pax(info, at)
                continue
            if info.type == tarfile.XGLTYPE:
                shared |= self._pax(info, at)
                self.enterable = False  # what comes later depends on it
                continue
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = self._extension(info, at).split(b"\0", 1)[0]
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    own = {"path": _text(text)} | own
                continue
            values, own = shared | own, {}
            name, size = values.get("path", info.name), _size(values, info, at)
            sparse = "GNU.sparse.major" in values or "GNU.sparse.map" in values
            if info.type == tarfile.GNUTYPE_SPARSE:
                sparse = True
                self._pass_sparse_map(block)
            if info.isreg():
                self._left = size
                yield Member(values.get("GNU.sparse.name", name), size, begin, sparse)
                self._finish(name, size)
            elif info.type not in tarfile.SUPPORTED_TYPES:  # links and such have no data
                self._left = size
                self._finish(name, size)
                self.cut = False
            begin = None

    def _header(self, at: int) -> tuple[tarfile.TarInfo | None, bytes]:
        """The header at this byte, or None at the archive's end; raises _EndedError when there is
        no whole one."""
        block = self._stream.read(BLOCK)
        if not block and at:
            raise _EndedError(f"no end-of-archive marker: ends at byte {at}, may be cut")
        if len(block) < BLOCK and at:
            raise _EndedError(f"cut at byte {at + len(block)}: inside a member's header")
        if len(block) < BLOCK:
            raise _EndedError(f"not a tar: {len(block)} bytes, less than one header")
        if block == END:
            self._check_tail()
            return None, block
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace"), block
        except (tarfile.HeaderError, ValueError) as error:
            if at == 0:
                hint = next((w for magic, w in FOREIGN.items() if block.startswith(magic)), error)
                raise _EndedError(f"not a tar: {hint}") from None
            raise _EndedError(f"corrupt at byte {at}: {error}; what follows was not read") from None

    def _check_tail(self) -> None:
        """Only zeros may follow the end marker; reading them also checks gzip's checksum."""
        while block := self._stream.read(READ_BYTES):
            if block.count(0) != len(block):
                at = self._stream.position - len(block.lstrip(b"\0"))
                raise _EndedError(
                    f"data after the end-of-archive marker: from byte {at}, not read "
                    "(tars joined with cat?)"
                )

    def _finish(self, name: str, size: int) -> None:
        """Pass over what is left of a member, and its padding."""
        self._left -= self._stream.skip(self._left)
        if self._left:
            self.cut = True
            raise _EndedError(f"cut at byte {self._stream.position}: inside {name!r}")
        padding = -size % BLOCK
        if self._stream.skip(padding) < padding:
            raise _EndedError(f"cut at byte {self._stream.position}: just after {name!r}")

    def _extension(self, info: tarfile.TarInfo, at: int) -> bytes:
        if not 0 <= info.size <= MAX_EXTENSION_BYTES:
            raise _EndedError(f"corrupt at byte {at}: an extended header of {info.size} bytes")
        data = self._stream.read(info.size)
        padding = -info.size % BLOCK
        if len(data) < info.size or self._stream.skip(padding) < padding:
            raise _EndedError(f"cut at byte {self._stream.position}: inside an extended header")
        return data

    def _pax(self, info: tarfile.TarInfo, at: int) -> dict[str, str]:
        """Records of the form ``<length> <key>=<value>\\n``."""
        data, values = self._extension(info, at), {}
        while data.rstrip(b"\0"):
            digits, _, _ = data.partition(b" ")
            length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
            key, equals, value = data[len(digits) + 1 : length].partition(b"=")
            if not equals or not value.endswith(b"\n") or length > len(data):
                raise _EndedError(f"corrupt at byte {at}: a damaged pax header")
            values[_text(key)] = _text(value[:-1])
            data = data[length:]
        return values

    def _pass_sparse_map(self, block: bytes) -> None:
        """Old GNU sparse files may have further map blocks after the header."""
        more = bool(block[482])
        while more:
            block = self._stream.read(BLOCK)
            if len(block) < BLOCK:
                raise _EndedError(f"cut at byte {self._stream.position}: inside a sparse map")
            more = bool(block[504])


class _EndedError(Exception):
    """The tar cannot be followed further; the text is the shard's problem."""


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _size(values: dict[str, str], info: tarfile.TarInfo, at: int) -> int:
    text = values.get("size", str(info.size))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _EndedError(f"corrupt at byte {at}: a member of {text} bytes")
    return int(text)


class _Plain:
    """An uncompressed tar; ``skip`` seeks."""

    fault = None

    def __init__(self, stream: BinaryIO, begin: int) -> None:
        self._stream = stream
        self._size = stream.seek(0, 2)
        self.position = stream.seek(begin)

    def read(self, count: int) -> bytes:
        # Asked for no more than there is: a damaged size must not allocate what it claims.
        data = self._stream.read(max(0, min(count, self._size - self.position)))
        self.position += len(data)
        return data

    def skip(self, count: int) -> int:
        count = min(count, self._size - self.position)
        if count:
            self.position = self._stream.seek(self.position + count)
        return count


class _Gunzip:
    """A gzip'd tar. Damage ends it early and is kept in ``fault``."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = gzip.GzipFile(fileobj=stream, mode="rb")
        self.position = 0
        self.fault: str | None = None

    def read(self, count: int) -> bytes:
        parts = []
        while count and (part := self._some(count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def skip(self, count: int) -> int:
        left = count
        while left and (part := self._some(left)):
            left -= len(part)
        return count - left

    def _some(self, count: int) -> bytes:
        """At least one byte; none at the end. ``read1``, because ``read`` would lose what was
        unpacked before the damage."""
        if self.fault:
            return b""
        try:
            part = self._stream.read1(min(count, READ_BYTES))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self.fault = f"gzip: {' '.join(str(error).split())}"
            return b""
        self.position += len(part)
        return part
