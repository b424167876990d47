"""Configuration: YAML onto typed, frozen models, checked before any resource is asked for.

``load(path, ["model.fusion=gated"])`` gives a ``TrainConfig``; a wrong key, type or value raises
ConfigError naming the key, what it got and what is allowed.
"""

from __future__ import annotations

import operator
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mmray.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Lr = Annotated[float, Field(gt=0)]  # learning rate, at its highest
# ``exclude_if``: a key that came after the first bundles. It is written only where it says
# something, so that their fingerprints, and what is known of their runs, stay as they are.
OwnLr = Annotated[Lr | None, Field(exclude_if=operator.not_)]
#: The least and the greatest value, 0 or other; float32 holds both.
Range = tuple[Annotated[float, Field(ge=-1e30, le=0)], Annotated[float, Field(ge=0, le=1e30)]]
Modalities = Literal["both", "image", "text"]
Precision = Literal["auto", "bf16", "float32"]

#: classify: one label a row. multilabel: any number of them. match: does the caption belong to the
#: picture; its labels are made, not read.
Task = Literal["classify", "multilabel", "match"]


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
    lr: OwnLr = None  # null: train.backbone_lr where weights are loaded, else train.lr

    @property
    def frozen(self) -> bool:
        """Whether weights and batch-norm statistics stay as they were loaded."""
        return self.weights is not None if self.freeze is None else self.freeze


class TextModel(Frozen):
    encoder: str = "transformer"  # transformer, gru, bag, or hf:<path or id>
    dim: Positive = 128  # width of transformer, gru and bag
    layers: Positive = 2  # of transformer and gru
    heads: Positive = 4  # of the transformer
    freeze: bool = False
    lr: OwnLr = None  # null: train.backbone_lr for hf:, else train.lr

    @model_validator(mode="after")
    def _check(self) -> TextModel:
        scratch = ("transformer", "gru", "bag")
        if self.encoder not in scratch and not self.encoder.startswith("hf:"):
            allowed = ", ".join(scratch)
            raise ValueError(f"encoder: got {self.encoder!r}; allowed: {allowed}, hf:<path or id>")
        if self.encoder == "gru" and self.dim % 2:
            raise ValueError(f"dim: got {self.dim}; a gru needs an even one, half a direction")
        if self.encoder == "transformer" and self.dim % self.heads:
            raise ValueError(f"dim: got {self.dim}; must be a multiple of heads ({self.heads})")
        return self


class Model(Frozen):
    modalities: Modalities = "both"
    image: ImageModel = ImageModel()
    text: TextModel = TextModel()
    fusion: Literal["concat", "gated", "film", "bilinear", "cross_attention"] = "concat"
    hidden: Positive = 256  # width of each projected modality and of the head
    dropout: Share = 0.1
    # a pair may lack its picture or its caption, and a learned vector stands in
    missing: Annotated[bool, Field(exclude_if=operator.not_)] = False

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.missing and self.modalities != "both":
            raise ValueError(
                f"missing: got true with modalities {self.modalities!r}; a model of one modality "
                "needs that one: leave it false"
            )
        return self

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
    label_separator: Annotated[str, Field(min_length=1)] = "|"  # multilabel: between labels in text
    negatives_within: str | None = None  # match: column; negatives share its value with their row
    split: str | None = "split"  # column or field naming each row's split, where there is one
    train: str = "train"  # its value for training rows
    dev: str = "dev"  # its value for held-out rows
    dev_fraction: Fraction = 0.1  # held out by seed where the archive names no split
    columns: Columns = Columns()
    group: str | None = (
        None  # column or field whose equal values stay on one side: a source, a user
    )
    # Identical and near-identical pictures and equal captions: kept on one side (where the archive
    # names the split, by leaving out training rows that a held-out row repeats), or only reported.
    duplicates: Literal["one_side", "report"] = "one_side"
    near: Annotated[int, Field(ge=0, le=32)] = 16  # of a picture hash's 256 bits; 0: identical only


