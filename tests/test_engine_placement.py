"""A cluster that is used badly costs its user money; one asked for too much waits for ever."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import ray.data

from mmray.engine.cluster import Resources
from mmray.engine.placement import Placement, Pool, place
from mmray.errors import ConfigError


def cluster(cpus: int, gpus: int = 0, max_cpus: int = 0, max_gpus: int = 0) -> Resources:
    return Resources(cpus, gpus, 1, 1 << 30, max_cpus or cpus, max_gpus or gpus)


def numbers(found: Placement) -> tuple[tuple[int, int], tuple[int, int] | None]:
    scorers, decoders = found.scorers, found.decoders
    beside = None if decoders is None else (decoders.least, decoders.most)
    return (scorers.least, scorers.most), beside


def test_cpus_score_what_they_decode() -> None:
    assert numbers(place(cluster(2))) == ((2, 2), None)
    assert numbers(place(cluster(8, max_cpus=64))) == ((8, 64), None)
    assert numbers(place(cluster(8), actors=3)) == ((3, 3), None)
    assert numbers(place(cluster(8), decoders=6)) == ((2, 2), (6, 6))
    assert place(cluster(8)).scorers.gpus is None


def test_every_cpu_beside_a_gpu_decodes() -> None:
    assert numbers(place(cluster(16, 1))) == ((2, 2), (15, 15))
    assert numbers(place(cluster(32, 2, 128, 8))) == ((4, 16), (30, 120))
    assert numbers(place(cluster(16, 1), decoders=0)) == ((2, 2), None)
    assert numbers(place(cluster(1, 1))) == ((2, 2), None)
    assert place(cluster(16, 1)).scorers.gpus == 0.5
    assert place(cluster(16, 1)).readers == 15


@pytest.mark.parametrize("have", [cluster(16, 1), cluster(4, 1), cluster(64, 4), cluster(2)])
def test_what_is_chosen_fits_with_a_reader(have: Resources) -> None:
    found = place(have)
    pools = [pool for pool in (found.scorers, found.decoders) if pool is not None]
    assert sum(pool.least * pool.cpus for pool in pools) <= have.cpus - 0.1
    assert sum(pool.least * (pool.gpus or 0) for pool in pools) <= have.gpus


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--decoders: got 2 beside 2 .*the cluster has 2$"):
        place(cluster(2), actors=2, decoders=2)
    with pytest.raises(ConfigError, match="--actors: got 3, 2 share a GPU; the cluster has 1"):
        place(cluster(16, 1), actors=3)


def test_an_actor_works_in_its_main_thread(ray_cluster: None) -> None:
    """In another, whose heap of glibc's is small, a large network scores 7 % fewer rows."""

    class Thread:
        def __call__(self, _: dict[str, Any]) -> dict[str, Any]:
            return {"main": [threading.current_thread() is threading.main_thread()]}

    strategy = Pool(1, 1).strategy(pieces=1)
    found = ray.data.range(1).map_batches(Thread, batch_size=1, compute=strategy, num_cpus=0.9)
    assert found.take_all() == [{"main": True}]
