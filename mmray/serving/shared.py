"""Pictures and pixels between the processes of one machine: told where they lie, not sent.

Sent, every byte is copied a dozen times on its way: pickled, framed, through the kernel, and all
that backwards, which takes the caches from the model. Here a sender writes pixels into memory that
others map. It has no name, so nothing is left behind by whoever is killed, and only processes of
the same user can open it. On another machine, or where that does not exist, they are sent.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mmray.archive.rows import Sample
from mmray.errors import BadRow
from mmray.preprocess import Prepared, Preprocessor

R = TypeVar("R")

NAME = "mmray-pixels"
KEY_BYTES = 64  # at the beginning: whose memory it is
MAPPED = 8  # memories a receiver has open: senders come and go
PICTURE_BYTES = 2 << 20  # of memory for a picture as it came; larger ones are sent

#: What became of a pair, and how many seconds it took to prepare.
Decoded = tuple[Prepared | BadRow, float]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Where:
    """Where the pixels of some rows lie: in which file of which process, in slots of ``shape``
    ((H, W, 3); of pictures their bytes), one a row; None for a row that has its own, or none."""

    pid: int
    file: int
    key: bytes
    shape: tuple[int, ...]
    slots: tuple[int | None, ...]


class Elsewhere:
    """The answer of a receiver that cannot see a sender's memory."""


class Sender:
    """Memory for the pixels of up to ``rows`` rows of ``size`` x ``size``; for one event loop."""

    def __init__(self, size: int, rows: int) -> None:
        self._memory = _memory((size, size, 3), rows)

    async def ask(
        self,
        prepared: Sequence[Prepared],
        question: Callable[[Sequence[Prepared], Where | None], Awaitable[R | Elsewhere]],
    ) -> R:
        """The answer to ``question`` of rows of which some have their pixels where it is told. To
        one who is Elsewhere they are sent, as to all who are asked later."""
        if self._memory is not None:
            with self._memory.holding(prepared) as (left, where):
                found = await question(left, where)
            if not isinstance(found, Elsewhere):
                return found
            log.info("pixels are sent from now on: a replica is on another machine")
            self._memory = None
        found = await question(prepared, None)
        assert not isinstance(found, Elsewhere)
        return found


class Receiver:
    """The other side: sees the memory of senders on its machine."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def rows(self, left: Sequence[Prepared], where: Where) -> list[Prepared] | None:
        """The rows with their pixels, as views that hold while the sender waits for its answer;
        None where this process cannot see them."""
        if where.key not in self._mapped:
            found = _mapped(where)
            if found is None:
                return None
            self._mapped[where.key] = found
            if len(self._mapped) > MAPPED:
                self._mapped.popitem(last=False)
        slots = self._mapped[where.key]
        return [
            row if slot is None else replace(row, pixels=slots[slot].transpose(2, 0, 1))
            for row, slot in zip(left, where.slots, strict=True)
        ]


class Tray:
    """Memory for the pictures that a child is to prepare and the pixels that it makes of them, of
    ``rows`` rows: no more may be asked of it before these are taken out."""

    def __init__(self, size: int, rows: int) -> None:
        self._pixels = _memory((size, size, 3), rows)
        self._pictures = _memory((PICTURE_BYTES,), rows)
        self._seen = False  # by the child

    def filled_by(self, preprocessor: Preprocessor) -> Fills:
        """What the child is to prepare with, in place of ``preprocessor``."""
        if self._pixels is None or self._pictures is None:
            return Fills(preprocessor)
        return Fills(preprocessor, self._pixels.where(()), self._pictures.where(()))

    def laid(self, samples: Sequence[Sample]) -> list[Sample | Laid]:
        """What the child is sent for samples, once it has shown that it sees this memory."""
        return [self._laid(row, sample) for row, sample in enumerate(samples)]

    def _laid(self, slot: int, sample: Sample) -> Sample | Laid:
        picture = sample.image
        if not self._seen or not picture or len(picture) > PICTURE_BYTES:
            return sample
        assert self._pictures is not None
        self._pictures.slots[slot, : len(picture)] = np.frombuffer(picture, np.uint8)
        return Laid(replace(sample, image=None), slot, len(picture))

    def taken(self, outcome: Filled | BadRow) -> Decoded:
        """What the child prepared, with its pixels, which are the caller's."""
        if isinstance(outcome, BadRow):
            return outcome, 0.0
        row = outcome.row
        if outcome.slot is not None:
            assert self._pixels is not None
            self._seen = True
            pixels = self._pixels.slots[outcome.slot].copy()
            row = replace(row, pixels=pixels.transpose(2, 0, 1))
        return row, outcome.seconds


