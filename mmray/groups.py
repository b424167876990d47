"""Rows that share something, as groups: arrays only, for millions of rows.

N rows; a column of digests is fixed-size binary, null where a row has nothing to compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

DIGEST_BYTES = 16

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

NONE = np.iinfo(np.uint64).max


def codes(column: pa.ChunkedArray) -> Ints:
    """int64 [N]: equal values have equal codes from 0, nulls -1."""
    indices = column.combine_chunks().dictionary_encode().indices
    found: Ints = to_numpy(pc.fill_null(indices, -1)).astype(np.int64)
    return found


def components(*links: Ints) -> Ints:
    """int64 [N]: for each row, the first row that it is joined to by an equal code in any of
    ``links``, transitively; -1 joins nothing.

    Connected components by hooking and pointer jumping, a handful of passes over whole arrays.
    """
    root = np.arange(len(links[0]), dtype=np.int64)
    joins = [(at, link[at]) for link in links if (at := np.flatnonzero(link >= 0)).size]
    while True:
        before = root.copy()
        for at, code in joins:
            least = np.full(int(code.max()) + 1, len(root), dtype=np.int64)
            np.minimum.at(least, code, root[at])
            np.minimum.at(root, root[at], least[code])
            while not np.array_equal(root, root[root]):
                root = root[root]
        if np.array_equal(root, before):
            return root


def merge(root: Ints, pairs: Iterable[tuple[Ints, Ints]]) -> None:
    """Join both rows of every pair in ``root`` (int64 [N]: the first row each is joined to)."""
    found = [np.concatenate(ends) for ends in zip(*pairs, strict=True)]
    if not found:
        return
    one, other = found
    while True:
        apart = np.flatnonzero(root[one] != root[other])
        if not len(apart):
            return
        one, other = root[one[apart]], root[other[apart]]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(root, root[root]):
            root[:] = root[root]


def seeded_order(group: Ints, keys: Words, seed: int) -> Ints:
    """int64 [N]: the rows, group after group, in an order that depends on ``seed`` and on the least
    key in each group, and so not on the order of the rows."""
    least = np.full(len(keys), NONE, dtype=np.uint64)
    np.minimum.at(least, group, keys)
    salt = np.frombuffer(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), dtype="<u8")
    z = least[group] ^ salt  # then splitmix64's finaliser (Steele et al. 2014); arrays wrap
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.lexsort((group, z ^ (z >> np.uint64(31))))


def content_keys(*columns: pa.ChunkedArray) -> tuple[Words, Mask]:
    """uint64 [N] made of each row's digests, and bool [N]: it has any."""
    keys = np.full(len(columns[0]), NONE, dtype=np.uint64)
    known = np.zeros(len(columns[0]), dtype=bool)
    for digests in columns:
        there = to_numpy(pc.is_valid(digests))
        packed = digests.drop_null().combine_chunks()
        stop = packed.offset + len(packed)
        words = np.frombuffer(packed.buffers()[1] or b"", dtype="<u8")
        words = words.reshape(-1, DIGEST_BYTES // 8)[packed.offset : stop, 0]
        keys[there] = np.minimum(keys[there], words)
        known |= there
    return keys, known


def name_key(*names: object) -> np.uint64:
    """A key for a row without content, made of its name."""
    text = "\0".join(map(str, names))
    return np.uint64(
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    )


def to_numpy(array: pa.ChunkedArray | pa.Array) -> Any:
    return array.to_numpy(zero_copy_only=False) if isinstance(array, pa.Array) else array.to_numpy()
