"""Models: encoders, fusions and heads as plain torch modules; shapes are in the docstrings."""

from mmray.model.features import Encoder, Features
from mmray.model.fusion import Fusion
from mmray.model.fusion_model import FUSIONS, FusionModel, build_model, load_pretrained
from mmray.model.spec import ModelSpec, check, make_spec

__all__ = [
    "FUSIONS",
    "Encoder",
    "Features",
    "Fusion",
    "FusionModel",
    "ModelSpec",
    "build_model",
    "check",
    "load_pretrained",
    "make_spec",
]
