"""The order of an epoch: which rows a step takes, and which units of reading a window needs."""

from __future__ import annotations

import numpy as np
import pytest

from mmray.engine.windows import arranged, order_of, share_of, windows_of

SIZES = np.array([7, 1, 12, 5, 9, 9])
UNIT_OF = np.repeat(np.arange(len(SIZES)), SIZES)
N = int(SIZES.sum())


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 8, 20, N])
def test_an_epoch_takes_every_row_once_with_any_number_of_workers(world: int, window: int) -> None:
    """No tail row is dropped or doubled, and a step has the same rows for 1 worker and for N."""
    windows = windows_of(SIZES, window, (7, 4))
    order = arranged(order_of(4, N, seed=7), UNIT_OF, windows).rows
    assert sorted(order) == list(range(N))
    for step in range(6):
        parts = [share_of(step, order, 8, rank, world) for rank in range(world)]
        whole, total = share_of(step, order, 8, 0, 1)
        assert np.concatenate([own for own, _ in parts]).tolist() == whole.tolist()
        assert {n for _, n in parts} == {total} == {len(whole)}


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(order_of(epoch, N, seed)) for epoch in (0, 1) for seed in (0, 1)}
    assert len(orders) == 4
    units = {tuple(np.concatenate(windows_of(SIZES, 8, (seed, 0)))) for seed in range(4)}
    assert len(units) > 1


def test_a_window_over_all_rows_is_no_window() -> None:
    """What fits into memory is shuffled as a whole, however it lies in the archive."""
    plain = order_of(3, N, seed=1)
    order = arranged(plain, UNIT_OF, windows_of(SIZES, N, (1, 3)))
    assert order.rows.tolist() == plain.tolist() and order.ends.tolist() == [N]


def test_the_rows_of_a_window_come_together_and_shuffled() -> None:
    windows = windows_of(SIZES, 15, (0, 0))
    assert sorted(np.concatenate(windows)) == list(range(len(SIZES)))
    assert all(SIZES[units].sum() < 15 + SIZES.max() for units in windows)
    order = arranged(order_of(0, N, 0), UNIT_OF, windows)
    starts = [0, *order.ends[:-1]]
    for number, (units, start, end) in enumerate(zip(windows, starts, order.ends, strict=True)):
        assert order.windows(start, end) == range(number, number + 1)
        inside = order.rows[start:end]
        assert set(UNIT_OF[inside]) == set(units) and len(inside) == SIZES[units].sum()
    assert order.windows(0, N) == range(len(windows))
    assert (np.diff(order.rows[: order.ends[0]]) < 0).any()  # not in the archive's order


def test_without_a_shuffle_rows_keep_the_order_of_the_archive() -> None:
    order = arranged(np.arange(N), UNIT_OF, windows_of(SIZES, 10, None))
    assert order.rows.tolist() == list(range(N)) and len(order.ends) > 1
