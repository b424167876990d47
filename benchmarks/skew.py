"""How much longer an archive takes in which one shard is twenty times as large as the others.

    python benchmarks/skew.py [--rows 5120] [--rounds 2] [--json]

The same pairs twice: in 40 equal tars, and in 20 of them and one of the size of the other 20.
``skew_ratio``: the time from the first scored row to the last commit of the second over that of
the first; of each the best of the rounds, which take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _corpus import pictures, write_bundle, write_tars

EVEN, LARGE = 40, 20  # shards; of how many shards the large one has the pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=5120, help="pairs (default 5120)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of both (default 2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    each = args.rows // EVEN
    with tempfile.TemporaryDirectory() as folder:
        root, images = Path(folder), pictures(512)
        bundle = write_bundle(root / "bundle", "mobilenet_v3_small")
        archives = {
            "even": write_tars(root / "even", [each] * EVEN, images),
            "skewed": write_tars(root / "skewed", [each] * (EVEN - LARGE) + [each * LARGE], images),
        }
        seconds: dict[str, list[float]] = {name: [] for name in archives}
        for number in range(args.rounds):
            for name, archive in archives.items():
                seconds[name].append(_score(bundle, archive, root / f"{name}-{number}"))
    best = {name: min(values) for name, values in seconds.items()}
    result = {
        "benchmark": "skew",
        "rows": each * EVEN,
        "seconds": seconds,
        "skew_ratio": round(best["skewed"] / best["even"], 3),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def _score(bundle: Path, archive: Path, out: Path) -> float:
    """Seconds from the first scored row to the end."""
    line = [sys.executable, "-m", "mmray", "score", bundle, archive, "--out", out]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=1800)
    summary = json.loads((out / "_run" / "summary.json").read_text())
    return round(summary["seconds"] - summary["first_rows_s"], 2)


if __name__ == "__main__":
    main()
