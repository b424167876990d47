"""What rows that kill cost a scoring run: seconds lost for each.

    python benchmarks/killers.py [--rows 1200] [--killers 6] [--row-timeout 3] [--json]

The same archive is scored twice on a local Ray: undisturbed, and with some rows that crash the
decoder, never return or take memory without end, in turns, evenly among the others. All of those
must be set aside with their reason and all others scored; else it exits with 1. ``recovery_s`` is
the run's own figure: what came after its first pass.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _corpus import pictures, write_bundle, write_tars
from ray import cloudpickle

from mmray.archive.rows import CRASHED, TOO_LONG, TOO_MUCH_MEMORY, Sample
from mmray.engine import cluster, dataflow, guard
from mmray.engine import score as engine
from mmray.engine.scorer import Scorer
from mmray.preprocess import Preprocessor
from mmray.report.progress import Console

SHARDS = 4
REASONS = (CRASHED, TOO_LONG, TOO_MUCH_MEMORY)


class HarmedScorer(Scorer):
    """Its decoder does harm on certain rows of the first shard."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        harm(self._predictor.preprocessor, json.loads(os.environ["KILLERS"]))
        guard._limit(5 << 30)


def harm(preprocessor: Preprocessor, killers: dict[str, str]) -> None:
    pixels = preprocessor._pixels

    def harmed(sample: Sample) -> Any:
        reason = killers.get(f"{sample.shard} {sample.row}")
        if reason == CRASHED:
            os.kill(os.getpid(), signal.SIGSEGV)
        while reason == TOO_LONG:
            time.sleep(1)
        held = []
        while reason == TOO_MUCH_MEMORY:
            held.append(bytes(64 << 20))
        return pixels(sample)

    preprocessor._pixels = harmed  # type: ignore[method-assign]


def run(bundle: str, archive: str, out: Path, seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    options = engine.ScoreOptions(row_seconds=seconds)
    summary = engine.score(bundle, archive, str(out), options, Console())
    return summary | {"wall_s": time.monotonic() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1200, help="in four shards (default 1200)")
    parser.add_argument("--killers", type=int, default=6, help="of them (default 6)")
    parser.add_argument("--row-timeout", type=float, default=3.0, help="seconds (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    a_shard, step = args.rows // SHARDS, args.rows // args.killers
    places = [divmod(step // 2 + step * i, a_shard) for i in range(args.killers)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle = str(write_bundle(root / "bundle", "mobilenet_v3_small"))
        archive = str(write_tars(root / "archive", [a_shard] * SHARDS, pictures(512)))
        names = sorted(path.name for path in Path(archive).glob("*.tar"))
        killers = {
            f"{names[shard]} {row}": REASONS[i % len(REASONS)]
            for i, (shard, row) in enumerate(places)
        }
        os.environ["KILLERS"] = json.dumps(killers)
        cluster.connect()  # so that neither run pays for its start
        calm = run(bundle, archive, root / "calm", args.row_timeout)
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        dataflow.Scorer = HarmedScorer  # type: ignore[misc]
        harmed = run(bundle, archive, root / "harmed", args.row_timeout)
    expected = {reason: list(killers.values()).count(reason) for reason in set(killers.values())}
    lost = harmed["wall_s"] - calm["wall_s"]
    result = {
        "benchmark": "killers",
        "rows": harmed["rows"],
        "killers": args.killers,
        "row_timeout_s": args.row_timeout,
        "undisturbed_s": round(calm["wall_s"], 1),
        "seconds": round(harmed["wall_s"], 1),
        "recovery_s": round(harmed["recovery_s"], 1),
        "lost_s_a_killer": round(lost / args.killers, 1),
        "set_aside": harmed["reasons"],
        "held": harmed["reasons"] == expected and harmed["rows"] == calm["rows"],
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
