"""From a finished training run to its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from mmray import splits, storage
from mmray.archive import rows
from mmray.archive.shards import read_shard
from mmray.bundle import Bundle, Training, make
from mmray.engine import rundir
from mmray.engine.plan import Plan
from mmray.engine.prepared import PreparedSet
from mmray.engine.scan import LabelledRows
from mmray.preprocess import TextTokenizer

if TYPE_CHECKING:
    from mmray.model import ModelSpec

GOLDEN_CANDIDATES = 128  # dev rows that golden pairs are chosen from


def save_bundle(
    plan: Plan,
    spec: ModelSpec,
    data: LabelledRows,
    ready: PreparedSet,
    tokenizer: TextTokenizer | None,
    start: bytes,
    done: Mapping[str, Any],
    *,
    without_negative: Mapping[str, int] | None = None,
) -> Bundle:
    """Save the model of the best epoch, or the soup of some, with golden pairs from the dev rows.

    ``start``: the weights training started from; ``done``: what ``loop.train_loop`` gave;
    ``without_negative``: of a ``match`` training, the rows of each side that have none.
    """
    import safetensors.torch

    from mmray.predict import golden_table

    cfg, best = plan.cfg, done["best"]
    name = rundir.SOUP if "soup" in best else rundir.best_name(best["epoch"])
    trained = storage.read_bytes(storage.join(plan.place, name))
    split = {
        **data.split.report.to_dict(),
        "set_aside": ready.reasons(),
        "archive_digest": rundir.archive_digest(plan.shards),
    }
    if without_negative is not None:
        split["without_negative"] = dict(without_negative)
    bundle = make(
        labels=data.labels,
        spec=spec,
        preprocess=cfg.preprocess,
        # Encoders that were frozen are not among the trained weights.
        state_dict=safetensors.torch.load(start) | safetensors.torch.load(trained),
        tokenizer=tokenizer,
        metrics={**best, "epochs": done["epochs"], "seconds": round(done["seconds"], 1)},
        task=cfg.task,
        training=Training(data=cfg.data, seed=cfg.seed, train=cfg.train, split=split),
    )
    return bundle.save(cfg.out, golden=golden_table(bundle, _golden_samples(plan, data, ready)))


def _golden_samples(plan: Plan, data: LabelledRows, ready: PreparedSet) -> list[rows.Sample]:
    """Dev rows as the archive holds them: the first ones, and the first of every label. None that
    was set aside: it might crash its decoder."""
    aside = {(shard, row) for shard, row, *_ in ready.aside}
    dev = data.rows.filter(pc.equal(data.split.sides, splits.DEV))
    wanted: dict[str, set[int]] = {}
    seen: set[str] = set()
    records = dev.select(["shard", "row", "label"]).to_pylist()
    kept = (record for record in records if (record["shard"], record["row"]) not in aside)
    for i, record in enumerate(kept):
        if i < GOLDEN_CANDIDATES or record["label"] not in seen:
            wanted.setdefault(record["shard"], set()).add(record["row"])
            seen.add(record["label"])
    found: list[rows.Sample] = []
    for shard in plan.shards:
        if chosen := wanted.get(shard.path):
            stream = read_shard(
                plan.archive,
                shard,
                columns=plan.cfg.data.columns,
                stop=max(chosen) + 1,
                skip=lambda row, chosen=chosen: row not in chosen,  # type: ignore[misc]
            )
            found += [item for item in stream if isinstance(item, rows.Sample)]
    return found
