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
    count: int
    gpu: bool
    cpus: int  # of each


def choose_workers(cfg: TrainConfig, have: cluster.Resources, nodes: Sequence[int]) -> Workers:
    """One worker a GPU, else two on the CPUs, unless the config says; CPUs are shared out evenly.

    ``nodes``: CPUs of each node there is. Raises ConfigError when the cluster has not got what is
    asked, and cannot grow to it.
    """
    gpu = cfg.train.use_gpu if cfg.train.use_gpu is not None else have.max_gpus > 0
    count = cfg.train.num_workers or (max(1, have.gpus) if gpu else max(1, min(have.cpus, 2)))
    most, what = (have.max_gpus, "GPUs") if gpu else (have.max_cpus, "CPUs")
    if count > most:
        asked = cfg.train.num_workers
        wrong = "use_gpu: got true" if asked is None else f"num_workers: got {asked}"
        raise ConfigError(f"train.{wrong}; the cluster has {most} {what}, each worker needs one")
    each = max(1, have.cpus // count)
    while each > 1 and sum(node // each for node in nodes) < count:
        each -= 1
    return Workers(count, gpu, min(each, GPU_WORKER_CPUS) if gpu else each)
