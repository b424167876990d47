"""How many training workers, on what, with how many CPUs each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmray.config import TrainConfig
from mmray.engine import cluster
from mmray.errors import ConfigError

GPU_WORKER_CPUS = 4


@dataclass(frozen=True, slots=True)
class Workers:
    """``least`` to ``count`` of them; ``cpus`` for each, also torch's threads."""

    least: int
    count: int
    gpu: bool
    cpus: int

    def __str__(self) -> str:
        number = f"{self.count}" if self.least == self.count else f"{self.least} to {self.count}"
        return f"{number} workers on {'GPU' if self.gpu else f'CPU, {self.cpus} threads each'}"


def decoders_beside(workers: Workers, have: cluster.Resources) -> int:
    """How many processes decode rows while the workers train: on the CPUs that those have left, or
    on half of all beside them, as decoding a picture costs less than training on it."""
    return max(1, have.cpus - workers.count * workers.cpus, have.cpus // 2)


def choose_workers(cfg: TrainConfig, have: cluster.Resources, nodes: Sequence[int]) -> Workers:
    """One worker a GPU, else two on the CPUs, unless the config says; CPUs are shared out evenly.

    ``nodes``: CPUs of each node there is. Raises ConfigError when the cluster has not got what is
    asked, and cannot grow to it. With a range, it is enough that it has the least.
    """
    gpu = cfg.train.use_gpu if cfg.train.use_gpu is not None else have.max_gpus > 0
    asked = cfg.train.num_workers
    count = asked.max if asked else (max(1, have.gpus) if gpu else max(1, min(have.cpus, 2)))
    least = asked.min if asked else count
    most, what = (have.max_gpus, "GPUs") if gpu else (have.max_cpus, "CPUs")
    if least > most:
        wrong = "use_gpu: got true" if asked is None else f"num_workers: got {least}"
        raise ConfigError(f"train.{wrong}; the cluster has {most} {what}, each worker needs one")
    each = max(1, have.cpus // count)
    while each > 1 and sum(node // each for node in nodes) < count:
        each -= 1
    return Workers(least, count, gpu, min(each, GPU_WORKER_CPUS) if gpu else each)
