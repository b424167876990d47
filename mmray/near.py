"""Hashes that differ in few bits, found without comparing all with all: arrays only.

Of ``bands`` disjoint bands of bits, a pair that differs in at most ``bits`` bits has
``bands - bits`` alike. So each choice of that many bands makes a table, sorted by them, in which
only neighbours with equal bands are compared (Manku, Jain, Das Sarma, "Detecting near-duplicates
for web crawling", WWW 2007).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from mmray.groups import Ints, Words, codes, merge

HASH_BITS = 256
WORDS = HASH_BITS // 64
WINDOW = 4096  # hashes alike in a table's bands, of which each is compared with that many
SORTED = 20  # comparisons that take as long as sorting one hash into a table
HELD = 1 << 22  # pairs found, before they are merged

#: Odd numbers to make one key of several words (splitmix64's increment, and its multiples).
MIX = tuple(0x9E3779B97F4A7C15 * (2 * i + 1) % 2**64 for i in range(WORDS))


def near_codes(column: pa.ChunkedArray, bits: int) -> Ints:
    """int64 [N] of fixed-size binary hashes (32 bytes): rows have equal codes when they are joined
    by hashes that differ in at most ``bits`` bits, transitively; -1 where the hash is null.

    Exact as long as no more than ``WINDOW`` different hashes agree in all bits of a table; beyond,
    each is compared with the ``WINDOW`` that follow. The order of the rows does not matter.
    """
    code = codes(column)
    if not (code >= 0).any():
        return code
    distinct = column.combine_chunks().dictionary_encode().dictionary
    packed = np.frombuffer(b"".join(distinct.to_pylist()), dtype="<u8").reshape(-1, WORDS)
    order = np.lexsort(packed.T)
    root = np.empty(len(packed), dtype=np.int64)
    root[order] = order[joined(np.ascontiguousarray(packed[order].T), bits)]
    return np.where(code >= 0, root[code], -1)


def joined(words: Words, bits: int) -> Ints:
    """int64 [M]: the first hash that each of ``words`` (uint64 [4, M]) is joined to."""
    root = np.arange(words.shape[1], dtype=np.int64)
    held: list[tuple[Ints, Ints]] = []
    for mask in _tables(words.shape[1], bits):
        for pair in _pairs(words, mask, bits):
            held.append(pair)
            if sum(len(left) for left, _ in held) > HELD:
                merge(root, held)
                held.clear()
    merge(root, held)
    return root


def _tables(count: int, bits: int) -> Iterator[Words]:
    """The bits in which the pairs of each table agree, uint64 [4]; one band a table where that
    takes less time, or two, which make many more tables of much smaller neighbourhoods."""

    def cost(alike: int) -> float:
        bands = bits + alike
        neighbours = count / 2 / 2 ** (HASH_BITS * alike / bands)
        return math.comb(bands, alike) * (SORTED + neighbours)

    alike = min((1, 2), key=cost)
    # Every band has low and high frequencies, as neighbouring bits are seldom independent.
    band = np.arange(HASH_BITS) % (bits + alike)
    for chosen in itertools.combinations(range(bits + alike), alike):
        yield np.packbits(np.isin(band, chosen)).view("<u8")


def _pairs(words: Words, mask: Words, bits: int) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of hashes that agree in ``mask`` and differ in at most ``bits`` bits."""
    # One key of the four words: another mask's pairs that collide are only compared in vain.
    odd = np.array(MIX, dtype=np.uint64)
    key = ((words & mask[:, None]) * odd[:, None]).sum(0, dtype=np.uint64)
    order = np.argsort(key, kind="stable")
    key, ordered = key[order], words[:, order]
    ends = np.append(np.flatnonzero(key[1:] != key[:-1]) + 1, len(key))
    starts = np.append(0, ends[:-1])
    at = np.arange(len(order), dtype=np.int64)
    following = np.repeat(ends, ends - starts) - at - 1  # hashes after each with its key
    for step in range(1, WINDOW + 1):
        more = following >= step
        at, following = at[more], following[more]
        if not len(at):
            return
        left, right = at, at + step
        differing = np.zeros(len(at), dtype=np.uint8)
        for word in ordered:
            differing = differing + np.bitwise_count(word[left] ^ word[right])
            close = np.flatnonzero(differing <= bits)
            if not len(close):
                break
            left, right, differing = left[close], right[close], differing[close]
        else:
            yield order[left], order[right]