@dataclass(frozen=True, slots=True)
class Laid:
    """A sample less its picture, and in which slot of the tray how many bytes of that lie."""

    sample: Sample
    slot: int
    size: int


@dataclass(frozen=True, slots=True)
class Filled:
    """A row less its pixels, and the slot of the tray that they lie in (None: with them), and how
    many seconds it took to prepare."""

    row: Prepared
    slot: int | None
    seconds: float


class Fills:
    """A Preprocessor in the child of whoever has the tray at these two, if there is one."""

    def __init__(
        self,
        preprocessor: Preprocessor,
        pixels: Where | None = None,
        pictures: Where | None = None,
    ) -> None:
        self._preprocessor, self._where = preprocessor, (pixels, pictures)
        self._pixels: np.ndarray | None = None
        self._pictures: np.ndarray | None = None
        self._next = 0

    def prepare(self, sample: Sample | Laid) -> Filled:
        """As Preprocessor.prepare. A tray that cannot be seen is not filled."""
        pixels, pictures = self._where
        if pixels and pictures and (self._pixels is None or self._pictures is None):
            self._pixels, self._pictures = _mapped(pixels, to_write=True), _mapped(pictures)
        if isinstance(sample, Laid):
            assert self._pictures is not None, "it was seen before"
            picture = self._pictures[sample.slot, : sample.size].tobytes()
            sample = replace(sample.sample, image=picture)
        began = time.perf_counter()
        row = self._preprocessor.prepare(sample)
        seconds = time.perf_counter() - began
        if self._pixels is None or self._pictures is None or row.pixels is None:
            return Filled(row, None, seconds)
        slot, self._next = self._next, (self._next + 1) % len(self._pixels)
        self._pixels[slot] = row.pixels.transpose(1, 2, 0)
        return Filled(replace(row, pixels=None), slot, seconds)


def _memory(shape: tuple[int, ...], rows: int) -> _Memory | None:
    """``rows`` slots of ``shape``; None where there is none to share."""
    if hasattr(os, "memfd_create"):
        try:
            return _Memory(shape, rows)
        except OSError as error:  # a sandbox may forbid it
            log.info("pixels are sent: no memory to share: %s", error)
    return None


class _Memory:
    def __init__(self, shape: tuple[int, ...], rows: int) -> None:
        self._file = os.memfd_create(NAME)
        self._shape, self._free = shape, list(range(rows))
        self._key = secrets.token_bytes(KEY_BYTES)
        size = KEY_BYTES + rows * int(np.prod(shape))
        os.ftruncate(self._file, size)
        memory = mmap.mmap(self._file, size)
        memory[:KEY_BYTES] = self._key
        self.slots = np.frombuffer(memory, np.uint8, offset=KEY_BYTES).reshape(rows, *shape)

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # else there was none to be had
            os.close(self._file)

    def where(self, slots: Sequence[int | None]) -> Where:
        return Where(os.getpid(), self._file, self._key, self._shape, tuple(slots))

    @contextlib.contextmanager
    def holding(self, prepared: Sequence[Prepared]) -> Iterator[tuple[list[Prepared], Where]]:
        """The rows less the pixels that lie here meanwhile; those keep theirs that find no slot."""
        left: list[Prepared] = []
        slots: list[int | None] = []
        for row in prepared:
            slot = self._free.pop() if self._free and row.pixels is not None else None
            if slot is not None:
                assert row.pixels is not None
                self.slots[slot] = row.pixels.transpose(1, 2, 0)
                row = replace(row, pixels=None)
            left.append(row)
            slots.append(slot)
        try:
            yield left, self.where(slots)
        finally:
            self._free += [slot for slot in slots if slot is not None]


def _mapped(where: Where, *, to_write: bool = False) -> np.ndarray | None:
    """The slots of another process's memory; None where it cannot be seen. On another machine there
    may be another process of that number, whose files are not touched."""
    path = f"/proc/{where.pid}/fd/{where.file}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{NAME} "):
            return None
        with open(path, "r+b" if to_write else "rb") as file:
            access = mmap.ACCESS_WRITE if to_write else mmap.ACCESS_READ
            memory = mmap.mmap(file.fileno(), 0, access=access)
    except OSError:  # no such process, or not of this user
        return None
    if memory[:KEY_BYTES] != where.key:
        return None
    return np.frombuffer(memory, np.uint8, offset=KEY_BYTES).reshape(-1, *where.shape)
