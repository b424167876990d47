"""The dataset of a scoring pass: read -> decode, where that runs apart -> score -> receipts."""

from __future__ import annotations

import warnings
from typing import Any

import ray.data
from ray.util.annotations import RayDeprecationWarning

from mmray.engine.decoder import Decoder
from mmray.engine.ingest import ReadOptions, chunks_dataset
from mmray.engine.pieces import Plan
from mmray.engine.placement import IN_FLIGHT, Placement, Pool
from mmray.engine.scorer import Scorer
from mmray.engine.witness import acquaintance
from mmray.scoring_run import Run

THREADS = 1  # of torch, in each actor


def scored(
    run: Run,
    out: str,
    plan: Plan,
    options: ReadOptions,
    placement: Placement,
    limits: tuple[float, int],
    witness: Any,
) -> ray.data.Dataset:
    """``scorer.RECEIPT_SCHEMA`` for every chunk of the plan, when its scores lie in ``out``.

    ``limits`` of a row: the seconds it may take to prepare, and up to how many pixels its picture
    may have if that is more than the bundle allows.

    What a worker held when it died is left out, and the dataset goes on. Before a ``witness``,
    each actor holds one chunk at a time.
    """
    in_flight = IN_FLIGHT if witness is None else 1
    seen_by = None if witness is None else acquaintance(witness)

    def mapped(
        dataset: ray.data.Dataset, actor: type, pool: Pool, *arguments: Any
    ) -> ray.data.Dataset:
        return dataset.map_batches(
            actor,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_constructor_args=arguments,
            compute=pool.strategy(pieces=len(plan), in_flight=in_flight),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            ray_remote_args_fn=_restart_without_retry,
        )

    dataset = chunks_dataset(run.archive, plan, options, readers=placement.readers)
    with warnings.catch_warnings():
        # Ray 2.64 takes the only ways to set max_restarts; pyproject.toml stops before it.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        if placement.decoders is not None:
            dataset = mapped(dataset, Decoder, placement.decoders, run.bundle, limits, seen_by)
        scorer = run.bundle, run.fingerprint, out, run.embedding_dim is not None
        arguments = *scorer, THREADS, limits, seen_by
        dataset = mapped(dataset, Scorer, placement.scorers, *arguments)
    dataset.context.max_errored_blocks = -1
    return dataset


def _restart_without_retry() -> dict[str, int]:
    """A dead actor comes back, but what it held waits for the next pass: it may be the cause."""
    return {"max_restarts": -1, "max_task_retries": 0}
