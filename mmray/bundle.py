"""A bundle: one directory, local or ``s3://``, with a model and all that its scores depend on.

    bundle.json         what it is, and the fingerprint of the rest; written last: it is there when
                        the bundle is complete
    model.safetensors   weights
    tokenizer.json      where the model reads text
    int8.json           where it may compute in 8 bits (`mmray quantize`): what goes into the
                        picture encoder's convolutions, name -> least and greatest value
    golden.parquet      pairs with the scores they must give

Nothing in it is pickled and loading runs no code from it. ``read_manifest`` needs bundle.json only
and imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from mmray import __version__, config, storage
from mmray import golden as golden_pairs
from mmray.config import Data, Frozen, Preprocess, Range, Task, Train
from mmray.errors import BundleError, ConfigError, NotFound
from mmray.preprocess import PREPROCESS_VERSION, Preprocessor
from mmray.preprocess.text import TextTokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from mmray.model import FusionModel
    from mmray.model.spec import ModelSpec

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
RANGES = "int8.json"
GOLDEN = "golden.parquet"

_VERSIONED = (
    "torch",
    "torchvision",
    "tokenizers",
    "transformers",
    "safetensors",
    "pillow",
    "simplejpeg",
)


class Training(Frozen):
    """Where a model comes from: the data it saw and how it was split and trained."""

    data: Data
    seed: int
    train: Train
    split: dict[str, Any]  # splits.SplitReport.to_dict()


class Golden(Frozen):
    rows: Annotated[int, Field(ge=1)]
    tolerance: Annotated[float, Field(gt=0, lt=1)]  # absolute, of probabilities; as in its file


class Manifest(Frozen):
    """The content of bundle.json."""

    format_version: int
    fingerprint: str
    task: Task
    labels: tuple[str, ...]  # in the order of the model's outputs
    spec: dict[str, Any]  # model.spec.ModelSpec, checked where the model is built
    preprocess: Preprocess
    preprocess_version: int
    files: dict[str, str]  # name -> sha256 of its content (of the tensors, for the weights)
    golden: Golden
    metrics: dict[str, Any]
    training: Training
    versions: dict[str, str]

    @property
    def embedding_dim(self) -> int:
        return int(self.spec["config"]["hidden"])

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError("must be two or more different names")
        return labels

    @field_validator("files")
    @classmethod
    def _check_files(cls, files: dict[str, str]) -> dict[str, str]:
        if not {WEIGHTS, GOLDEN} <= files.keys() <= {WEIGHTS, GOLDEN, TOKENIZER, RANGES}:
            raise ValueError(
                f"must be {WEIGHTS}, {GOLDEN} and, for text, {TOKENIZER}, for 8 bits {RANGES}"
            )
        return files


@dataclass(frozen=True)
class Bundle:
    """A model in memory, with everything its scores depend on."""

    labels: tuple[str, ...]
    spec: ModelSpec
    preprocess: Preprocess
    weights: bytes  # safetensors
    tokenizer: str | None  # tokenizer.json, where the model reads text
    metrics: Mapping[str, Any]
    training: Training
    task: Task = "classify"
    golden: pa.Table | None = None  # golden.schema(labels); None until it is saved
    int8: str | None = None  # int8.json, where it was quantized

    def _files(self) -> dict[str, bytes]:
        """What scores depend on, as it is saved."""
        files = {WEIGHTS: self.weights}
        if self.tokenizer is not None:
            files[TOKENIZER] = self.tokenizer.encode()
        if self.int8 is not None:
            files[RANGES] = self.int8.encode()
        return files

    @property
    def ranges(self) -> Mapping[str, Range] | None:
        """What goes into convolutions that compute in 8 bits, by name; None: there are none. Raises
        BundleError for a text that no mmray wrote."""
        if self.int8 is None:
            return None
        try:
            return TypeAdapter(dict[str, Range]).validate_json(self.int8)
        except ValidationError as error:
            what = error.errors()[0]
            at = ".".join(map(str, what["loc"]))
            raise BundleError(f"{RANGES}: {at}: {what['msg']}; quantize the model again") from None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over task, labels, model, preprocessing, tokenizer, weights, ranges."""
        files = {name: _digest(name, data) for name, data in self._files().items()}
        task = _task_content(self.task, self.training.data)
        spec = self.spec.model_dump(mode="json")
        return _fingerprint(task, self.labels, spec, self.preprocess, PREPROCESS_VERSION, files)

    def build_model(self) -> FusionModel:
        """The model with its weights, in eval mode, on the CPU. Raises BundleError."""
        import safetensors.torch

        from mmray.model import build_model

        model = build_model(self.spec)
        try:
            model.load_state_dict(safetensors.torch.load(self.weights), strict=True)
        except RuntimeError as error:
            what = " ".join(str(error).split())
            raise BundleError(f"{WEIGHTS}: does not fit the model it belongs to: {what}") from None
        return model.eval()

    def build_preprocessor(self) -> Preprocessor:
        tokenizer = None
        if self.tokenizer is not None:
            tokenizer = TextTokenizer.from_json(self.tokenizer, self.preprocess.text)
        cfg = self.spec.config
        return Preprocessor(self.preprocess, tokenizer, cfg.modalities, cfg.missing)

    def save(self, uri: str, *, golden: pa.Table) -> Bundle:
        """Write the bundle to ``uri``; ``golden`` is what ``predict.golden_table`` gives.

        A bundle that was there is no bundle from the first write until the last.
        """
        assert golden.schema.equals(golden_pairs.schema(self.labels)) and golden.num_rows
        sink = io.BytesIO()
        pq.write_table(golden, sink, compression="zstd")
        files = self._files() | {GOLDEN: sink.getvalue()}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=self.fingerprint,
            task=self.task,
            labels=self.labels,
            spec=self.spec.model_dump(mode="json"),
            preprocess=self.preprocess,
            preprocess_version=PREPROCESS_VERSION,
            files={name: _digest(name, data) for name, data in files.items()},
            golden=Golden(rows=golden.num_rows, tolerance=golden_pairs.tolerance(golden)),
            metrics=dict(self.metrics),
            training=self.training,
            versions=_versions(),
        )
        text = json.dumps(manifest.model_dump(mode="json"), ensure_ascii=False, indent=2)
        for name in (MANIFEST, TOKENIZER, RANGES):  # those of an older bundle that had them
            storage.delete(storage.join(uri, name))
        for name, data in files.items():
            storage.write_bytes(storage.join(uri, name), data)
        storage.write_bytes(storage.join(uri, MANIFEST), text.encode() + b"\n")
        return replace(self, golden=golden)


