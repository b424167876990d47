"""What picture and caption together are worth over either alone: cross-validation, with intervals.

    python benchmarks/cross_validate.py ARCHIVE CONFIG.yaml [--folds 5] [--models both,image,text]
        [--set train.epochs=3] [--label label] [--work DIR] [--json]

All labelled rows are dealt into folds: whole groups of identical or near-identical pictures and
equal captions, every label in its share. Each model is trained on all folds but one, as `mmray
train` does it, and counted on that one, so every row is counted once, by a model that has seen
nothing like it. The best epoch is chosen on the fold that is counted, for every model alike:
figures are a little too good, their differences hardly.

With ``--work`` everything is kept there, and the same command goes on where one before has ended.

The difference of two models is taken row by row; for its interval, the rows of a group count as one
observation.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from sklearn.model_selection import StratifiedGroupKFold

from mmray import duplicates, groups, splits
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.archive.tables import Pair
from mmray.archive.writers import TarWriter
from mmray.config import Columns, Data, load
from mmray.engine.evaluate import METRICS, PREDICTIONS, evaluate
from mmray.engine.train import train
from mmray.labels import label_text
from mmray.metrics import Z95, Confusion
from mmray.report.progress import Console

SHARD_ROWS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive")
    parser.add_argument("config")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--models", default="both,image,text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, help="directory to keep archive and models in")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        args.work = args.work or Path(scratch)
        archive = args.work / f"archive-{args.folds}"
        group = deal(args.archive, archive, args.label, args.folds)
        found = {
            model: predictions(model, archive, args, console) for model in args.models.split(",")
        }
    result = {
        "benchmark": "cross_validate",
        "folds": args.folds,
        "models": {model: report for model, (report, _, _) in found.items()},
        "differences": differences({m: right for m, (_, right, _) in found.items()}, group),
        "seconds": {model: seconds for model, (_, _, seconds) in found.items()},
    }
    print(json.dumps(result) if args.json else text(result))


def deal(source: str, dest: Path, label: str, folds: int) -> np.ndarray:
    """Write the labelled rows of ``source``, unless they are there, with the fields ``fold_0``,
    ``fold_1``, ..., each "train" or "dev"; gives the group of each row, int64 [N]."""
    data = Data(archive=source, label=label, split=None)
    samples = [
        item
        for shard in list_shards(source)
        for item in read_shard(source, shard, columns=Columns(), fields=(label,))
        if isinstance(item, Sample)
        and item.error is None
        and label_text(item.fields.get(label)) is not None
    ]
    identity = splits.identify(samples, data)
    group = groups.components(*duplicates.ties(identity, data).values())
    labels = identity["label"].to_pylist()
    kfold = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    fold = np.empty(len(samples), dtype=int)
    for number, (_, held_out) in enumerate(kfold.split(samples, labels, group)):
        fold[held_out] = number
    if dest.exists():
        return group
    unfinished = dest.with_suffix(".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(samples), SHARD_ROWS):
        writer = TarWriter(unfinished / f"{start // SHARD_ROWS:05d}.tar")
        for i, sample in enumerate(samples[start : start + SHARD_ROWS], start):
            sides = {f"fold_{k}": "dev" if fold[i] == k else "train" for k in range(folds)}
            fields = {label: label_text(sample.fields[label]), **sides}
            writer.add(Pair(image=sample.image, caption=sample.caption, fields=fields), f"{i:09d}")
        writer.close()
    unfinished.rename(dest)
    return group


def predictions(
    model: str, archive: Path, args: argparse.Namespace, console: Console
) -> tuple[dict[str, Any], np.ndarray, float]:
    """Of one model over all rows: the report, which rows are right (bool [N]), seconds."""
    began, confusion = time.monotonic(), None
    right: dict[tuple[str, int], bool] = {}
    for fold in range(args.folds):
        out = args.work / f"{model}-{fold}-of-{args.folds}"
        sets = [
            *args.sets,
            f"data.archive={archive}",
            f"data.label={args.label}",
            f"data.split=fold_{fold}",
            "data.train=train",
            "data.dev=dev",
            f"model.modalities={model}",
            f"out={out}",
        ]
        counted = Path(f"{out}.metrics", METRICS)
        if not counted.exists():
            console.say(f"{model}: fold {fold + 1} of {args.folds}")
            bundle = train(load(args.config, sets), progress=console.say).bundle
            evaluate(bundle, str(archive), out=f"{out}.metrics", progress=console.say)
        metrics = json.loads(counted.read_text())
        part = Confusion(metrics["labels"], np.array(metrics["confusion"]))
        confusion = confusion or Confusion(metrics["labels"])
        confusion.merge(part)
        for row in pq.read_table(f"{out}.metrics/{PREDICTIONS}").to_pylist():
            right[row["shard"], row["row"]] = row["label"] == row["true_label"]
    assert confusion is not None
    ordered = np.array([right[at] for at in sorted(right)])
    return confusion.report(), ordered, round(time.monotonic() - began, 1)


def differences(right: dict[str, np.ndarray], group: np.ndarray) -> dict[str, Any]:
    """Accuracy of "both" less that of each other model, with a 95 % interval; rows of a group count
    as one observation."""
    found = {}
    for other in [model for model in right if model != "both" and "both" in right]:
        assert len(right["both"]) == len(right[other]) == len(group), "a row was set aside"
        each = right["both"].astype(float) - right[other]
        mean = each.mean()
        of_group = np.bincount(group, weights=each - mean, minlength=len(group))
        spread = Z95 * math.sqrt(float((of_group**2).sum())) / len(each)
        found[other] = {"difference": float(mean), "interval": [mean - spread, mean + spread]}
    return found


def text(result: dict[str, Any]) -> str:
    lines = ["model   accuracy (95 %)           macro-F1 (95 %)           seconds"]
    for model, report in result["models"].items():
        cells = [
            f"{report[name]:.4f} ({report[f'{name}_interval'][0]:.3f} to "
            f"{report[f'{name}_interval'][1]:.3f})"
            for name in ("accuracy", "macro_f1")
        ]
        lines.append(f"{model:<6}  {cells[0]}  {cells[1]}  {result['seconds'][model]:,.0f}")
    for other, found in result["differences"].items():
        low, high = found["interval"]
        lines.append(f"both - {other}: {found['difference']:+.4f} ({low:+.4f} to {high:+.4f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
