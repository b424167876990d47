"""Rows a second of training: mmray against a plain torchrun loop with DistributedDataParallel.

    python benchmarks/train_throughput.py [--rows 384] [--epochs 3] [--rounds 1] [--json]

The same pairs (JPEGs of 512 px), model, precision, batch and number of workers; two models:
MobileNetV3-small with a small text transformer at 224 px, and the classic small model of
jobs/configs at 128 px. Five ways, in turns within one run, so that whatever else the machine does
falls on all of them; ratios are taken within a round, and their median counts. Rates are in steady
state: the median over the epochs after the first, evaluation, checkpoints and start left out.

``mmray``: as it is, with the decoded rows kept. ``mmray_again``: as if a third of the rows fitted,
so that they are decoded in every epoch. ``torchrun``: JPEGs decoded in every epoch, as people write
it (`_ddp.py`), in the training process itself. ``torchrun_loaders``: the same with ``--loaders``
DataLoader workers a rank beside it. ``torchrun_kept``: the same, decoded once. ``--json`` gives the
worst ratios over the models, and mmray's longest share of time spent waiting for data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from _corpus import write_labelled

ARMS = ("mmray", "torchrun", "mmray_again", "torchrun_loaders", "torchrun_kept")
MODELS = ("mobilenet", "classic")
SIDE = 512  # px, of the JPEGs
DEV_ROWS = 32
SHARDS = 4
NICENESS = 15  # Ray gives it to its workers: else other work would hold up mmray's arms alone
CLASSIC = Path(__file__).parents[1] / "jobs" / "configs" / "classic.yaml"


def config(model: str, archive: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "model": {"image": {"encoder": "mobilenet_v3_small"}, "text": {"encoder": "transformer"}},
        "train": {},
    }
    if model == "classic":
        tree = yaml.safe_load(CLASSIC.read_text(encoding="utf-8"))
    # These pictures look alike: left out as near-duplicates, each arm would train on other rows.
    tree["data"] = {"archive": str(archive), "duplicates": "report"}
    tree["out"] = str(out)
    tree["train"] |= {
        "epochs": args.epochs,
        "batch_size": args.batch,
        "num_workers": args.workers,
    }
    return tree


def run(arm: str, model: str, archive: Path, args: argparse.Namespace) -> dict[str, float]:
    """One arm in processes of its own: its median rate, and its share of waiting."""
    with tempfile.TemporaryDirectory() as folder:
        tree = config(model, archive, Path(folder) / "out", args)
        if arm == "mmray_again":
            tree["train"]["window_rows"] = args.rows // 3
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        if arm.startswith("mmray"):
            command = [sys.executable, "-m", "mmray", "train", str(path), "--json"]
        else:
            loaders = args.loaders if arm == "torchrun_loaders" else 0
            command = [
                "nice", "-n", str(NICENESS),
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", str(args.workers), str(Path(__file__).with_name("_ddp.py")),
                str(path), "--loaders", str(loaders), *(["--keep"] if "kept" in arm else []),
            ]  # fmt: skip
        threads = max(1, (os.cpu_count() or 1) // args.workers)
        environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1800
        )
        if done.returncode:
            raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout)
        if arm.startswith("mmray"):
            epochs = found["metrics"]["epochs"]
            found = {name: [e[name] for e in epochs] for name in ("rows_per_s", "data_wait")}
        return {name: statistics.median(values[1:]) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=384, help="training pairs (default 384)")
    parser.add_argument("--epochs", type=int, default=3, help="the first is not counted")
    parser.add_argument("--rounds", type=int, default=1, help="turns of every arm (default 1)")
    parser.add_argument("--batch", type=int, default=64, help="rows a step, over all workers")
    parser.add_argument("--workers", type=int, default=2, help="training processes (default 2)")
    parser.add_argument(
        "--loaders", type=int, default=1, help="DataLoader workers of a rank (default 1)"
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="by comma")
    parser.add_argument("--models", default=",".join(MODELS), help="by comma")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    arms, cases = args.arms.split(","), []
    with tempfile.TemporaryDirectory() as folder:
        archive = write_labelled(Path(folder), args.rows, DEV_ROWS, SHARDS, SIDE)
        for model in args.models.split(","):
            cases.append(_case(model, archive, arms, args))
    result = {"benchmark": "train_throughput", "cores": os.cpu_count(), "workers": args.workers}
    result |= {"loaders": args.loaders, "cases": cases, **_worst(cases)}
    print(json.dumps(result) if args.json else _table(cases, result))


def _case(model: str, archive: Path, arms: list[str], args: argparse.Namespace) -> dict[str, Any]:
    rounds: dict[str, list[float]] = {arm: [] for arm in arms}
    waits: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(args.rounds):
        for arm in arms:
            found = run(arm, model, archive, args)
            rounds[arm].append(found["rows_per_s"])
            waits[arm].append(found["data_wait"])
            print(
                f"{model}, round {number + 1} of {args.rounds}: {arm} {found['rows_per_s']:.1f} "
                f"rows/s, waiting for data {found['data_wait']:.1%}",
                file=sys.stderr,
            )
    rates = {arm: statistics.median(values) for arm, values in rounds.items()}
    return {
        "model": model,
        "rows_per_second": rates,
        "rounds": rounds,
        "data_wait_share": {arm: statistics.median(values) for arm, values in waits.items()},
    }


def _worst(cases: list[dict[str, Any]]) -> dict[str, float]:
    """mmray over the other ways, and its waiting, with the model that suits it least."""
    pairs = [
        ("mmray", "torchrun"),
        ("mmray", "torchrun_loaders"),
        ("mmray", "torchrun_kept"),
        ("mmray_again", "mmray"),
        ("mmray_again", "torchrun"),
        ("mmray_again", "torchrun_loaders"),
    ]
    worst = {}
    for one, other in pairs:
        ratios = [
            statistics.median(
                a / b for a, b in zip(case["rounds"][one], case["rounds"][other], strict=True)
            )
            for case in cases
            if {one, other} <= case["rounds"].keys()
        ]
        if ratios:
            worst[f"{one}_over_{other}"] = round(min(ratios), 3)
    for arm, name in (("mmray", "data_wait_share"), ("mmray_again", "data_wait_share_again")):
        shares = [c["data_wait_share"][arm] for c in cases if arm in c["data_wait_share"]]
        if shares:
            worst[name] = max(shares)
    return worst


def _table(cases: list[dict[str, Any]], result: dict[str, Any]) -> str:
    arms = list(cases[0]["rows_per_second"])
    lines = [f"{'rows/s (waiting for data)':26}" + "".join(f"{arm:>20}" for arm in arms)]
    for case in cases:
        cells = [
            f"{case['rows_per_second'][arm]:.1f} ({case['data_wait_share'][arm]:.1%})"
            for arm in arms
        ]
        lines.append(f"{case['model']:26}" + "".join(f"{cell:>20}" for cell in cells))
    figures = [f"{k}: {v}" for k, v in result.items() if "_over_" in k or "share" in k]
    return "\n".join([*lines, *figures])


if __name__ == "__main__":
    main()
