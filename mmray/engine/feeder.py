"""Training rows whose pixels do not all fit: prepared again in every epoch, window by window.

A feeder, one for all workers, has its decoders prepare the present window and the next into the
object store; a window that is passed is dropped, and its memory free when the last worker lets go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmray.archive.rows import Sample
from mmray.archive.shards import Shard, read_shard
from mmray.config import Columns
from mmray.engine import pace
from mmray.engine.prepared import BLOCK_SCHEMA, Recipe, prepare_chunk, wanted_in
from mmray.engine.scan import one_row, unpack_table
from mmray.engine.units import Unit
from mmray.engine.windows import Ints, windows_of
from mmray.errors import MmrayError
from mmray.memory import keep_freed_memory

#: Passes over rows are numbered: 2 * epoch takes the training rows, the next the dev rows. Before
#: the first epoch, features of frozen encoders are computed, in the rows' own order.
FEATURES = (-2, -1)
Key = tuple[int, int]  # pass, window
WINDOWS = 2  # that are there at a time: the one at hand and the next


@dataclass(frozen=True, slots=True)
class Stream:
    """What it takes to prepare rows again; ``sides``: units of the training and the dev rows."""

    root: str
    shards: Mapping[str, Shard]
    columns: Columns
    wanted: Any  # reference to all ``Wanted``
    recipe: Recipe
    sides: tuple[Sequence[Unit], Sequence[Unit]]
    window: int  # rows
    epochs: int
    seed: int


def windows_in(number: int, sizes: Ints, window: int, seed: int) -> list[Ints]:
    """The units of each window of a pass."""
    trains = number >= 0 and number % 2 == 0
    return windows_of(sizes, window, (seed, number // 2) if trains else None)


# --- making windows ------------------------------------------------------------------------------


def prepare_again(stream: Stream, wanted: Mapping[str, Any], unit: Unit) -> dict[str, Any]:
    """The rows of a unit as in the first pass: ``payload``, or a ``failure`` that says which row
    cannot be prepared any more."""
    kept = set(unit.rows.tolist())
    try:
        found = read_shard(
            stream.root,
            stream.shards[unit.shard],
            columns=stream.columns,
            images=stream.recipe.modalities != "text",
            start=unit.start,
            stop=unit.stop,
            skip=lambda row: row not in kept,
            byte=unit.byte,
        )
        samples = [item for item in found if isinstance(item, Sample)]
    except MmrayError as error:
        return {"failure": str(error)}
    made = prepare_chunk(unit.shard, samples, wanted[unit.shard], stream.recipe.build())
    there = unpack_table(made["payload"])["row"].to_pylist() if "payload" in made else []
    if there == unit.rows.tolist():
        return {"payload": made["payload"]}
    lost = min(kept.symmetric_difference(there))
    return {
        "failure": f"{unit.shard}: row {lost} could be prepared before and cannot be now "
        f"({made['aside'][:300]}); the archive or its storage has changed since this run began: "
        "put it back, and the same command goes on from the last checkpoint"
    }


class _Decoder:
    """One process that prepares units, one at a time."""

    def __init__(self, held: list[Any]) -> None:
        keep_freed_memory()
        pace.share()
        self._stream: Stream = ray.get(held[0])

    def block(self, side: int, unit: int) -> pa.Table:
        """A unit, as a block of one row."""
        stream = self._stream
        values: dict[str, Any] = dict.fromkeys(BLOCK_SCHEMA.names)
        values |= prepare_again(stream, wanted_in(stream.wanted), stream.sides[side][unit])
        return one_row(values, BLOCK_SCHEMA)


class Feeder:
    """Which windows are there: the one asked for and the next. Runs as an actor."""

    def __init__(self, held: list[Any], decoders: list[Any]) -> None:
        self._stream: Stream = ray.get(held[0])
        self._decoders, self._given = decoders, 0
        self._sizes = [np.array([len(unit.rows) for unit in s]) for s in self._stream.sides]
        self._alive: dict[Key, list[tuple[int, Any]]] = {}

    def take(self, number: int, window: int) -> list[tuple[int, Any]]:
        """The units of a window, each with the reference to its block."""
        key = (number, window)
        if key not in self._alive:
            if not self._alive or key != self._after(max(self._alive)):
                self._alive.clear()  # the first one, or a worker begins anew
            self._alive[key] = self._begin(key)
        self._begin_ahead(key)
        return self._alive[key]

    def passed(self, number: int, window: int) -> None:
        """No worker needs this window any more, nor any before it."""
        key = (number, window)
        for old in [k for k in self._alive if k <= key]:
            del self._alive[old]
        self._begin_ahead(key)

    def forget(self) -> None:
        """Drop all: something in it is broken, or nothing is needed any more."""
        self._alive.clear()

    def _begin_ahead(self, key: Key) -> None:
        last = self._after(max(self._alive, default=key))
        while last is not None and len(self._alive) < WINDOWS:
            self._alive[last] = self._begin(last)
            last = self._after(last)

    def _after(self, key: Key) -> Key | None:
        number, window = key
        if window + 1 < len(self._windows(number)):
            return number, window + 1
        last = number == -1 or number >= 2 * self._stream.epochs - 1
        return None if last else (number + 1, 0)

    def _windows(self, number: int) -> list[Ints]:
        stream = self._stream
        return windows_in(number, self._sizes[number % 2], stream.window, stream.seed)

    def _begin(self, key: Key) -> list[tuple[int, Any]]:
        number, window = key
        begun = []
        for unit in self._windows(number)[window].tolist():
            decoder = self._decoders[self._given % len(self._decoders)]
            self._given += 1
            begun.append((unit, decoder.block.remote(number % 2, unit)))
        return begun


@contextmanager
def feeding(stream: Stream, decoders: int) -> Iterator[Any]:
    """A feeder with so many decoders, for as long as it is needed."""
    held = [ray.put(stream)]  # alive here: an actor that starts anew asks for it again
    node = ray.get_runtime_context().get_node_id()
    lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    decoder: Any = ray.remote(_Decoder)
    # They take no CPU: workers have them all, and without their rows would wait.
    pool = [
        decoder.options(**lasting, scheduling_strategy="SPREAD").remote(held)
        for _ in range(decoders)
    ]
    beside = NodeAffinitySchedulingStrategy(node, soft=True)  # it owns the windows: as safe as this
    maker: Any = ray.remote(Feeder)
    feeder = maker.options(**lasting, scheduling_strategy=beside).remote(held, pool)
    try:
        yield feeder
    finally:
        for actor in (feeder, *pool):
            ray.kill(actor)
