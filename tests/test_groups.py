"""Without these two copies of a picture could end in different groups, or all in one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mmray import groups


def by_search(links: list[list[int]]) -> list[int]:
    """The first row that each is joined to, found by walking."""
    count = len(links[0])
    found: list[int] = []
    for start in range(count):
        seen, todo = {start}, [start]
        while todo:
            row = todo.pop()
            near = {r for link in links for r in range(count) if link[r] == link[row] != -1}
            todo += near - seen
            seen |= near
        found.append(min(seen))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_components_are_those_found_by_walking(seed: int) -> None:
    random = np.random.default_rng(seed)
    links = [random.integers(-1, 30, 40) for _ in range(2)]
    expected = by_search([link.tolist() for link in links])
    assert groups.components(*links).tolist() == expected


def test_a_long_chain_is_one_group() -> None:
    rows = np.random.default_rng(0).permutation(100_000)
    assert not groups.components(rows // 2, (rows + 1) // 2).any()


def test_no_codes_join_nothing() -> None:
    nothing = np.full(5, -1)
    assert groups.components(nothing, nothing).tolist() == [0, 1, 2, 3, 4]


def test_codes_are_equal_where_values_are() -> None:
    column = pa.chunked_array([["x", None], ["y", "x"]])
    assert groups.codes(column).tolist() == [0, -1, 1, 0]


def test_groups_stay_together_in_seeded_order() -> None:
    group = np.array([0, 1, 0, 3, 1, 3])
    keys = np.arange(6, dtype=np.uint64)
    order = groups.seeded_order(group, keys, seed=3)
    assert sorted(order) == list(range(6))
    assert (np.diff(group[order]) != 0).sum() == 2


def test_merging_pairs_joins_all_that_hang_together() -> None:
    random = np.random.default_rng(0)
    one, other = random.integers(0, 300, (2, 200))
    root = np.arange(300)
    groups.merge(root, [(one[:50], other[:50]), (one[50:], other[50:])])
    for row, first in enumerate(root):
        assert root[first] == first <= row
    assert (root[one] == root[other]).all()
    assert len(np.unique(root)) == 300 - np.linalg.matrix_rank(
        np.eye(300)[one] - np.eye(300)[other]
    )
