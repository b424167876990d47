"""The place of an unfinished training run: what was asked, and what is needed to go on.

RUN/run.json              the config and the archive it belongs to
RUN/tokenizer.json        trained on the training captions
RUN/checkpoints/          Ray Train's
RUN/best-<epoch>.safetensors   weights of the best epoch so far, and of the few best before it
RUN/epoch-<epoch>.safetensors  those of every epoch, for train.average: soup; soup.safetensors
RUN/last.safetensors      those after the last epoch
RUN/logs/                 TensorBoard's event files
RUN/failed/               the best weights, and the tokenizer, of a run whose loss was not finite
RUN/_run/lease/           held by the command that works on it
RUN/history.json          what was measured after each epoch; this, run.json, last.safetensors and
                          logs stay
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from mmray import storage
from mmray.archive.shards import Shard
from mmray.bundle import MANIFEST, Manifest, read_manifest
from mmray.config import TrainConfig, flat
from mmray.errors import ConfigError, NotFound

RECORD, TOKENIZER, HISTORY = "run.json", "tokenizer.json", "history.json"
CHECKPOINTS, LOGS, KEPT = "checkpoints", "logs", "failed"
SOUP, LAST = "soup.safetensors", "last.safetensors"
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's record of its checkpoints
_WEIGHTS = re.compile(r"(best|epoch)-\d+\.safetensors|soup\.safetensors")

#: What may differ between two sittings of one run.
FREE = ("num_workers", "use_gpu", "checkpoints", "tensorboard", "mlflow")


def place_of(cfg: TrainConfig) -> str:
    """Where the run of ``cfg`` (whose paths are absolute) keeps its state: a folder of its own."""
    if cfg.train.checkpoints is None:
        return f"{cfg.out}.run"
    name, digest = cfg.out.rpartition("/")[2], hashlib.sha256(cfg.out.encode()).hexdigest()
    return storage.join(cfg.train.checkpoints, f"{name}-{digest[:8]}.run")


def finished(cfg: TrainConfig, shards: Sequence[Shard]) -> Manifest | None:
    """The bundle at ``cfg.out`` if it is of this very config; None when there is no bundle.

    Raises ConfigError when it is another's.
    """
    if not storage.exists(storage.join(cfg.out, MANIFEST)):
        return None
    manifest = read_manifest(cfg.out)
    training = manifest.training
    there = {
        "task": manifest.task,
        "data": training.data.model_dump(mode="json"),
        "seed": training.seed,
        "preprocess": manifest.preprocess.model_dump(mode="json"),
        "model": manifest.spec["config"],
        "train": training.train.model_dump(mode="json"),
    }
    _refuse_other(f"{cfg.out}: holds a finished bundle", _free(there), identity(cfg))
    digest = training.split.get("archive_digest")
    if digest != archive_digest(shards):
        raise ConfigError(
            f"{cfg.out}: holds a finished bundle of this config, but {cfg.data.archive} has "
            "changed since; choose another out, or delete it to train again"
        )
    return manifest


def open_run(place: str, cfg: TrainConfig, shards: Sequence[Shard]) -> bool:
    """Whether an unfinished run of this config is there to go on; one without a checkpoint is not
    worth it.

    Raises ConfigError when the place belongs to another config or the archive has changed.
    """
    if not is_open(place) or not storage.exists(_snapshot(place)):
        return False
    record = json.loads(storage.read_bytes(storage.join(place, RECORD)))
    _refuse_other(f"{place}: holds an unfinished training run", record["config"], identity(cfg))
    if record["archive_digest"] != archive_digest(shards):
        raise ConfigError(
            f"{place}: holds an unfinished training run, but {cfg.data.archive} has changed "
            "since it began; choose another out, or delete the run to begin again"
        )
    return True


def begin(place: str, cfg: TrainConfig, shards: Sequence[Shard], window: int | None = None) -> None:
    """Clear the place and write down what is asked, and the rows that are decoded at a time."""
    clear(place)
    storage.delete_all(storage.join(place, LOGS))
    storage.delete(storage.join(place, LAST))
    _write(place, RECORD, {**_record(cfg, shards, done=False), "window": window})


def window_of(place: str) -> int | None:
    """How many rows this run decodes at a time, None: all. The order of rows depends on it."""
    record = json.loads(storage.read_bytes(storage.join(place, RECORD)))
    window: int | None = record.get("window")
    return window


def drop_torn_snapshot(place: str) -> None:
    """Ray rewrites its snapshot in place; killed just then, it leaves one that it cannot read. The
    run then starts over, which is better than never again."""
    try:
        json.loads(storage.read_bytes(_snapshot(place)))
    except NotFound:
        return
    except ValueError:
        storage.delete(_snapshot(place))


def close(place: str, cfg: TrainConfig, shards: Sequence[Shard], history: Any) -> None:
    """The bundle is written: leave record, history, the last weights and logs, drop the rest."""
    clear(place)
    _write(place, HISTORY, history)
    _write(place, RECORD, _record(cfg, shards, done=True))


def give_up(place: str, best: int | None) -> str | None:
    """Clear a run that would only fail again; where its best weights, those after epoch ``best``
    (1-based), are kept, in the place of what an earlier failure left."""
    kept = None
    if best is not None:
        folder = storage.join(place, KEPT)
        storage.delete_all(folder)
        for name in (best_name(best), TOKENIZER):
            if storage.exists(storage.join(place, name)):
                data = storage.read_bytes(storage.join(place, name))
                storage.write_bytes(storage.join(folder, name), data)
        kept = storage.join(folder, best_name(best))
    clear(place)
    return kept


def is_open(place: str) -> bool:
    """Whether a run was begun here and not closed."""
    try:
        record = json.loads(storage.read_bytes(storage.join(place, RECORD)))
    except NotFound:
        return False
    return not record["done"]


def best_name(epoch: int) -> str:
    """The file of the best weights so far, those after ``epoch`` (1-based)."""
    return f"best-{epoch}.safetensors"


def epoch_name(epoch: int) -> str:
    """The file of the weights after ``epoch`` (1-based), kept where epochs are averaged."""
    return f"epoch-{epoch}.safetensors"


def clear(place: str) -> None:
    """Remove what runs leave here but logs, the last weights and what ``give_up`` kept, and nothing
    else."""
    storage.delete_all(storage.join(place, CHECKPOINTS))
    try:
        names = [item.path for item in storage.list_objects(place)]
    except NotFound:
        return
    for name in names:
        if name in (RECORD, TOKENIZER, HISTORY) or _WEIGHTS.fullmatch(name):
            storage.delete(storage.join(place, name))


def _snapshot(place: str) -> str:
    return storage.join(place, CHECKPOINTS, SNAPSHOT)


def _record(cfg: TrainConfig, shards: Sequence[Shard], *, done: bool) -> dict[str, Any]:
    return {"config": identity(cfg), "archive_digest": archive_digest(shards), "done": done}


def archive_digest(shards: Sequence[Shard]) -> str:
    """Of paths and sizes: a copied archive is the same archive."""
    text = json.dumps([[shard.path, shard.size] for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()


def identity(cfg: TrainConfig) -> dict[str, Any]:
    """All of a config that decides what comes out."""
    tree = cfg.model_dump(mode="json")
    del tree["out"]
    return _free(tree)


def _free(tree: dict[str, Any]) -> dict[str, Any]:
    train = {key: value for key, value in tree["train"].items() if key not in FREE}
    return {**tree, "train": train}


def _refuse_other(what: str, there: dict[str, Any], asked: dict[str, Any]) -> None:
    before, now = flat(there), flat(asked)
    differing = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if differing:
        clauses = [f"{key} is {before.get(key)!r}, asked {now.get(key)!r}" for key in differing[:3]]
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            f"{what} of another config: {'; '.join(clauses)}{more}; choose another out, or delete "
            "it to train again"
        )


def _write(place: str, name: str, tree: Any) -> None:
    text = json.dumps(tree, indent=2, ensure_ascii=False)
    storage.write_bytes(storage.join(place, name), text.encode() + b"\n")
