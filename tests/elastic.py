"""Training on a cluster of its own that gets a machine, and has it taken away after a notice.

    python tests/elastic.py CONFIG.json FOLDER

FOLDER gets what ``stage.recorded`` writes, and ``result.json``: the measured losses and the lines.
One worker waits after some steps until a second one joins it, both wait before the end until the
new machine is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import stage
from ray.cluster_utils import Cluster

from mmray.config import TrainConfig
from mmray.engine import fit, loop
from mmray.engine import train as engine

ALONE_STEPS, LAST_STEP = 4, 24  # of 32
NOTICE_SECONDS, PATIENCE = 8.0, 120.0


class Paced:
    """``loop.train_loop`` for workers, with steps that wait for what happens to the cluster."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        step, grown = loop._Worker._step, self.folder / "grown"

        def paced(worker: Any, *arguments: Any) -> Any:
            if worker.world == 2:
                grown.touch()
                time.sleep(0.5)
            last = LAST_STEP if worker.world == 2 else ALONE_STEPS
            began = time.monotonic()
            while (worker.world == 2 or not grown.exists()) and worker._number() >= last:
                time.sleep(0.1)  # until this worker is ended
                assert time.monotonic() - began < PATIENCE
            return step(worker, *arguments)

        loop._Worker._step = paced  # type: ignore[method-assign]
        try:
            with stage.recorded(self.folder):
                return train_loop(config)
        finally:
            loop._Worker._step = step  # type: ignore[method-assign]


train_loop = loop.train_loop


def main(config: str, folder: str) -> None:
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    node = {"num_cpus": 1, "object_store_memory": 1 << 28}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if [x for x in lines if x.startswith("epoch 1/4  step")] == [line]:
            new = cluster.add_node(**node)
            threading.Thread(
                target=take_away, args=(cluster, new, Path(folder)), daemon=True
            ).start()

    loop.train_loop = Paced(folder)  # type: ignore[assignment]
    fit.RESIZE_SECONDS = 2.0
    engine.SAVE_SECONDS = 60.0  # but for the notice, checkpoints are those of the epochs
    engine.SAY_SECONDS = 0.0
    done = engine.train(TrainConfig.model_validate_json(config), progress=progress)
    losses = [epoch[name] for epoch in done.metrics["epochs"] for name in ("loss", "dev_loss")]
    Path(folder, "result.json").write_text(json.dumps({"losses": losses, "lines": lines}))
    ray.shutdown()
    cluster.shutdown()


def take_away(cluster: Cluster, new: Any, folder: Path) -> None:
    """With a notice, once the machine is used."""
    from ray.core.generated import autoscaler_pb2

    while not (folder / "grown").exists():
        time.sleep(0.1)
    gcs = ray._raylet.GcsClient(address=cluster.address)
    deadline = int((time.time() + NOTICE_SECONDS) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = gcs.drain_node(new.node_id, reason, "spot", deadline)
    assert accepted, why
    time.sleep(NOTICE_SECONDS)
    cluster.remove_node(new)


if __name__ == "__main__":
    main(*sys.argv[1:])
