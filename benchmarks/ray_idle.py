"""What Ray's own processes take of a machine while nothing is asked of them, as mmray starts them.

    python benchmarks/ray_idle.py [--seconds 20] [--json]

Cores in use by the whole machine: by itself, then with a Ray on it whose actors, one a core, wait.
The most that a job on that Ray can have is the rest; ``share`` is what it cannot have.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import psutil
import ray

from mmray.engine import cluster

SETTLING_S = 15.0
CORES = os.cpu_count() or 1


@ray.remote
class Waits:
    def there(self) -> bool:
        return True


def in_use(seconds: float) -> float:
    """Cores, at the mean over so many seconds."""
    before = psutil.cpu_times()
    time.sleep(seconds)
    after = psutil.cpu_times()
    waited = after.idle - before.idle + getattr(after, "iowait", 0) - getattr(before, "iowait", 0)
    return CORES - waited / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="that are looked at, twice")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()
    alone = in_use(args.seconds)
    os.environ["RAY_ADDRESS"] = "local"
    cluster.connect(num_cpus=CORES)  # as a command of mmray starts it
    actors = [Waits.remote() for _ in range(CORES)]
    ray.get([actor.there.remote() for actor in actors])
    time.sleep(SETTLING_S)
    waiting = in_use(args.seconds)
    result = {
        "benchmark": "ray_idle",
        "cores": CORES,
        "alone": round(alone, 3),
        "waiting": round(waiting, 3),
        "share": round((waiting - alone) / CORES, 3),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
