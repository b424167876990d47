"""Rows a second of scoring on one machine: mmray against bare processes and against other tools.

    python benchmarks/score_throughput.py [--rows 16384] [--rounds 2] [--json]

Two kinds of archive (JPEGs of 512 px and of 1500 px), two models (MobileNetV3-small and a ResNet-18
that was quantized, each with a small text transformer), seven ways, in turns within one run, so
that whatever else the machine does falls on all of them; ratios are taken within a round, and their
median counts. Rates are in steady state: a quarter of the rows comes before, the last twentieth
after. The slower tools are given a quarter of the archive. ``--json`` gives the worst ratio over
the four cases.
``--workers 1`` leaves the other cores to what surrounds the scoring.

``limit``: bare processes, one a core, with scaled JPEG decode and the model as plain torch runs it.
``lowered``: the same with mmray's Predictor; what it costs to score without a framework.
``lowered``, ``mmray`` and ``mmray_embeddings`` compute a quantized model in 8 bits, the others in
their best floats; ``--encoders resnet18`` is the same model before that.
``ray_docs``: the pattern of Ray's documentation. ``dataloader``: webdataset and DataLoader.
``daft``, on the same pairs in Parquet, where it is installed (`pip install --no-deps daft`, as
it asks for an older pyarrow).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _corpus import pictures, write_bundle, write_parquet, write_tars

from mmray.model import int8

ARMS = ("limit", "lowered", "mmray", "mmray_embeddings", "ray_docs", "dataloader", "daft")
SIDES = (512, 1500)  # px
ENCODERS = ("mobilenet_v3_small", "resnet18-int8" if int8.supported() else "resnet18")
#: Of --rows: what large pictures and a large model leave of them; all runs take about as long.
SHARE = {512: 1.0, 1500: 0.5, "mobilenet_v3_small": 1.0, "resnet18": 0.5, "resnet18-int8": 0.5}
SLOW = ("ray_docs", "dataloader", "daft")
SHARD_ROWS = 1000  # as `mmray pack` makes them


def run(arm: str, bundle: Path, archive: Path, workers: int | None) -> dict[str, float]:
    """One arm in its own process; what it says of itself."""
    script = Path(__file__).with_name("_arms.py")
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    if workers is not None:
        environment["BENCH_WORKERS"] = str(workers)
    done = subprocess.run(
        [sys.executable, script, arm, bundle, archive],
        env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384, help="pairs of 512 px (default 16384)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every arm (default 2)")
    parser.add_argument("--arms", default=",".join(ARMS), help="which, by comma")
    parser.add_argument("--sides", default="512,1500", help="px, by comma")
    parser.add_argument("--encoders", default=",".join(ENCODERS), help="by comma")
    parser.add_argument("--workers", type=int, help="scoring processes of each arm (one a core)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    arms = [arm for arm in args.arms.split(",") if arm != "daft" or _there("daft")]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for side in map(int, args.sides.split(",")):
            images = pictures(side)
            for encoder in args.encoders.split(","):
                rows = int(args.rows * SHARE[side] * SHARE[encoder])
                bundle = write_bundle(Path(folder) / encoder, encoder)
                archives = _archives(Path(folder) / f"{side}-{rows}", rows, images)
                cases.append(_case(side, encoder, bundle, archives, arms, args))
    result = {
        "benchmark": "score_throughput",
        "cores": os.cpu_count(),
        "workers": args.workers or os.cpu_count(),
        "cases": cases,
        **_worst(cases),
    }
    print(json.dumps(result) if args.json else _table(result))


def _archives(root: Path, rows: int, images: list[bytes]) -> dict[str, Path]:
    """Arm -> the archive it is given."""
    shards = max(2, rows // SHARD_ROWS)
    counts = [rows // shards] * shards
    whole = write_tars(root / "tar", counts, images)
    quarter = [count // 4 for count in counts]
    part = write_tars(root / "quarter", quarter, images)
    parquet = write_parquet(root / "parquet", quarter, images)
    os.sync()  # or the first arms share the machine with what writes these to the disk
    archives = {arm: part if arm in SLOW else whole for arm in ARMS}
    return archives | {"daft": parquet}


def _there(package: str) -> bool:
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{package} is not installed: left out", file=sys.stderr)
    return found


def _case(
    side: int,
    encoder: str,
    bundle: Path,
    archives: dict[str, Path],
    arms: list[str],
    args: argparse.Namespace,
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    firsts: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(args.rounds):
        for arm in arms:
            found = run(arm, bundle, archives[arm], args.workers)
            rates[arm].append(round(found["rows_per_second"], 1))
            firsts[arm].append(round(found["first_row_s"], 1))
            print(
                f"{side} px, {encoder}, round {number + 1} of {args.rounds}: {arm} "
                f"{found['rows_per_second']:.0f} rows/s, first after {found['first_row_s']:.1f} s",
                file=sys.stderr,
            )
    return {
        "side_px": side,
        "encoder": encoder,
        "rows_per_second": {arm: statistics.median(values) for arm, values in rates.items()},
        "rounds": rates,
        "first_row_s": {arm: statistics.median(values) for arm, values in firsts.items()},
    }


def _worst(cases: list[dict[str, Any]]) -> dict[str, float]:
    """mmray's rate over each other arm's, and its first row, in the case that suits it least."""
    pairs = [("mmray", arm) for arm in ARMS if not arm.startswith("mmray")]
    pairs += [("lowered", "limit"), ("mmray_embeddings", "mmray")]
    worst = {}
    for one, other in pairs:
        ratios = [
            _ratio(c["rounds"], one, other) for c in cases if {one, other} <= c["rounds"].keys()
        ]
        if ratios:
            worst[f"{one}_over_{other}"] = min(ratios)
    firsts = [case["first_row_s"]["mmray"] for case in cases if "mmray" in case["first_row_s"]]
    return worst | ({"first_row_s": max(firsts)} if firsts else {})


def _ratio(rounds: dict[str, list[float]], one: str, other: str) -> float:
    """Of two arms' rates: the median over the rounds, as the machine's own speed changes."""
    ratios = [a / b for a, b in zip(rounds[one], rounds[other], strict=True)]
    return round(statistics.median(ratios), 3)


def _table(result: dict[str, Any]) -> str:
    cases = result["cases"]
    arms = list(cases[0]["rows_per_second"])
    lines = [f"{'rows/s':28}" + "".join(f"{arm:>12}" for arm in arms)]
    for case in cases:
        rates = case["rows_per_second"]
        name = f"{case['side_px']} px, {case['encoder']}"
        lines.append(f"{name:28}" + "".join(f"{rates[arm]:>12.1f}" for arm in arms))
    ratios = {k: v for k, v in result.items() if "_over_" in k or k == "first_row_s"}
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in ratios.items())])


if __name__ == "__main__":
    main()
