"""What picture and caption together are worth over either alone: cross-validation, with intervals.

    python benchmarks/cross_validate.py ARCHIVE CONFIG.yaml [--folds 5] [--models both,image,text]
        [--set train.epochs=3] [--label label] [--work DIR] [--json]

All labelled rows are dealt into folds: whole groups of identical or near-identical pictures and
equal captions, every label in its share. Each model is trained on all folds but one, as `mmray
train` does it, and counted on that one, so every row is counted once, by a model that has seen
nothing like it. The best epoch is chosen on the fold that is counted, for every model alike:
figures are a little too good, their differences hardly. The folds are the same for every seed
(`--set seed=1`).

With ``--work`` everything is kept there, and the same command goes on where one before has ended.
Answers lie in a folder named by what was asked: the archive's listing, label, folds, the text of
the config and every ``--set``; any number of questions may share one DIR. The code, and files that
a config names, are not part of that: after a change to these, use another DIR.

The difference of two models is taken over the rows that both could read; for its interval, the rows
of a group count as one observation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from sklearn.model_selection import StratifiedGroupKFold

from mmray import duplicates, groups, splits
from mmray.archive.rows import Sample
from mmray.archive.shards import Shard, read_shard
from mmray.archive.tables import Pair
from mmray.archive.writers import TarWriter
from mmray.bundle import read_manifest
from mmray.config import Columns, Data, load
from mmray.engine.evaluate import METRICS, PREDICTIONS, evaluate
from mmray.engine.scan import archive_shards
from mmray.engine.train import train
from mmray.labels import label_text
from mmray.metrics import Z95, Confusion
from mmray.report.progress import Console

SHARD_ROWS = 500
RESAMPLES = 2000  # of groups, for an interval

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Answers = dict[int, tuple[str, str]]  # row -> its label, and the one it was given


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    found: dict[str, Answers] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).absolute()
        shards = archive_shards(args.archive)
        archive, place = places(work, shards, args)
        console.say(f"folds of {args.archive}: {archive}; answers: {place}")
        group = deal(shards, args.archive, archive, args.label, args.folds)
        for model in args.models.split(","):
            found[model], seconds[model] = ask(model, archive, place, args, console)
    result = {
        "benchmark": "cross_validate",
        "folds": args.folds,
        "sets": args.sets,
        "models": {model: report(answers) for model, answers in found.items()},
        "differences": differences(found, group),
        "seconds": seconds,
    }
    print(json.dumps(result) if args.json else text(result))


# --- folds ---------------------------------------------------------------------------------------


def places(work: Path, shards: Sequence[Shard], args: argparse.Namespace) -> tuple[Path, Path]:
    """Where the archive of folds, and the answers to what is asked of it, are kept: different
    questions share nothing."""
    dealt = digest([astuple(shard) for shard in shards], args.label, args.folds)
    config = Path(args.config).read_text(encoding="utf-8")
    return work / f"archive-{dealt}", work / f"answers-{digest(dealt, config, args.sets)}"


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def deal(shards: Sequence[Shard], source: str, dest: Path, label: str, folds: int) -> Ints:
    """Write the labelled rows of ``source``, unless they are there, with the fields ``fold_0``,
    ``fold_1``, ..., each "train" or "dev"; gives the group of each row, int64 [N]."""
    data = Data(archive=source, label=label, split=None)
    samples = [
        item
        for shard in shards
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


# --- answers -------------------------------------------------------------------------------------


def ask(
    model: str, archive: Path, place: Path, args: argparse.Namespace, console: Console
) -> tuple[Answers, float]:
    """One model's answers over all folds, and the seconds of training and counting, over all
    sittings."""
    answers: Answers = {}
    seconds = 0.0
    for fold in range(args.folds):
        out = place / f"{model}-{fold}"
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
        counted, what = Path(f"{out}.metrics", METRICS), f"{model}: fold {fold + 1} of {args.folds}"
        kept = counted.exists()
        if not kept:
            console.say(what)
            bundle = train(load(args.config, sets), progress=console.say).bundle
            evaluate(bundle, str(archive), out=f"{out}.metrics", progress=console.say)
        metrics = json.loads(counted.read_text())
        seconds += read_manifest(str(out)).metrics["seconds"] + metrics["seconds"]
        console.say(
            f"{what}: {metrics['rows']:,} rows  accuracy {metrics['accuracy']:.4f}  "
            f"macro-F1 {metrics['macro_f1']:.4f}{'  (there already)' if kept else ''}"
        )
        for row in pq.read_table(f"{out}.metrics/{PREDICTIONS}").to_pylist():
            if row["label"] is not None:
                number = int(Path(row["shard"]).stem) * SHARD_ROWS + row["row"]
                answers[number] = row["true_label"], row["label"]
    return answers, round(seconds, 1)


def report(answers: Answers) -> dict[str, Any]:
    """Figures of one model over all rows that it has an answer for."""
    names, (true, given) = coded(list(answers.values()))
    confusion = Confusion(names)
    confusion.add(true, given)
    return confusion.report()


def coded(found: Sequence[Sequence[str]]) -> tuple[list[str], Ints]:
    """The labels of N rows of several columns, sorted, and their indices, int64 [columns, N]."""
    names, indices = np.unique(np.array(found), return_inverse=True)
    return names.tolist(), indices.reshape(len(found), -1).T


# --- differences ---------------------------------------------------------------------------------


def differences(found: dict[str, Answers], group: Ints) -> dict[str, Any]:
    """Accuracy and macro-F1 of "both" less those of each other model, with 95 % intervals, over the
    rows for which both have an answer; rows of a group count as one observation."""
    result = {}
    for other in [model for model in found if model != "both" and "both" in found]:
        rows = sorted(found["both"].keys() & found[other].keys())
        three = [(*found["both"][row], found[other][row][1]) for row in rows]
        names, (true, one, two) = coded(three)
        of = np.unique(group[rows], return_inverse=True)[1]
        result[other] = {
            "rows": len(rows),
            "accuracy": accuracy_difference(true == one, true == two, of),
            "macro_f1": macro_f1_difference(true, one, two, of, len(names)),
        }
    return result


def accuracy_difference(one: Mask, other: Mask, group: Ints) -> dict[str, Any]:
    """Of two models that are right or not, bool [N], in rows of groups 0, 1, ...: the difference,
    and its interval from the spread of the groups' sums."""
    each = one.astype(float) - other
    of_group = np.bincount(group, weights=each - each.mean())
    spread = Z95 * math.sqrt(float((of_group**2).sum())) / len(each)
    return {"difference": each.mean(), "interval": [each.mean() - spread, each.mean() + spread]}


