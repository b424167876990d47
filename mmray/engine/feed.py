"""A training worker's rows, in order and one batch ahead; where pixels are not kept, ``feeder`` has
those of the window at hand."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from mmray.engine.feeder import Key, windows_in
from mmray.engine.prepared import PreparedRows
from mmray.engine.windows import Ints, Order, arranged, order_of, share_of
from mmray.errors import RunError

if TYPE_CHECKING:
    from mmray.engine.frozen import FeatureRows
    from mmray.learn import Batch


class Feed:
    """The rows of one rank: its batches of an epoch, its shares of a pass over all rows of a side.

    ``sides``: training and dev rows. ``waited``: seconds for which ``batches`` had none ready.
    """

    def __init__(
        self,
        sides: Sequence[PreparedRows],
        *,
        seed: int,
        rank: int,
        world: int,
        feeder: Any = None,
        window: int | None = None,
    ) -> None:
        self._sides, self._seed, self._rank, self.world = sides, seed, rank, world
        self._feeder, self._window = feeder, window
        self._held: dict[Key, list[tuple[int, Any]]] = {}
        self._ahead = ThreadPoolExecutor(1)
        self.waited = 0.0

    def batches(
        self,
        rows: FeatureRows,
        epoch: int,
        first: int,
        batch_size: int,
        device: torch.device,
        *,
        captions: Ints | None = None,
    ) -> Generator[tuple[Batch, int, int], None, None]:
        """From step ``first`` of an epoch on, this rank's batch on ``device``, how many rows of it
        count (0: it only stands in), and how many the step has over all ranks. ``captions``:
        int64 [N], the row whose caption each row is shown with.

        While a batch is used, the next is put together and sent to the device.
        """
        number = 2 * epoch
        order = self._order(number, order_of(epoch, len(rows), self._seed))
        steps = math.ceil(len(rows) / batch_size)

        def fetch(step: int) -> tuple[Batch, int, int]:
            own, total = share_of(step, order.rows, batch_size, self._rank, self.world)
            begin = step * batch_size
            for window in order.windows(begin, begin + total):
                self._take((number, window))
            at = own if len(own) else order.rows[begin : begin + 1]
            batch = rows.batch(at, None if captions is None else captions[at])
            on_gpu = device.type == "cuda"  # whose copies only leave pinned memory at once
            return (batch.pinned() if on_gpu else batch).to(device), len(own), total

        ahead = self._ahead.submit(fetch, first)
        try:
            for step in range(first, steps):
                began = time.perf_counter()
                made = ahead.result()
                self.waited += time.perf_counter() - began
                # All ranks have the batch of the step before: nobody needs what lies before this.
                self._drop((number, order.windows(step * batch_size, step * batch_size + 1).start))
                if step + 1 < steps:
                    ahead = self._ahead.submit(fetch, step + 1)
                yield made
        finally:
            wait([ahead])
            self._drop((number + 1, 0))

    def order(self, epoch: int, size: int) -> Ints:
        """The order in which an epoch takes its rows, int64 [N]."""
        return self._order(2 * epoch, order_of(epoch, size, self._seed)).rows

    def shares(self, number: int, size: int, *, pixels: bool = True) -> Iterator[Ints]:
        """This rank's batches of a pass in the rows' own order, of at most ``size`` rows, perhaps
        none. All ranks must come here together. Each batch is some rank's, and the same with any
        number of ranks: what bf16 makes of a row depends, in its last digits, on its batch."""
        order = self._order(number, np.arange(len(self._sides[number % 2])))
        start = before = 0
        for window, end in enumerate(order.ends.tolist()):
            if pixels:
                self._take((number, window))
                self._meet()
                self._drop((number, window))
            batches = [order.rows[i : min(i + size, end)] for i in range(start, end, size)]
            yield from batches[(self._rank - before) % self.world :: self.world]
            start, before = end, before + len(batches)
        self._drop((number + 1, 0))

    def drop_pixels(self) -> None:
        """No pixels are needed from here on: all rows are at hand."""
        if self._feeder is not None and self._rank == 0:
            ray.get(self._feeder.forget.remote())
        self._feeder = self._window = None

    def _order(self, number: int, order: Ints) -> Order:
        rows = self._sides[number % 2]
        window = self._window or len(rows)
        return arranged(order, rows.unit_of, windows_in(number, rows.sizes, window, self._seed))

    def _take(self, key: Key) -> None:
        """Have the pixels of a window, waiting until they are there."""
        if self._feeder is None or key in self._held:
            return
        taken = ray.get(self._feeder.take.remote(*key))
        blocks = ray.get([block for _, block in taken])
        for (unit, _), block in zip(taken, blocks, strict=True):
            if (failure := block["failure"][0].as_py()) is not None:
                ray.get(self._feeder.forget.remote())  # a worker that begins anew tries again
                raise RunError(failure)
            self._sides[key[0] % 2].hold(unit, block)
        self._held[key] = taken

    def _drop(self, key: Key) -> None:
        """Let go of all windows before this one."""
        for passed in sorted(k for k in self._held if k < key):
            self._sides[passed[0] % 2].release(unit for unit, _ in self._held.pop(passed))
            if self._rank == 0:
                self._feeder.passed.remote(*passed)

    def _meet(self) -> None:
        """Wait for the other ranks, so that none asks for what another says is passed."""
        if self._feeder is not None and self.world > 1:
            dist.barrier()