def make(
    *,
    labels: Sequence[str],
    spec: ModelSpec,
    preprocess: Preprocess,
    state_dict: Mapping[str, Tensor],
    tokenizer: TextTokenizer | None,
    metrics: Mapping[str, Any],
    training: Training,
    task: Task = "classify",
) -> Bundle:
    """A bundle of a trained model. ``state_dict`` is that of ``build_model(spec)``; its tensors are
    copied. ``tokenizer`` is None exactly when the model reads no text."""
    import safetensors.torch

    assert len(labels) == spec.num_classes, (len(labels), spec.num_classes)
    assert (tokenizer is not None) == spec.config.uses_text
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: tensor.detach().cpu().clone() for name, tensor in state_dict.items()}
    return Bundle(
        labels=tuple(labels),
        spec=spec,
        preprocess=preprocess,
        weights=safetensors.torch.save({name: t.contiguous() for name, t in state.items()}),
        tokenizer=tokenizer.to_json() if tokenizer is not None else None,
        metrics=metrics,
        training=training,
        task=task,
    )


def read_manifest(uri: str) -> Manifest:
    """bundle.json alone, checked against its own fingerprint. Raises BundleError."""
    where = storage.join(uri, MANIFEST)
    try:
        tree = json.loads(storage.read_bytes(where))
    except NotFound:
        raise BundleError(
            f"{uri}: no bundle here, or one that was not finished (no {MANIFEST})"
        ) from None
    except ValueError as error:
        raise BundleError(f"{where}: not JSON: {error}") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{where}: format version {version!r}; this mmray reads {FORMAT_VERSION}: "
            "use the version of mmray that wrote it (versions.mmray), or train again"
        )
    try:
        manifest = config.validate(Manifest, tree, where)
    except ConfigError as error:
        raise BundleError(str(error)) from None
    found = _fingerprint(
        _task_content(manifest.task, manifest.training.data),
        manifest.labels,
        manifest.spec,
        manifest.preprocess,
        manifest.preprocess_version,
        {name: digest for name, digest in manifest.files.items() if name != GOLDEN},
    )
    if found != manifest.fingerprint:
        raise BundleError(
            f"{where}: changed after it was written: its task, labels, spec, preprocess and "
            f"files give fingerprint {found[:12]}, it says {manifest.fingerprint[:12]}; copy the "
            "bundle again"
        )
    if manifest.preprocess_version != PREPROCESS_VERSION:
        raise BundleError(
            f"{where}: made with preprocessing {manifest.preprocess_version}, this mmray has "
            f"{PREPROCESS_VERSION} and would give other scores; use mmray "
            f"{manifest.versions.get('mmray')}, or train again"
        )
    return manifest


