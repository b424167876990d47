"""What a Ray of one machine starts beside what computes, and what one of many does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pyarrow as pa
import ray.data
from ray._private.state import actors  # `list_actors` needs a dashboard
from ray.cluster_utils import Cluster

from mmray.engine import agent, cluster

HELPERS = {"ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor"}


class Twice:
    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({"id": [2 * i for i in batch["id"].to_pylist()]})


def computed() -> None:
    data = ray.data.range(10).map_batches(Twice, batch_format="pyarrow", concurrency=1)
    assert sorted(row["id"] for row in data.take_all()) == list(range(0, 20, 2))


def started() -> set[str]:
    return {actor["ActorClassName"] for actor in actors().values()} & HELPERS


def agents() -> list[psutil.Process]:
    """What a raylet is told to ask for figures: Ray's, or what stands in for it."""
    names = {"ray::DashboardAgent", agent.__file__}
    below = psutil.Process().children(recursive=True)
    return [p for p in below if names & {part.strip() for part in p.cmdline()}]


def told() -> None:
    """In a process of its own: two Rays of its own, the second one with figures, and a cluster."""
    os.environ["RAY_ADDRESS"] = "local"
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    for metrics_port, helpers in ((None, set()), (port, {"_StatsActor"})):
        cluster.connect(num_cpus=1, metrics_port=metrics_port)
        computed()
        assert started() == helpers
        (one,) = agents()
        assert (agent.__file__ in one.cmdline()) == (metrics_port is None)
        cluster.disconnect()
        one.wait(10)
    joined = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    os.environ["RAY_ADDRESS"] = joined.address
    cluster.connect()
    computed()
    assert started() == HELPERS
    cluster.disconnect()
    joined.shutdown()


def test_datasets_of_one_machine_start_no_actor_beside_those_that_compute() -> None:
    subprocess.run([sys.executable, __file__], check=True, timeout=200)


if __name__ == "__main__":
    told()
