"""Without these a caption would score differently beside a longer one, or a fusion that claims to
match words with places in the picture would only compare two averages."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from mmray.config import Model
from mmray.model import FUSIONS, Features, Fusion
from mmray.model.cross_attention import CrossAttention
from mmray.model.features import masked_mean

B, P, L, IMAGE, TEXT, WIDTH = 5, 6, 7, 12, 10, 64
LENGTHS = torch.tensor([1, 3, 7, 4, 0])  # of captions; the last row has no token at all
LOCAL = [name for name, fusion in FUSIONS.items() if not fusion.pooled_only]


def built(name: str) -> Fusion:
    torch.manual_seed(4)
    return FUSIONS[name](IMAGE, TEXT, WIDTH, 0.1).eval()


def features(seed: int = 0) -> tuple[Features, Features]:
    """What encoders give: pooled is the mean of the real tokens."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(B, P, IMAGE, generator=generator)
    tokens = torch.randn(B, L, TEXT, generator=generator)
    mask = torch.arange(L) < LENGTHS[:, None]
    return Features(patches.mean(1), patches), Features(masked_mean(tokens, mask), tokens, mask)


def test_the_config_names_every_fusion() -> None:
    assert get_args(Model.model_fields["fusion"].annotation) == tuple(FUSIONS)


@pytest.mark.parametrize("name", FUSIONS)
def test_one_finite_vector_a_row(name: str) -> None:
    fused = built(name)(*features())
    assert fused.shape == (B, WIDTH)
    assert torch.isfinite(fused).all()


@pytest.mark.parametrize("name", FUSIONS)
def test_what_stands_under_padding_changes_nothing(name: str) -> None:
    image, text = features()
    assert text.mask is not None
    fused = built(name)(image, text)
    junk = torch.where(text.mask.unsqueeze(-1), text.tokens, 1e3 * text.tokens.flip(0))
    assert torch.equal(built(name)(image, replace(text, tokens=junk)), fused)
    order = torch.cat([torch.arange(3), torch.tensor([6, 4, 5, 3])])  # of row 1, from its fourth on
    shuffled = junk.clone()
    shuffled[1] = junk[1, order]
    assert torch.equal(built(name)(image, replace(text, tokens=shuffled)), fused)


@pytest.mark.parametrize("name", FUSIONS)
def test_longer_padding_changes_nothing(name: str) -> None:
    image, text = features()
    assert text.mask is not None
    fused = built(name)(image, text)
    for row in range(B):
        for length in {max(1, int(LENGTHS[row])), L, L + 9}:
            tokens = torch.full((1, length, TEXT), 7.0)
            mask = torch.zeros(1, length, dtype=torch.bool)
            real = int(LENGTHS[row])
            tokens[0, :real], mask[0, :real] = text.tokens[row, :real], True
            alone = built(name)(
                Features(image.pooled[row : row + 1], image.tokens[row : row + 1]),
                Features(text.pooled[row : row + 1], tokens, mask),
            )
            torch.testing.assert_close(alone[0], fused[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOCAL)
def test_masked_patches_are_not_seen(name: str) -> None:
    image, text = features()
    there = torch.arange(P) < torch.tensor([6, 2, 3, 1, 6])[:, None]
    junk = torch.where(there.unsqueeze(-1), image.tokens, -50 * image.tokens)
    masked = [built(name)(replace(image, tokens=t, mask=there), text) for t in (image.tokens, junk)]
    assert torch.equal(*masked)
    short = replace(image, tokens=image.tokens[1:2, :2], pooled=image.pooled[1:2])
    alone = built(name)(short, Features(text.pooled[1:2], text.tokens[1:2], text.mask[1:2]))  # type: ignore[index]
    torch.testing.assert_close(alone[0], masked[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUSIONS)
def test_gradients_reach_both_sides_and_only_what_is_real(name: str) -> None:
    image, text = features()
    assert text.mask is not None
    patches, tokens = image.tokens.requires_grad_(), text.tokens.requires_grad_()
    pooled = masked_mean(tokens, text.mask)
    built(name)(Features(patches.mean(1), patches), Features(pooled, tokens, text.mask)).pow(
        2
    ).sum().backward()
    assert patches.grad is not None and tokens.grad is not None
    assert (patches.grad.abs().sum((1, 2)) > 0).all()
    assert torch.equal(tokens.grad.abs().sum(2) > 0, text.mask)


@pytest.mark.parametrize("name", FUSIONS)
def test_bf16_is_nearly_the_same(name: str) -> None:
    fused = built(name)(*features())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = built(name)(*features()).float()
    torch.testing.assert_close(rough, fused, rtol=0.05, atol=0.1)


def test_cross_attention_looks_at_tokens_and_patches_and_at_no_average() -> None:
    fusion = built("cross_attention")
    assert isinstance(fusion, CrossAttention) and not fusion.pooled_only
    image, text = features()
    fused = fusion(image, text)
    other = features(seed=1)
    elsewhere = replace(image, pooled=other[0].pooled), replace(text, pooled=other[1].pooled)
    assert torch.equal(fusion(*elsewhere), fused)
    # One patch moves every real token of its own row, and nothing of another.
    layer = fusion.layers[0]
    moved = image.tokens.clone()
    moved[2, 0] += 1
    sides = [fusion.image(tokens) for tokens in (image.tokens, moved)]
    entered = fusion.text(text.tokens)
    read = [layer(side, None, entered, None)[1] for side in sides]
    changed = (read[0] - read[1]).abs().sum(2) > 0
    assert changed[2].all() and not changed[[0, 1, 3, 4]].any()


def named_places(rows: int, seed: int) -> tuple[Features, Features, Tensor]:
    """Four patches, each with a place and a colour, and one word that names a place: the label is
    the colour there. No average of the patches tells."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 2, (rows, 4), generator=generator)
    asked = torch.randint(0, 4, (rows,), generator=generator)
    patches = torch.zeros(rows, 4, IMAGE)
    patches[:, :, :4] = torch.eye(4)
    patches[:, :, 4] = 2.0 * colours - 1
    tokens = torch.zeros(rows, 2, TEXT)
    tokens[torch.arange(rows), 0, asked] = 1
    mask = torch.tensor([True, False]).expand(rows, 2)
    labels = colours[torch.arange(rows), asked]
    return Features(patches.mean(1), patches), Features(tokens[:, 0], tokens, mask), labels


@pytest.mark.parametrize("name", ["concat", *LOCAL])
def test_only_who_sees_patches_learns_what_is_where(name: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"fusion": FUSIONS[name](IMAGE, TEXT, WIDTH, 0.0)})
    model["head"] = nn.Linear(WIDTH, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        image, text, labels = named_places(128, seed=step)
        loss = nn.functional.cross_entropy(model["head"](model["fusion"](image, text)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, text, labels = named_places(400, seed=10_000)
    right = model["head"](model["fusion"](image, text)).argmax(1) == labels
    assert (float(right.float().mean()) > 0.95) == (name in LOCAL)