def load(uri: str) -> Bundle:
    """The bundle at ``uri``, every file checked against bundle.json. Raises BundleError naming the
    file that is missing or differs."""
    from mmray.model.spec import ModelSpec

    manifest = read_manifest(uri)
    files = {name: _read(uri, name, digest) for name, digest in manifest.files.items()}
    where = storage.join(uri, MANIFEST)
    try:
        spec = config.validate(ModelSpec, manifest.spec, f"{where}: spec")
    except ConfigError as error:
        raise BundleError(str(error)) from None
    if len(manifest.labels) != spec.num_classes or (TOKENIZER in files) != spec.config.uses_text:
        raise BundleError(f"{where}: labels, spec and files do not belong together")
    golden = pq.read_table(pa.BufferReader(files[GOLDEN]))
    if not golden.schema.equals(golden_pairs.schema(manifest.labels)):
        raise BundleError(f"{storage.join(uri, GOLDEN)}: has columns {golden.column_names}")
    return Bundle(
        labels=manifest.labels,
        spec=spec,
        preprocess=manifest.preprocess,
        weights=files[WEIGHTS],
        tokenizer=files[TOKENIZER].decode() if TOKENIZER in files else None,
        metrics=manifest.metrics,
        training=manifest.training,
        task=manifest.task,
        golden=golden,
        int8=files[RANGES].decode(errors="replace") if RANGES in files else None,
    )


def _read(uri: str, name: str, digest: str) -> bytes:
    where = storage.join(uri, name)
    try:
        data = storage.read_bytes(where)
    except NotFound:
        raise BundleError(f"{where}: missing; copy the bundle again") from None
    if _digest(name, data) != digest:
        raise BundleError(
            f"{where}: not the file that {MANIFEST} describes: damaged, or of another bundle; "
            "copy the bundle again"
        )
    return data


def _digest(name: str, data: bytes) -> str:
    """sha256 (hex) of a file; of names, dtypes, shapes and values of all tensors for the weights,
    which a writer may order as it likes."""
    if name != WEIGHTS:
        return hashlib.sha256(data).hexdigest()
    import safetensors

    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return "not safetensors"
    total = hashlib.sha256()
    for tensor_name, tensor in sorted(tensors, key=lambda item: item[0]):
        head = [tensor_name, tensor["dtype"], list(tensor["shape"])]
        total.update(json.dumps(head).encode() + b"\n")
        total.update(tensor["data"])
    return total.hexdigest()


def _task_content(task: Task, data: Data) -> dict[str, str]:
    """The task, and what its scores depend on beside the model."""
    separator = {"label_separator": data.label_separator} if task == "multilabel" else {}
    return {"task": task, **separator}


def _fingerprint(
    task: Mapping[str, str],
    labels: Sequence[str],
    spec: Mapping[str, Any],
    preprocess: Preprocess,
    preprocess_version: int,
    files: Mapping[str, str],
) -> str:
    content = {
        **task,
        "labels": list(labels),
        "spec": spec,
        "preprocess": preprocess.model_dump(mode="json"),
        "preprocess_version": preprocess_version,
        "files": files,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"mmray": __version__, "python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # transformers is optional
    return found