def macro_f1_difference(
    true: Ints, one: Ints, other: Ints, group: Ints, classes: int
) -> dict[str, Any]:
    """Of two models' answers, class indices [N]: the difference, and the 2.5 % and 97.5 % quantiles
    of what it is when groups are drawn with replacement (Efron & Tibshirani 1993, ch. 13)."""
    count = group.max() + 1
    confusions = np.zeros((2, count, classes * classes))
    for matrix, given in zip(confusions, (one, other), strict=True):
        np.add.at(matrix, (group, true * classes + given), 1)

    def difference(times: Ints) -> float:
        both = (times @ confusions).reshape(2, classes, classes)
        sizes = both.sum(1) + both.sum(2)
        f1 = 2 * np.diagonal(both, axis1=1, axis2=2) / np.maximum(sizes, 1)
        first, second = f1.sum(1) / (sizes > 0).sum(1)
        return float(first - second)

    random = np.random.default_rng(0)
    drawn = [
        difference(np.bincount(random.integers(count, size=count), minlength=count))
        for _ in range(RESAMPLES)
    ]
    found = difference(np.ones(count, dtype=np.int64))
    return {"difference": found, "interval": np.quantile(drawn, (0.025, 0.975)).tolist()}


def text(result: dict[str, Any]) -> str:
    lines = ["model     rows  accuracy (95 %)           macro-F1 (95 %)           seconds"]
    for model, found in result["models"].items():
        cells = [
            f"{found[name]:.4f} ({found[f'{name}_interval'][0]:.3f} to "
            f"{found[f'{name}_interval'][1]:.3f})"
            for name in ("accuracy", "macro_f1")
        ]
        seconds = result["seconds"][model]
        lines.append(f"{model:<6}  {found['rows']:>6,}  {cells[0]}  {cells[1]}  {seconds:,.0f}")
    for other, found in result["differences"].items():
        cells = [
            f"{found[name]['difference']:+.4f} ({found[name]['interval'][0]:+.4f} to "
            f"{found[name]['interval'][1]:+.4f})"
            for name in ("accuracy", "macro_f1")
        ]
        lines.append(f"both - {other}: accuracy {cells[0]}  macro-F1 {cells[1]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
