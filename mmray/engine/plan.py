"""What can be known of a training run before any resource is asked for. No Ray here.

Raised is ConfigError, naming the key, what it got and what is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmray import storage
from mmray.archive.shards import Shard, check_columns
from mmray.config import TrainConfig
from mmray.engine import rundir
from mmray.engine.scan import check_field, field_names, peek
from mmray.errors import ConfigError, NotFound
from mmray.preprocess import TextTokenizer, load_tokenizer
from mmray.report.journal import check_mlflow

if TYPE_CHECKING:
    from mmray.model import ModelSpec

HF = "hf:"


@dataclass(frozen=True, slots=True)
class Plan:
    """A training run that can be started. ``cfg`` has absolute paths; ``place`` is where the run
    keeps its state; ``fields`` are the names that the archive has; ``tokenizer`` is None where the
    model reads no text, or one has to be trained."""

    cfg: TrainConfig
    shards: tuple[Shard, ...]
    place: str
    resumed: bool
    fields: tuple[str, ...]
    tokenizer: TextTokenizer | None

    @property
    def archive(self) -> str:
        return self.cfg.data.archive


def absolute(cfg: TrainConfig) -> TrainConfig:
    """``cfg`` with the paths that workers use named so that every process understands them."""
    data = cfg.data.model_copy(update={"archive": storage.absolute(cfg.data.archive)})
    kept = cfg.train.checkpoints and storage.absolute(cfg.train.checkpoints)
    train = cfg.train.model_copy(update={"checkpoints": kept})
    return cfg.model_copy(update={"data": data, "train": train, "out": storage.absolute(cfg.out)})


def make_plan(cfg: TrainConfig, shards: Sequence[Shard]) -> Plan:
    """Check everything about ``cfg`` (absolute) that a look at the archive's first rows allows:
    columns, label, tokenizer, encoders, and that the model can be built and its weights fit."""
    from mmray.model import check

    place = rundir.place_of(cfg)
    resumed = rundir.open_run(place, cfg, shards)
    _check_augment(cfg)
    check_mlflow(cfg)
    check(cfg.model, image_size=cfg.preprocess.image.size)
    check_columns(
        cfg.data.archive,
        shards[0],
        cfg.data.columns,
        image=cfg.model.uses_image,
        caption=cfg.model.uses_text,
    )
    samples = peek(cfg.data.archive, shards, cfg.data.columns)
    if cfg.task != "match":
        check_field(samples, cfg.data.label, "data.label")
    if cfg.data.negatives_within is not None:
        check_field(samples, cfg.data.negatives_within, "data.negatives_within")
    if cfg.data.group is not None:
        check_field(samples, cfg.data.group, "data.group")
    tokenizer = _given_tokenizer(cfg) if cfg.model.uses_text else None
    initial_weights(cfg, spec_of(cfg, 2, tokenizer))
    if tokenizer is None and cfg.model.uses_text and resumed:
        tokenizer = _kept_tokenizer(cfg, place)
    names = tuple(field_names(samples))
    return Plan(cfg, tuple(shards), place, resumed, names, tokenizer)


def _check_augment(cfg: TrainConfig) -> None:
    """Raise ConfigError when pictures would change whose features are computed once."""
    from mmray.model import FUSIONS

    pooled = cfg.model.modalities == "image" or FUSIONS[cfg.model.fusion].pooled_only
    if cfg.train.augment.changes and cfg.model.image.frozen and pooled:
        raise ConfigError(
            "train.augment: changes pictures at every step, but features of a frozen image encoder "
            "are computed once, from the pictures as they are; set model.image.freeze to false, or "
            "leave train.augment out"
        )


def _given_tokenizer(cfg: TrainConfig) -> TextTokenizer | None:
    """The tokenizer that the config names, or the one of its ``hf:`` encoder."""
    path, key = cfg.preprocess.text.tokenizer, "preprocess.text.tokenizer"
    if path is None and cfg.model.text.encoder.startswith(HF):
        path, key = _hf_file(cfg.model.text.encoder.removeprefix(HF)), "model.text.encoder"
    if path is None:
        return None
    try:
        return load_tokenizer(path, cfg.preprocess.text)
    except (NotFound, ConfigError) as error:
        raise ConfigError(f"{key}: {error}") from None


def _hf_file(name: str) -> str:
    """Where the tokenizer.json of a local folder or a hub id is."""
    if os.path.isdir(name):
        return name
    from transformers.utils.hub import cached_file

    try:
        return str(cached_file(name, "tokenizer.json"))
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"model.text.encoder: no tokenizer.json of {name}: {what}") from None


def _kept_tokenizer(cfg: TrainConfig, place: str) -> TextTokenizer | None:
    """The tokenizer that this run trained before, if it came that far."""
    try:
        kept = storage.read_bytes(storage.join(place, rundir.TOKENIZER))
    except NotFound:
        return None
    return TextTokenizer.from_json(kept.decode(), cfg.preprocess.text)


def spec_of(cfg: TrainConfig, classes: int, tokenizer: TextTokenizer | None) -> ModelSpec:
    """The model of ``cfg``; without a tokenizer, as if one of ``vocab_size`` were trained."""
    from mmray.model import make_spec

    text = cfg.preprocess.text
    return make_spec(
        cfg.model,
        num_classes=classes,
        vocab_size=tokenizer.vocab_size if tokenizer else text.vocab_size,
        pad_id=tokenizer.pad_id if tokenizer else 0,
        max_tokens=text.max_tokens,
        image_size=cfg.preprocess.image.size,
    )


def initial_weights(cfg: TrainConfig, spec: ModelSpec) -> bytes:
    """What training starts from, as safetensors: seeded, with the pretrained parts loaded. Made on
    the driver, so that workers on other machines need not see the files."""
    import torch

    from mmray.engine.checkpoint import pack_weights
    from mmray.model import build_model, load_pretrained

    torch.manual_seed(cfg.seed)
    model = build_model(spec)
    load_pretrained(model, cfg.model)
    return pack_weights(model)
