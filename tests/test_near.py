"""Without these a near-identical picture could train the model that it grades."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mmray import groups, near
from mmray.groups import Ints, Words


def hashes(count: int, flips: int, seed: int) -> Words:
    """uint64 [4, count], half of them others with up to ``flips`` bits flipped."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2, (count, near.HASH_BITS), dtype=np.uint8)
    for row in range(count // 2, count):
        bits[row] = bits[random.integers(row)]
        bits[row, random.permutation(near.HASH_BITS)[: random.integers(flips + 1)]] ^= 1
    return np.ascontiguousarray(np.packbits(bits, axis=1).view("<u8").T)


def by_comparing_all(words: Words, bits: int) -> Ints:
    differing = np.bitwise_count(words[:, :, None] ^ words[:, None, :]).sum(0)
    root = np.arange(words.shape[1])
    groups.merge(root, [np.nonzero(differing <= bits)])
    return root


@pytest.mark.parametrize("alike", [1, 2])
@pytest.mark.parametrize("bits", [1, 4, 16, 32])
def test_what_is_found_is_what_comparing_all_finds(
    bits: int, alike: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if alike == 2 and bits < 32:  # sorting made free: more tables, of fewer neighbours
        monkeypatch.setattr(near, "SORTED", 0)
    words = hashes(700, 2 * bits, seed=bits)
    expected = by_comparing_all(words, bits)
    assert 1 < len(np.unique(expected)) < 700
    assert near.joined(words, bits).tolist() == expected.tolist()


def test_hashes_that_differ_only_in_some_bits_are_compared_too() -> None:
    words = hashes(600, 6, seed=5)
    words[1:] = words[1:, :1]  # 192 of the bits are the same in all of them
    assert near.joined(words, 4).tolist() == by_comparing_all(words, 4).tolist()


def test_many_alike_are_one_group_in_any_order_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(near, "WINDOW", 8)
    monkeypatch.setattr(near, "HELD", 100)
    random = np.random.default_rng(0)
    bits = np.tile(random.integers(0, 2, near.HASH_BITS, dtype=np.uint8), (500, 1))
    bits[np.arange(250), random.integers(near.HASH_BITS, size=250)] ^= 1
    column = pa.chunked_array([[row.tobytes() for row in np.packbits(bits, axis=1)]], pa.binary(32))
    shuffled = random.permutation(500)
    for found in (near.near_codes(column, 4), near.near_codes(column.take(shuffled), 4)):
        assert len(np.unique(found)) == 1


def test_rows_without_a_hash_are_joined_to_nothing() -> None:
    one, other = bytes(32), b"\xff" * 32
    column = pa.chunked_array([[one, None], [other, one, None]], pa.binary(32))
    codes = near.near_codes(column, 16)
    assert codes[1] == codes[4] == -1
    assert codes[0] == codes[3] != codes[2]
    assert near.near_codes(pa.chunked_array([[None, None]], pa.binary(32)), 16).tolist() == [-1, -1]
