"""What of a cluster scoring takes: how many actors score, and where their pictures are decoded.

On CPUs an actor decodes what it scores: a core each, and nothing but bytes on the way. A GPU is
faster than its cores decode, so there decoding runs beside it, on every core that is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.data import ActorPoolStrategy

from mmray.engine.cluster import Resources
from mmray.errors import ConfigError

CPUS = 0.9  # of a process that decodes or scores; the rest of its core is for the readers
GPU_ACTOR_CPUS = 0.5
ACTORS_A_GPU = 2  # one brings its batch along while the device has the other's
IN_FLIGHT = 4  # chunks at each actor: with Ray's 2, the end of a shard leaves it waiting


@dataclass(frozen=True, slots=True)
class Pool:
    """Between ``least`` and ``most`` actors, each with a share of CPUs and GPUs."""

    least: int
    most: int
    cpus: float = CPUS
    gpus: float | None = None

    def strategy(self, *, pieces: int, in_flight: int = IN_FLIGHT) -> ActorPoolStrategy:
        """For ``pieces`` of work: no more actors than that; ``in_flight`` chunks at each.

        An actor takes one call at a time, and in its main thread: Ray Data's own thread has one of
        glibc's heaps of 64 MiB, where a network's larger outputs are new pages in every batch.
        """
        return ActorPoolStrategy(
            min_size=min(self.least, pieces),
            max_size=min(self.most, pieces),
            max_tasks_in_flight_per_actor=in_flight,
            enable_true_multi_threading=True,  # without a thread of Ray Data's before the actor
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """Where rows are scored, and where they are decoded; None: by the actor that scores them."""

    scorers: Pool
    decoders: Pool | None

    @property
    def readers(self) -> int:
        return (self.decoders or self.scorers).most


def place(have: Resources, actors: int | None = None, decoders: int | None = None) -> Placement:
    """Scoring and decoding on what the cluster has now, and may grow to.

    ``actors`` and ``decoders`` fix the numbers; 0 decoders: each actor decodes. Raises ConfigError
    when the cluster has fewer CPUs than they take.
    """
    if have.max_gpus:
        now, most = have.gpus * ACTORS_A_GPU, have.max_gpus * ACTORS_A_GPU
        scorers = _pool(now, most, actors, GPU_ACTOR_CPUS, 1 / ACTORS_A_GPU)
        left = (
            int(have.cpus - scorers.least * GPU_ACTOR_CPUS),
            int(have.max_cpus - scorers.most * GPU_ACTOR_CPUS),
        )
    else:
        beside = decoders or 0
        scorers = _pool(have.cpus - beside, have.max_cpus - beside, actors, CPUS, None)
        left = 0, 0
    if scorers.least * (scorers.gpus or 0) > have.max_gpus:
        raise ConfigError(
            f"--actors: got {actors}, {ACTORS_A_GPU} share a GPU; the cluster has {have.max_gpus}"
        )
    if decoders == 0 or (decoders is None and left[1] < 1):
        return Placement(scorers, None)
    found = Placement(scorers, _pool(*left, decoders, CPUS, None))
    taken = sum(pool.most * pool.cpus for pool in (found.scorers, found.decoders) if pool)
    if decoders is not None and taken > have.max_cpus:
        raise ConfigError(
            f"--decoders: got {decoders} beside {scorers.most} scoring actors, which take "
            f"{taken:.1f} CPUs; the cluster has {have.max_cpus}"
        )
    return found


def _pool(now: int, most: int, asked: int | None, cpus: float, gpus: float | None) -> Pool:
    least = max(1, now)
    return Pool(asked or least, asked or max(least, most), cpus, gpus)