class WorkerRange(Frozen):
    """From ``min`` to ``max`` workers, as many as the cluster has room for; a plain number is
    both."""

    min: Positive = 1
    max: Positive

    @model_validator(mode="after")
    def _check(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min: got {self.min}; must not be more than max ({self.max})")
        return self


def _range(value: Any) -> Any:
    plain = isinstance(value, int) and not isinstance(value, bool)
    return {"min": value, "max": value} if plain else value


class Augment(Frozen):
    """Changes of training pictures, drawn anew for every row of every step."""

    crop: Annotated[float, Field(gt=0, le=1)] = 1.0  # smallest share of the area that is kept
    flip: bool = False  # left and right, every other time
    colour: Share = 0.0  # brightness, contrast, saturation: each times 1 - colour to 1 + colour

    @property
    def changes(self) -> bool:
        return self != Augment()


class Train(Frozen):
    # an int, or {min, max}: grows and shrinks with the cluster; null: one a GPU, else min(CPUs, 2)
    num_workers: Annotated[WorkerRange | None, BeforeValidator(_range)] = None
    use_gpu: bool | None = None  # null: when the cluster has GPUs
    epochs: Positive = 5
    batch_size: Positive = 64  # rows a step, over all workers together
    accumulate: Positive = 1  # parts in which a worker takes its rows of a step, to save memory
    optimizer: Literal["adam", "adamw"] = "adamw"
    lr: Lr = 1e-3
    backbone_lr: Lr | None = None  # pretrained encoders; null: lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Share = 0.1  # share of all steps with a rising learning rate
    schedule: Literal["constant", "cosine"] = "cosine"
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0  # global gradient norm
    label_smoothing: Share = 0.0
    focal_gamma: Annotated[float, Field(ge=0)] = 0.0  # 0: plain; 2: sure rows hardly count
    class_weights: Literal["none", "balanced"] = "none"
    # share of the pairs from which, in training, picture or caption is taken: see model.missing
    modality_dropout: Annotated[Share, Field(exclude_if=operator.not_)] = 0.0
    window_rows: Annotated[Positive | None, Field(exclude_if=operator.not_)] = (
        None  # decoded at a time and shuffled together; null: what fits
    )
    augment: Augment = Augment()
    average: Literal["none", "ema", "soup"] = "none"  # of weights: see averaging.py
    ema_decay: Fraction = 0.999  # of average: ema; rises to it over the first steps
    patience: Positive | None = None  # end after so many epochs without a better dev metric
    negatives: Literal["batch", "corpus"] = "corpus"  # match: where other captions come from
    #: Here and where the bundle scores; auto: bf16 where hardware is faster at it, else float32.
    precision: Precision = "auto"
    checkpoints: str | None = None  # null: beside the bundle, <out>.run; a shared place or s3://
    tensorboard: bool = True  # event files in <out>.run/logs
    mlflow: str | None = None  # tracking URI; needs the package mlflow


class TrainConfig(Frozen):
    task: Task = "classify"
    data: Data
    out: str  # where the bundle goes: directory or s3:// prefix
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    preprocess: Preprocess = Preprocess()
    model: Model = Model()
    train: Train = Train()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        train = self.train
        if train.num_workers and train.batch_size < train.num_workers.max:
            raise ValueError(
                f"train.batch_size: got {train.batch_size}; must be at least train.num_workers "
                f"({train.num_workers.max}), for each to have a row"
            )
        if train.augment.changes and not self.model.uses_image:
            raise ValueError(
                "train.augment: changes pictures, and model.modalities is text; leave it out"
            )
        if self.train.modality_dropout and not self.model.missing:
            raise ValueError(
                f"train.modality_dropout: got {self.train.modality_dropout} with model.missing "
                "false; only a model in which either modality may be missing can do without it"
            )
        if self.task == "match":
            self._check_match()
        elif self.data.negatives_within is not None:
            raise ValueError(f"data.negatives_within: only for task match, got task {self.task}")
        return self

    def _check_match(self) -> None:
        if self.model.modalities != "both":
            raise ValueError(
                f"model.modalities: got {self.model.modalities}; task match needs both"
            )
        if self.model.missing:
            raise ValueError("model.missing: got true; task match needs both picture and caption")
        if self.train.class_weights != "none":
            raise ValueError(
                f"train.class_weights: got {self.train.class_weights}; task match draws as many "
                "negatives as positives; allowed: none"
            )


# --- loading -------------------------------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The training config in a YAML file, with ``key.sub=value`` overrides (values are YAML)."""
    return read(TrainConfig, path, overrides)


def read(model: type[M], path: str | Path | None, overrides: Sequence[str]) -> M:
    """A ``model`` from a YAML file, if any, with ``key.sub=value`` overrides (values are YAML)."""
    tree = {} if path is None else _tree(path)
    for override in overrides:
        _override(tree, override)
    return validate(model, tree, "--set" if path is None else str(path))


def _tree(path: str | Path) -> dict[str, Any]:
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
    return tree


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


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level: ``{"train.lr": 1e-3}``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


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
