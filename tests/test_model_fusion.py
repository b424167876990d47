"""Without these a fusion model could ignore a modality, or a frozen encoder drift, unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmray.config import ImageModel, Model, TextModel
from mmray.errors import ConfigError
from mmray.model import FUSIONS, FusionModel, ModelSpec, build_model, load_pretrained, make_spec

VOCAB, SIZE, CLASSES = 30, 64, 3  # 64 pixels: four patches


def spec_of(**fields: Any) -> ModelSpec:
    cfg = Model(**({"hidden": 16, "text": TextModel(dim=16, heads=2)} | fields))
    return make_spec(
        cfg, num_classes=CLASSES, vocab_size=VOCAB, pad_id=0, max_tokens=8, image_size=SIZE
    )


def inputs(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (rows, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, VOCAB, (rows, 8), generator=generator)
    mask = torch.arange(8) < torch.randint(1, 9, (rows, 1), generator=generator)
    return pixels, tokens, mask


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("encoder", ["bag", "gru", "transformer"])
def test_a_gradient_reaches_every_weight_of_both_encoders(fusion: str, encoder: str) -> None:
    model = build_model(spec_of(fusion=fusion, text=TextModel(encoder=encoder, dim=16, heads=2)))
    logits, embedding = model.train()(*inputs())
    assert logits.shape == (4, CLASSES) and logits.dtype == torch.float32
    assert embedding.shape == (4, 16) and embedding.dtype == torch.float32
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_score_depends_on_picture_and_caption(fusion: str) -> None:
    model = build_model(spec_of(fusion=fusion)).eval()
    pixels, tokens, mask = inputs()
    logits, _ = model(pixels, tokens, mask)
    assert not torch.allclose(logits, model(255 - pixels, tokens, mask)[0])
    assert not torch.allclose(logits, model(pixels, (tokens + 5) % VOCAB, mask)[0])


def test_the_gate_mixes_the_two_modalities() -> None:
    model = build_model(spec_of(fusion="gated")).eval()
    gate = model.fusion.get_submodule("gate")
    assert isinstance(gate, nn.Linear)
    pixels, tokens, mask = inputs()
    for bias, other in ((50.0, (pixels, (tokens + 5) % VOCAB)), (-50.0, (255 - pixels, tokens))):
        with torch.no_grad():
            gate.weight.zero_()
            gate.bias.fill_(bias)
        logits, embedding = model(pixels, tokens, mask)
        torch.testing.assert_close(model(*other, mask)[0], logits)
        assert embedding.abs().max() <= 1


@pytest.mark.parametrize("modalities", ["image", "text"])
def test_one_modality_builds_no_other_branch(modalities: Any) -> None:
    model = build_model(spec_of(modalities=modalities)).eval()
    pixels, tokens, mask = inputs()
    alone = (pixels, None, None) if modalities == "image" else (None, tokens, mask)
    logits, embedding = model(*alone)
    assert logits.shape == (4, CLASSES) and embedding.shape == (4, 16)
    unused = "text." if modalities == "image" else "image."
    assert not [name for name in model.state_dict() if name.startswith(unused)]
    assert len(model.encoders()) == 1


def test_the_embedding_is_what_the_head_is_given() -> None:
    model = build_model(spec_of()).eval()
    logits, embedding = model(*inputs())
    torch.testing.assert_close(model.head(embedding), logits)


def test_logits_are_no_coarser_than_float32_in_bfloat16() -> None:
    """Rows would tie, and the first label win."""
    model = build_model(spec_of()).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(*inputs())
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_the_same_seed_gives_the_same_model() -> None:
    def built(seed: int) -> FusionModel:
        torch.manual_seed(seed)
        return build_model(spec_of())

    first, second, other = built(5).state_dict(), built(5).state_dict(), built(6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("image", ["small_cnn", "mobilenet_v2"])
def test_spec_and_weights_give_the_same_scores_elsewhere(image: str, tmp_path: Path) -> None:
    trained = build_model(spec_of(image=ImageModel(encoder=image))).train()
    trained(*inputs())  # batch norm statistics are no longer their initial values
    state = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    spec = ModelSpec.model_validate_json(trained.spec.model_dump_json())
    assert spec == trained.spec
    again = build_model(spec).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    for a, b in zip(again(*inputs()), trained.eval()(*inputs()), strict=True):
        assert torch.equal(a, b)


def pretrained(tmp_path: Path, *, freeze: bool) -> FusionModel:
    """A model whose MobileNetV2 weights came from a file."""
    from torchvision import models

    torch.manual_seed(2)
    state = models.mobilenet_v2(width_mult=0.35).features.state_dict()
    save_file(state, tmp_path / "features.safetensors")
    cfg = ImageModel(
        encoder="mobilenet_v2",
        width=0.35,
        weights=str(tmp_path / "features.safetensors"),
        freeze=freeze,
    )
    model = build_model(spec_of(image=cfg))
    load_pretrained(model, model.spec.config)
    return model


def image_state(model: FusionModel) -> dict[str, Tensor]:
    assert model.image is not None
    return {name: value.clone() for name, value in model.image.state_dict().items()}


@pytest.mark.parametrize("freeze", [True, False])
def test_pretrained_weights_keep_their_batch_norm_statistics(tmp_path: Path, freeze: bool) -> None:
    model = pretrained(tmp_path, freeze=freeze).train()
    before = image_state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        logits, _ = model(*inputs())
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    after = image_state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if "running_" in name or "num_batches" in name]
    assert bool(changed) == (not freeze)
    assert model.head.training  # only the encoder stays in evaluation mode


def test_a_frozen_encoder_is_the_same_in_training_and_evaluation(tmp_path: Path) -> None:
    model = pretrained(tmp_path, freeze=True)
    assert model.image is not None
    pixels, _, _ = inputs()
    pooled = model.train().image(pixels).pooled
    assert not pooled.requires_grad
    assert torch.equal(pooled, model.eval().image(pixels).pooled)
    assert not any(p.requires_grad for p in model.image.parameters())


def test_from_scratch_batch_norm_learns_its_statistics() -> None:
    model = build_model(spec_of()).train()
    before = image_state(model)
    model(*inputs())
    after = image_state(model)
    assert all(not torch.equal(before[k], after[k]) for k in before if "running_" in k)


def test_a_spec_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model: num_classes: got 1"):
        make_spec(Model(), num_classes=1, vocab_size=9, pad_id=0, max_tokens=8, image_size=SIZE)
    with pytest.raises(ConfigError, match="vocab_size: missing"):
        make_spec(Model(), num_classes=2, vocab_size=None, pad_id=0, max_tokens=8, image_size=SIZE)
