"""Predictor: rows -> scores. The one used by batch scoring, evaluation and serving.

Shapes: B rows of a batch, N rows of a call, C classes, D width of the embedding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mmray import doubt, golden
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.bundle import Bundle
from mmray.config import Precision
from mmray.counts import THRESHOLD
from mmray.errors import BadRow, BundleError, ConfigError, MmrayError, RunError, one_line
from mmray.labels import joined
from mmray.learn import autocast, collate, resolve_precision
from mmray.memory import keep_freed_memory
from mmray.model import int8
from mmray.model.fuse import fuse
from mmray.model.speed import for_inference
from mmray.objective import probabilities
from mmray.preprocess import Prepared, fault

#: Rows; on a CPU, larger batches leave its caches.
CPU_BATCH, CPU_BATCH_BF16, GPU_BATCH = 16, 32, 256

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Outputs:
    """``probabilities`` float32 [N, C], rows sum to 1 unless a row may have several labels;
    ``embeddings`` float32 [N, D]."""

    probabilities: Floats
    embeddings: Floats


@dataclass(frozen=True, slots=True)
class Scored:
    """``table`` of ``rows.scores_schema``, a row a sample in order, and how long the model took."""

    table: pa.Table
    seconds_predict: float  # the model, transfers included
    decided: int  # rows whose scores are those of float32, see Predictor


class Predictor:
    """A bundle's model, ready to score on one device.

    The same samples in one call give the same scores whatever was scored before: batches are cut
    by position, and nothing is learned from earlier ones but how many rows memory holds. Not
    for use from several threads at once, except ``prepare``.

    Labels are those of float32: where a lower precision leaves a row's label in doubt, see
    ``doubt``, the row is scored in float32, by a second model that is built for the first such row.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "auto",
        precision: Precision | None = None,
        *,
        batch_size: int | None = None,
        threads: int | None = None,
        decide: bool = True,
    ) -> None:
        """``device``: auto, cpu, cuda or cuda:N. ``precision``: None is what it was trained in, as
        ``train.precision`` had it, with convolutions in 8 bits where the bundle was quantized and
        the CPU multiplies such. ``batch_size``: rows a forward pass; None: what suits the device,
        and its memory. ``threads``: of torch, in the whole process; None: as they are. ``decide``:
        False leaves labels that are in doubt as they are.

        Raises ConfigError for a device that is not there, BundleError for weights that do not fit.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = _device(device)
        self.precision: Precision = resolve_precision(
            precision or bundle.training.train.precision, self.device
        )
        bf16 = self.precision == "bf16"
        on_cpu = self.device.type == "cpu"
        self.int8 = bool(precision is None and bundle.ranges and on_cpu and int8.supported())
        if batch_size is None and not on_cpu:
            batch_size = GPU_BATCH
        self.batch_size = batch_size or (CPU_BATCH_BF16 if bf16 else CPU_BATCH)
        self.labels = bundle.labels
        self._several = bundle.task == "multilabel"
        self._separator = bundle.training.data.label_separator
        self.fingerprint = bundle.fingerprint
        self.embedding_dim = bundle.spec.config.hidden
        self.golden = bundle.golden
        self.preprocessor = bundle.build_preprocessor()
        ranges = bundle.ranges if self.int8 else None
        self._model = for_inference(bundle.build_model(), bf16=bf16, ranges=ranges).to(self.device)
        self._model.to(memory_format=torch.channels_last)
        if on_cpu:
            fuse(self._model, bf16=bf16)
            keep_freed_memory()
        lower = self.precision != "float32" or self.int8
        self._doubt = golden.doubt_limit(bundle.golden) if decide and lower else 0.0
        self._bundle = bundle if self._doubt else None  # until the exact one is built of it
        self._exact: Predictor | None = None
        self._blank = _blank(bundle)
        if not on_cpu:
            self._batch([self._blank] * self.batch_size)  # finds what fits, before the first row

    @property
    def computes_in(self) -> str:
        """For people: its precision."""
        return f"{self.precision} with int8" if self.int8 else self.precision

    # --- one step at a time ------------------------------------------------------------------

    def prepare(self, sample: Sample) -> Prepared:
        """The sample's pixels and token ids, on the CPU. Raises BadRow, and nothing else, for a
        sample that cannot be used."""
        return self.preprocessor.prepare(sample)

    def forward(self, prepared: Sequence[Prepared]) -> Outputs:
        """Score prepared rows in batches. An error is that of the model or the device and raises;
        out of memory, a batch is run again in halves."""
        outputs = self._joined([self._batch(batch) for _, batch in self._batches(prepared)])
        self._decide(prepared, outputs)
        return outputs

    # --- whole chunks ------------------------------------------------------------------------

    def score(
        self,
        samples: Sequence[Sample],
        prepared: Sequence[Prepared | None] | None = None,
        *,
        embeddings: bool = False,
    ) -> Scored:
        """Every sample once, in order, with its scores or the reason why not.

        ``prepared`` is what ``Preprocessor.prepare_all`` gave for these samples, if it was called.
        Raises RunError when the model or its device fails on any input, or lacks the memory for
        one row: that is no row's fault.
        """
        if prepared is None:
            samples, prepared = self.preprocessor.prepare_all(samples)
        began = time.perf_counter()
        at = [i for i, row in enumerate(prepared) if row is not None]
        ready = [row for row in prepared if row is not None]
        errors = {i: fault(samples[i]) for i, row in enumerate(prepared) if row is None}
        outputs, faults = self._forward_rows(ready)
        decided = self._decide(ready, outputs)
        errors |= {at[i]: fault for i, fault in faults.items()}
        table = self._table(samples, at, outputs, errors, embeddings)
        return Scored(table, time.perf_counter() - began, decided)

    def score_table(self, samples: Sequence[Sample], *, embeddings: bool = False) -> pa.Table:
        """The table of ``score``: ``rows.scores_schema(labels)``, a row a sample, in order."""
        return self.score(samples, embeddings=embeddings).table

    def build_exact(self) -> None:
        """Build now what the first row in doubt needs, if a row can be: it takes as long as this
        Predictor did."""
        if self._bundle is not None:
            self._exact = Predictor(self._bundle, str(self.device), "float32")
            self._bundle = None

    def check_golden(self) -> float:
        """Score the bundle's golden pairs; the largest difference from what they must give.

        Raises BundleError, naming a pair, when one differs by more than the bundle's tolerance.
        """
        assert self.golden is not None, "only a bundle that was saved has golden pairs"
        scores = self.score_table(golden.inputs(self.golden))
        try:
            return golden.compare(self.golden, scores, self.labels)
        except BundleError as error:
            raise BundleError(
                f"on {self.device} in {self.computes_in} this bundle gives other scores than its "
                f"own: {error}; compare library versions with those in bundle.json"
            ) from None

    # --- inside ------------------------------------------------------------------------------

    def _run(self, batch: Sequence[Prepared]) -> Outputs:
        inputs = collate(batch).to(self.device)
        with torch.inference_mode(), autocast(self.precision, self.device):
            logits_BC, embedding_BD = self._model(
                inputs.pixels, inputs.tokens, inputs.mask, inputs.pictured
            )
            probabilities_BC = probabilities(logits_BC, several=self._several)
        return Outputs(probabilities_BC.cpu().numpy(), embedding_BD.cpu().numpy())

    def _batches(self, prepared: Sequence[Prepared]) -> Iterator[tuple[int, Sequence[Prepared]]]:
        """Where each batch starts, and the batch; the next ones are smaller where memory did not
        suffice for one."""
        start = 0
        while start < len(prepared):
            batch = prepared[start : start + self.batch_size]
            yield start, batch
            start += len(batch)

    def _batch(self, batch: Sequence[Prepared]) -> Outputs:
        """One batch; in halves where memory does not suffice, which is remembered."""
        try:
            return self._run(batch)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch) == 1:
                what = one_line(error)
                raise RunError(f"{self.device}: no memory to score even one row: {what}") from error
        # Out here the failed attempt's tensors are free.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        self.batch_size = min(self.batch_size, middle)
        return self._joined([self._batch(batch[:middle]), self._batch(batch[middle:])])

    def _forward_rows(self, prepared: Sequence[Prepared]) -> tuple[Outputs, dict[int, BadRow]]:
        """Outputs of all rows, and why some have none (theirs are then NaN), by position."""
        parts: list[Outputs] = []
        faults: dict[int, BadRow] = {}
        for start, batch in self._batches(prepared):
            try:
                parts.append(self._batch(batch))
            except MmrayError:
                raise
            except Exception:  # noqa: BLE001  # the batch's other rows must not pay for one
                for i, row in enumerate(batch, start):
                    outcome = self._alone(row)
                    if isinstance(outcome, BadRow):
                        faults[i], outcome = outcome, self._nothing(1)
                    parts.append(outcome)
        outputs = self._joined(parts)
        for i in np.flatnonzero(~np.isfinite(outputs.probabilities).all(axis=1)).tolist():
            faults.setdefault(i, BadRow("predict", "score not finite"))
        return outputs, faults

    def _alone(self, row: Prepared) -> Outputs | BadRow:
        try:
            return self._batch([row])
        except MmrayError:
            raise
        except Exception as error:  # noqa: BLE001  # torch raises what it likes
            self._check_works(error)
            return BadRow.surprise("predict", error)

    def _check_works(self, error: Exception) -> None:
        """Raise RunError if a blank row fails too: then ``error`` says nothing about its row."""
        try:
            self._run([self._blank])
        except Exception:  # noqa: BLE001  # whatever it is, it is not the row's
            raise RunError(
                f"the model fails on {self.device} whatever it is given: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error

    def _decide(self, prepared: Sequence[Prepared], outputs: Outputs) -> int:
        """Put the outputs of float32 in the place of those of rows in doubt; says of how many."""
        close = doubt.closeness(outputs.probabilities, several=self._several) < self._doubt
        at = np.flatnonzero(close)
        if not len(at):
            return 0
        self.build_exact()
        assert self._exact is not None
        exact, faults = self._exact._forward_rows([prepared[i] for i in at.tolist()])
        there = np.array([i not in faults for i in range(len(at))])
        outputs.probabilities[at[there]] = exact.probabilities[there]
        outputs.embeddings[at[there]] = exact.embeddings[there]
        return int(there.sum())

    def _joined(self, parts: Sequence[Outputs]) -> Outputs:
        if not parts:
            return self._nothing(0)
        return Outputs(
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.embeddings for part in parts]),
        )

    def _nothing(self, n: int) -> Outputs:
        widths = len(self.labels), self.embedding_dim
        return Outputs(*(np.full((n, width), np.nan, np.float32) for width in widths))

    def _table(
        self,
        samples: Sequence[Sample],
        at: Sequence[int],
        outputs: Outputs,
        errors: Mapping[int, BadRow],
        embeddings: bool,
    ) -> pa.Table:
        """``outputs`` are those of the samples ``at``; all others, and any in ``errors``, have
        none."""
        n = len(samples)
        scored = np.zeros(n, dtype=bool)
        scored[at] = True
        scored[list(errors)] = False
        scores = np.zeros((n, len(self.labels)), np.float32)
        scores[at] = outputs.probabilities
        why = [errors.get(i) for i in range(n)]
        columns = [
            pa.array([s.shard for s in samples], pa.string()),
            pa.array([s.row for s in samples], pa.int64()),
            pa.array([s.key for s in samples], pa.string()),
            self._label_column(scores, scored),
            *(pa.array(column, pa.float32(), mask=~scored) for column in scores.T),
            pa.array([None if w is None else str(w) for w in why], pa.string()),
            pa.array([None if w is None else w.stage for w in why], pa.string()),
        ]
        if embeddings:
            limit = np.finfo(np.float16).max
            vectors = np.zeros((n, self.embedding_dim), np.float16)
            vectors[at] = outputs.embeddings.clip(-limit, limit)
            values = pa.array(vectors.reshape(-1))
            mask = pa.array(~scored)
            columns.append(pa.FixedSizeListArray.from_arrays(values, self.embedding_dim, mask=mask))
        schema = rows.scores_schema(self.labels, self.embedding_dim if embeddings else None)
        return pa.Table.from_arrays(columns, schema=schema)

    def _label_column(self, scores: Floats, scored: npt.NDArray[np.bool_]) -> pa.Array:
        """The most probable label of every scored row, or the text of all that are given to it."""
        if self._several:
            given = joined(self.labels, scores >= THRESHOLD, self._separator)
            return pa.array(given, pa.string(), mask=~scored)
        best = pa.array(scores.argmax(axis=1), pa.int64(), mask=~scored)
        return pa.array(self.labels, pa.string()).take(best)


def golden_table(bundle: Bundle, samples: Sequence[Sample]) -> pa.Table:
    """Some of ``samples`` (a few hundred make a good choice) with the scores they must give, for
    ``Bundle.save``.

    Scored on the CPU in float32, the reference that every device is compared with; and in bfloat16,
    for the tolerance and what leaves labels in doubt. Raises BundleError when no sample can be
    scored.
    """
    some = golden.candidates(samples)
    scores = Predictor(bundle, "cpu", "float32").score_table(some)
    several = bundle.task == "multilabel"
    chosen = golden.choose(some, scores, bundle.labels, several=several)
    lower = Predictor(bundle, "cpu", "bf16", decide=False)
    rough = lower.score_table(golden.inputs(chosen))
    chosen = golden.with_tolerance(chosen, rough, bundle.labels)
    rough = lower.score_table(some)
    return golden.with_doubt(chosen, scores, rough, bundle.labels, several=several)


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    if name != "cpu" and not (name.split(":")[0] == "cuda" and there):
        raise ConfigError(
            f"device: got {name!r}; allowed: auto, cpu, cuda, cuda:N"
            + ("" if there else " (torch finds no GPU here)")
        )
    return torch.device(name)


def _blank(bundle: Bundle) -> Prepared:
    """The plainest input the model takes: a black picture, one padding token."""
    size = bundle.preprocess.image.size
    cfg = bundle.spec.config
    return Prepared(
        np.zeros((3, size, size), np.uint8) if cfg.uses_image else None,
        np.array([bundle.spec.pad_id], np.int32) if cfg.uses_text else None,
    )


#: What torch's allocators and libraries say in a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(phrase in str(error) for phrase in _NO_MEMORY)
