"""The actors of a scoring run: one scores chunks, one commits shards.

A chunk of pairs goes in, its scores are written as a part, a receipt comes out; when a shard's
parts are all there, they are merged into its score file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from mmray import ledger
from mmray.archive import rows
from mmray.backoff import COUNTS
from mmray.engine import ingest, pace
from mmray.engine.decoder import PREPARED, Preparer, prepared_rows
from mmray.engine.guard import limit_memory
from mmray.errors import MmrayError
from mmray.preprocess import Prepared
from mmray.scoring_run import Run
from mmray.targets import Target, Targets

COMMITS_AT_ONCE = 8  # threads; each reads and writes storage

#: One a chunk, and one for the end of every shard (``total`` set). ``failure`` stops the run.
#: ``covers``: the chunk's rows, as the starts and stops of intervals. ``decided``: by float32.
RECEIPT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("total", pa.int64()),
        ("problem", pa.string()),
        ("failure", pa.string()),
        ("covers", pa.list_(pa.int64())),
        ("set_aside", pa.int64()),
        ("decided", pa.int64()),
        ("bytes", pa.int64()),
        ("read_s", pa.float64()),
        ("decode_s", pa.float64()),
        ("predict_s", pa.float64()),
        ("write_s", pa.float64()),
        ("retries", ingest.RETRIES),
    ]
)


class Scorer:
    """Holds one Predictor; refuses to start when the bundle's golden pairs score otherwise.

    A row that takes longer than the ``limits`` allow, see ``dataflow``, ends the actor. A
    ``witness`` is told of every chunk before it is scored, see ``losses``; rows are then prepared
    guarded.
    """

    def __init__(
        self,
        bundle: str,
        fingerprint: str,
        out: str,
        embeddings: bool,
        threads: int,
        limits: tuple[float, int],
        witness: Any = None,
    ) -> None:
        import torch

        from mmray.bundle import load
        from mmray.predict import Predictor

        torch.set_num_threads(threads)
        pace.share()
        self._out, self._embeddings, self._witness = out, embeddings, witness
        self._refusal: str | None = None
        try:
            loaded = load(bundle)
            if loaded.fingerprint != fingerprint:
                raise MmrayError(f"{bundle}: changed since the run began; score into another --out")
            self._predictor = Predictor(loaded)
            self._predictor.check_golden()
            self._prepare = Preparer(
                self._predictor.preprocessor, limits, guarded=witness is not None
            )
            if self._predictor.device.type == "cpu":
                limit_memory()
        except MmrayError as error:
            # Raised here it would reach the driver as a dead actor; as a receipt it is one line.
            self._refusal = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        chunks = ingest.chunks_of(batch)
        if PREPARED in batch.column_names:
            receipts = [
                self._receipt(*chunk, *ready)
                for chunk, ready in zip(chunks, prepared_rows(batch), strict=True)
            ]
        else:
            receipts = [self._receipt(*chunk) for chunk in chunks]
        return pa.Table.from_pylist(receipts, schema=RECEIPT_SCHEMA)

    def _receipt(
        self,
        receipt: dict[str, Any],
        samples: list[rows.Sample] | None,
        prepared: list[Prepared | None] | None = None,
        seconds: float = 0.0,
    ) -> dict[str, Any]:
        """``prepared`` by a Decoder in so many ``seconds``, or here."""
        if self._refusal is not None:
            receipt["failure"] = self._refusal
        elif receipt["failure"] is None and samples is not None:
            if self._witness is not None:
                chunk = (receipt["shard"], receipt["start"], receipt["stop"])
                ray.get(self._witness.begin.remote(*chunk))
            try:
                if prepared is None:
                    began = time.perf_counter()
                    samples, prepared = self._prepare(samples)
                    seconds = time.perf_counter() - began
                receipt |= {"decode_s": seconds} | self._score(samples, prepared)
            except MmrayError as error:
                receipt["failure"] = str(error)
        receipt["retries"] = ingest.counted(receipt["retries"])
        return receipt

    def _score(self, samples: list[rows.Sample], prepared: list[Prepared | None]) -> dict[str, Any]:
        scored = self._predictor.score(samples, prepared, embeddings=self._embeddings)
        began = time.perf_counter()
        first, last = samples[0], samples[-1]
        ledger.write_part(self._out, first.shard, first.row, last.row + 1, scored.table)
        covers = ledger.joined((sample.row, sample.row + 1) for sample in samples)
        return {
            "covers": [row for interval in covers for row in interval],
            "set_aside": len(samples) - scored.table.column(rows.ERROR).null_count,
            "decided": scored.decided,
            "predict_s": scored.seconds_predict,
            "write_s": time.perf_counter() - began,
        }


Committed = tuple[ledger.ShardRecord | MmrayError, dict[str, int]]


def committed(commit: Callable[[], ledger.ShardRecord]) -> Committed:
    """The shard's record, or why there is none, and the S3 requests asked again by cause.

    Raised in an actor, every error but the first would be printed by Ray, which nobody asked.
    """
    record: ledger.ShardRecord | MmrayError
    try:
        record = commit()
    except MmrayError as error:
        record = error
    return record, COUNTS.take()


class Committer:
    """Merges the parts of finished shards; it is called again when it dies, as commits may be."""

    def __init__(self, out: str, run: Run) -> None:
        self._out, self._run = out, run
        pace.share()

    def commit(self, target: Target, total: int, problem: str | None) -> Committed:
        return committed(lambda: ledger.commit(self._out, self._run, target, total, problem))


def start_committer(kind: type, out: str, run: Run, *more: Any) -> Any:
    """An actor of this kind that takes no CPU of its own: it mostly waits for storage."""
    actor: Any = ray.remote(num_cpus=0)(kind)
    options = {"max_concurrency": COMMITS_AT_ONCE, "max_restarts": -1, "max_task_retries": -1}
    return actor.options(**options).remote(out, replace(run, targets=Targets.of(())), *more)
