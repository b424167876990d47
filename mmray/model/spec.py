"""ModelSpec: everything needed to rebuild a model's modules without its files or a hub."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from mmray.config import Frozen, Model, validate
from mmray.model import image, text


class ModelSpec(Frozen):
    """What a bundle keeps about a model, beside its weights."""

    config: Model
    num_classes: Annotated[int, Field(ge=2)]
    vocab_size: Annotated[int, Field(ge=1)] | None  # null without a text encoder
    pad_id: Annotated[int, Field(ge=0)] = 0
    max_tokens: Annotated[int, Field(ge=1)] = 64
    image_size: Annotated[int, Field(ge=1)] = 224  # pixels, both sides
    hf_config: dict[str, Any] | None = None  # of an hf: text encoder

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if self.config.uses_text:
            if self.vocab_size is None:
                raise ValueError("vocab_size: missing, and the model has a text encoder")
            if self.config.text.encoder.startswith("hf:") and self.hf_config is None:
                raise ValueError("hf_config: missing, and the text encoder is an hf: one")
        return self


def check(cfg: Model, *, image_size: int) -> None:
    """Raise ConfigError for whatever is wrong with ``cfg`` itself, before any data are read."""
    if cfg.uses_image:
        image.check(cfg.image, image_size)
    if cfg.uses_text:
        text.check(cfg.text)


def make_spec(
    cfg: Model,
    *,
    num_classes: int,
    vocab_size: int | None,
    pad_id: int,
    max_tokens: int,
    image_size: int,
) -> ModelSpec:
    """The spec of a new model; reads the configuration of an ``hf:`` text encoder.

    Raises ConfigError when ``cfg`` cannot be built.
    """
    check(cfg, image_size=image_size)
    hf_config = None
    if cfg.uses_text and cfg.text.encoder.startswith("hf:"):
        hf_config = text.read_hf_config(
            cfg.text.encoder, vocab_size=vocab_size, max_tokens=max_tokens
        )
    fields = {
        "config": cfg,
        "num_classes": num_classes,
        "vocab_size": vocab_size if cfg.uses_text else None,
        "pad_id": pad_id,
        "max_tokens": max_tokens,
        "image_size": image_size,
        "hf_config": hf_config,
    }
    return validate(ModelSpec, fields, "model")
