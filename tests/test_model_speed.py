"""A user would get other scores than the model was measured with if a speed-up changed it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmray.config import ImageModel, Model, TextModel
from mmray.memory import keep_freed_memory
from mmray.model import build_model, make_spec
from mmray.model.speed import DepthwiseConv2d, fold_batch_norms, for_inference, for_training


def batch_norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(
    "encoder", ["small_cnn", "resnet18", "mobilenet_v3_small", "efficientnet_b0", "regnet_x_400mf"]
)
def test_folding_leaves_no_batch_norm_and_the_same_features(encoder: str) -> None:
    torch.manual_seed(0)
    cfg = Model(
        modalities="image", image=ImageModel(encoder=encoder), text=TextModel(encoder="bag")
    )
    spec = make_spec(cfg, num_classes=3, vocab_size=10, pad_id=0, max_tokens=8, image_size=64)
    model = build_model(spec).train()
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        model(pixels, None, None)  # running statistics that are not 0 and 1
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
        before, embedding = model.eval()(pixels, None, None)
        found = batch_norms(model)
        folded = for_inference(model)
        after, embedding_after = folded(pixels, None, None)
    assert found > 0 and batch_norms(model) == 0
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embedding_after, embedding, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", ["mobilenet_v3_small", "convnext_tiny", "swin_t", "vit_b_16"])
def test_weights_rounded_beforehand_give_what_autocast_gives_to_the_bit(encoder: str) -> None:
    torch.manual_seed(0)
    cfg = Model(image=ImageModel(encoder=encoder), text=TextModel(encoder="transformer", dim=32))
    spec = make_spec(cfg, num_classes=3, vocab_size=10, pad_id=0, max_tokens=8, image_size=64)
    model = build_model(spec)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens, mask = torch.randint(1, 10, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    scores = []
    for prepared in (for_inference(model), for_inference(model, bf16=True)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            scores.append(prepared(pixels, tokens, mask))
    assert any(p.dtype == torch.bfloat16 for p in model.parameters())
    for before, after in zip(*scores, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("encoder", ["mobilenet_v3_small", "convnext_tiny"])
def test_depthwise_convolutions_train_as_in_float32_and_score_as_before(encoder: str) -> None:
    cfg = Model(
        modalities="image", image=ImageModel(encoder=encoder), text=TextModel(encoder="bag")
    )
    spec = make_spec(cfg, num_classes=3, vocab_size=10, pad_id=0, max_tokens=8, image_size=64)
    torch.manual_seed(0)
    plain = build_model(spec)
    faster = for_training(copy.deepcopy(plain))
    assert faster.state_dict().keys() == plain.state_dict().keys()
    found = [module for module in faster.modules() if isinstance(module, DepthwiseConv2d)]
    assert found
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)

    def run(model: nn.Module, *, bf16: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)  # of dropout and stochastic depth
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(pixels, None, None)[0]
        logits.float().logsumexp(1).sum().backward()
        return logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)

    in_float32 = run(plain, bf16=False)
    for expected, got in zip(in_float32, run(faster, bf16=False), strict=True):
        assert torch.equal(expected, got)
    kinds: list[torch.dtype] = []
    found[0].register_forward_hook(lambda _, x, y: kinds.extend((x[0].dtype, y.dtype)))
    flat = [torch.cat([t.flatten() for t in ts]) for ts in (in_float32, run(faster, bf16=True))]
    assert nn.functional.cosine_similarity(*flat, dim=0) > 0.95
    assert kinds[0] == kinds[1]  # of what comes after it
    faster.load_state_dict(plain.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, after = (model.eval()(pixels, None, None)[0] for model in (plain, faster))
    assert torch.equal(before, after)


def test_a_convolution_that_others_read_too_keeps_its_batch_norm() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    net = Forked().eval()
    assert fold_batch_norms(net) == 0 and batch_norms(net) == 1


def test_what_cannot_be_traced_is_left_alone() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)) if x.mean() > 0 else x

    net = Branching().eval()
    assert fold_batch_norms(net) == 0 and batch_norms(net) == 1


def test_keeping_memory_can_be_asked_for_anywhere() -> None:
    keep_freed_memory()
    assert torch.ones(1 << 24).sum() == 1 << 24
