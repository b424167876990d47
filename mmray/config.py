"""Configuration: YAML onto typed, frozen models, checked before any resource is asked for.

``load(path, ["model.fusion=gated"])`` gives a ``TrainConfig``; a wrong key, type or value raises
ConfigError naming the key, what it got and what is allowed.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmray.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Modalities = Literal["both", "image", "text"]
Precision = Literal["auto", "bf16", "float32"]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --- preprocessing: travels with the model, inside the bundle ------------------------------------


class ImagePreprocess(Frozen):
    """Image bytes -> uint8 [3, size, size]."""

    size: Positive = 224  # pixels, both sides
    resize: Literal["squash", "crop"] = "squash"  # crop: shorter side to size, centre kept
    max_pixels: Positive = 100_000_000  # declared in the header; more is set aside undecoded


class TextPreprocess(Frozen):
    """Caption -> token ids."""

    unicode: Literal["NFC", "NFKC"] = "NFKC"
    lowercase: bool = False
    urls: Literal["keep", "drop", "token"] = "token"
    mentions: Literal["keep", "drop", "token"] = "token"
    max_tokens: Annotated[int, Field(ge=4)] = 64
    vocab_size: Annotated[int, Field(ge=300)] = 8000  # of a tokenizer trained on the captions
    tokenizer: str | None = None  # a Hugging Face tokenizer.json; null: train one


class Preprocess(Frozen):
    image: ImagePreprocess = ImagePreprocess()
    text: TextPreprocess = TextPreprocess()


# --- model ---------------------------------------------------------------------------------------


class ImageModel(Frozen):
    encoder: str = "small_cnn"  # small_cnn, or a torchvision classification model by name
    weights: str | None = None  # a torchvision weight enum name, a local file, or null
    normalize: Literal["imagenet", "symmetric", "unit"] = "imagenet"  # symmetric: [-1, 1]
    width: Annotated[float, Field(gt=0, le=4)] = 1.0  # width multiplier, MobileNets only
    freeze: bool | None = False  # keep what was loaded as it is; null: where anything is loaded

    @property
    def frozen(self) -> bool:
        """Whether weights and batch-norm statistics stay as they were loaded."""
        return self.weights is not None if self.freeze is None else self.freeze


class TextModel(Frozen):
    encoder: str = "transformer"  # transformer, bag, or hf:<path or id>
    dim: Positive = 128  # width of transformer and bag
    layers: Positive = 2
    heads: Positive = 4
    freeze: bool = False

    @model_validator(mode="after")
    def _check(self) -> TextModel:
        if self.encoder not in ("transformer", "bag") and not self.encoder.startswith("hf:"):
            raise ValueError(
                f"encoder: got {self.encoder!r}; allowed: transformer, bag, hf:<path or id>"
            )
        if self.encoder == "transformer" and self.dim % self.heads:
            raise ValueError(f"dim: got {self.dim}; must be a multiple of heads ({self.heads})")
        return self


class Model(Frozen):
    modalities: Modalities = "both"
    image: ImageModel = ImageModel()
    text: TextModel = TextModel()
    fusion: Literal["concat", "gated"] = "concat"
    hidden: Positive = 256  # width of each projected modality and of the head
    dropout: Share = 0.1

    @property
    def uses_image(self) -> bool:
        return self.modalities != "text"

    @property
    def uses_text(self) -> bool:
        return self.modalities != "image"


# --- data and training ---------------------------------------------------------------------------


class Columns(Frozen):
    """What the archive calls things; null is guessed from what is there."""

    image: str | None = None
    caption: str | None = None


class Data(Frozen):
    archive: str  # directory or s3:// prefix
    label: str = "label"  # column (Parquet) or field (.json; "cls" for .cls members)
    split: str | None = "split"  # column or field naming each row's split, where there is one
    train: str = "train"  # its value for training rows
    dev: str = "dev"  # its value for held-out rows
    dev_fraction: Fraction = 0.1  # held out by seed where the archive names no split
    columns: Columns = Columns()


class Train(Frozen):
    num_workers: Annotated[int, Field(ge=1)] | None = None  # null: one a GPU, else min(CPUs, 2)
    use_gpu: bool | None = None  # null: when the cluster has GPUs
    epochs: Positive = 5
    batch_size: Positive = 64  # rows a step, over all workers together
    optimizer: Literal["adam", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    backbone_lr: Annotated[float, Field(gt=0)] | None = None  # pretrained encoders; null: lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Share = 0.1  # share of all steps with a rising learning rate
    schedule: Literal["constant", "cosine"] = "cosine"
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0  # global gradient norm
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    precision: Precision = "auto"  # auto: bf16 where the hardware computes it, else float32
    checkpoints: str | None = None  # null: beside the bundle, <out>.run; a shared place or s3://


class TrainConfig(Frozen):
    data: Data
    out: str  # where the bundle goes: directory or s3:// prefix
    seed: int = 0
    preprocess: Preprocess = Preprocess()
    model: Model = Model()
    train: Train = Train()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        workers = self.train.num_workers or 1
        if self.train.batch_size % workers:
            raise ValueError(
                f"train.batch_size: got {self.train.batch_size}; must be a multiple of "
                f"train.num_workers ({workers})"
            )
        return self


# --- loading -------------------------------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The training config in a YAML file, with ``key.sub=value`` overrides (values are YAML)."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return validate(TrainConfig, tree, str(path))


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: must look like key=value")
    *parents, last = key.split(".")
    for name in parents:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {name} holds a value, not further keys")
        tree = node
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        tree[last] = text


def validate(model: type[M], tree: Any, where: str) -> M:
    """``tree`` as a ``model``; raises ConfigError with every problem, one clause each."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        clauses = [_clause(model, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(clauses)) from None


def _clause(model: type[BaseModel], problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = ", ".join(_keys(model, path[:-1]))
        return f"{'.'.join(path)}: unknown key; allowed here: {known}"
    if problem["type"] == "missing":
        key = ".".join(path)
        return f"{key}: missing; give it in the file or with --set {key}=VALUE"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "value_error":
        return f"{'.'.join(path)}.{message}" if path else message
    return f"{'.'.join(path)}: got {problem['input']!r}; {message}"


def _keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    node: Any = model
    for name in path:
        node = node.model_fields[name].annotation
        if isinstance(node, types.UnionType):
            node = next(part for part in typing.get_args(node) if isinstance(part, type))
    return sorted(node.model_fields)
