"""Without these a user would train another model than the config says, or be told wrong numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmray import config, learn
from mmray.config import ImageModel, Model, TextModel, Train
from mmray.counts import AnswerCounts
from mmray.model import FUSIONS, FusionModel, build_model, make_spec
from mmray.objective import Objective
from mmray.preprocess import Prepared

SIZE, WORDS = 16, 12
LABELS = ["same", "different"]
ROOT = Path(__file__).resolve().parents[1]


def small_model(seed: int = 0, **fields: Any) -> FusionModel:
    torch.manual_seed(seed)
    cfg = Model(**({"hidden": 32, "text": TextModel(encoder="bag", dim=32)} | fields))
    return build_model(
        make_spec(cfg, num_classes=2, vocab_size=WORDS, pad_id=0, max_tokens=8, image_size=SIZE)
    )


def toy(rows: int, seed: int) -> tuple[list[Prepared], list[int]]:
    """Pairs whose label is picture colour XOR word: neither alone says anything about it."""
    rng = np.random.default_rng(seed)
    colours, words = rng.integers(0, 2, (2, rows))
    prepared = []
    for colour, word in zip(colours, words, strict=True):
        pixels = rng.integers(0, 120, (3, SIZE, SIZE)).astype(np.uint8)
        pixels[0 if colour else 2] += 100  # reddish or bluish
        tokens = rng.integers(4, WORDS, rng.integers(1, 6)).astype(np.int32)
        tokens[rng.integers(0, len(tokens))] = 2 + word
        prepared.append(Prepared(pixels, tokens))
    return prepared, (colours ^ words).tolist()


def batches(
    prepared: Sequence[Prepared], labels: Sequence[int], size: int
) -> Iterator[learn.Batch]:
    for start in range(0, len(prepared), size):
        yield learn.collate(prepared[start : start + size], labels[start : start + size])


def fit(model: FusionModel, cfg: Train, rows: int = 512, epochs: int = 8) -> list[float]:
    prepared, labels = toy(rows, seed=1)
    optimizer = learn.make_optimizer(model, cfg)
    total, step, losses = epochs * (rows // 32), 0, []
    model.train()
    for _ in range(epochs):
        for batch in batches(prepared, labels, 32):
            result = learn.train_step(model, batch, optimizer, learn.lr_at(step, total, cfg), cfg)
            losses.append(float(result.loss))
            step += 1
    return losses


def measured(model: Any, found: Iterable[learn.Batch]) -> learn.Evaluation:
    return learn.evaluate_batches(model, found, AnswerCounts(LABELS))


FAST = Train(lr=3e-3, precision="float32")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusion_learns_what_needs_both_picture_and_caption(fusion: Any) -> None:
    model = small_model(fusion=fusion)
    fit(model, FAST)
    held_out = measured(model, batches(*toy(301, seed=2), size=64))
    assert held_out.counts.rows == 301
    assert held_out.counts.report()["accuracy"] > 0.95
    assert model.training


@pytest.mark.parametrize("modalities", ["image", "text"])
def test_one_modality_cannot_learn_it(modalities: Any) -> None:
    model = small_model(modalities=modalities)
    fit(model, FAST, epochs=3)
    held_out = measured(model, batches(*toy(301, seed=2), size=64))
    assert held_out.counts.report()["accuracy"] < 0.65


def test_training_repeats_itself_with_the_same_seed() -> None:
    assert fit(small_model(3), FAST, 96, 2) == fit(small_model(3), FAST, 96, 2)
    assert fit(small_model(3), FAST, 96, 2) != fit(small_model(4), FAST, 96, 2)


def test_collate_pads_tokens_to_the_longest_and_nothing_else() -> None:
    prepared, labels = toy(9, seed=0)
    batch = learn.collate(prepared, labels)
    assert batch.pixels is not None and batch.tokens is not None and batch.mask is not None
    assert batch.labels is not None and batch.labels.tolist() == labels
    lengths = [len(row.tokens) for row in prepared if row.tokens is not None]
    assert batch.tokens.shape == (9, max(lengths)) and batch.tokens.dtype == torch.int64
    assert batch.mask.sum(1).tolist() == lengths
    assert batch.pixels.dtype == torch.uint8
    for i, row in enumerate(prepared):
        assert row.pixels is not None and row.tokens is not None
        assert np.array_equal(batch.pixels[i].numpy(), row.pixels)
        assert batch.tokens[i, : lengths[i]].tolist() == row.tokens.tolist()
        assert not batch.mask[i, lengths[i] :].any()
    assert len(batch) == 9
    alone = learn.collate([Prepared(row.pixels, None) for row in prepared])
    assert alone.tokens is None and alone.mask is None and alone.labels is None
    assert len(alone) == 9


def test_evaluation_counts_every_row_once_whatever_the_batches() -> None:
    model = small_model().eval()
    prepared, labels = toy(50, seed=5)
    whole = measured(model, batches(prepared, labels, 50))
    small = measured(model, batches(prepared, labels, 7))
    assert whole.counts.rows == small.counts.rows == 50
    assert np.array_equal(whole.counts.decisions.matrix, small.counts.decisions.matrix)
    assert whole.loss == pytest.approx(small.loss, rel=1e-4)
    batch = learn.collate(prepared, labels)
    with torch.inference_mode():
        logits, _ = model(batch.pixels, batch.tokens, batch.mask)
    assert batch.labels is not None
    want = torch.nn.functional.cross_entropy(logits, batch.labels)
    assert whole.loss == pytest.approx(float(want), rel=1e-4)
    assert not model.training
    nothing = measured(model, [])
    assert nothing.counts.rows == 0 and nothing.loss == 0.0


def test_a_step_reports_mean_loss_and_correct_rows_before_it_moved() -> None:
    model = small_model(dropout=0.0, image=ImageModel()).train()
    batch = learn.collate(*toy(20, seed=6))
    assert batch.labels is not None
    optimizer = learn.make_optimizer(model, FAST)
    twin = small_model(dropout=0.0, image=ImageModel()).train()
    with torch.no_grad():
        logits, _ = twin(batch.pixels, batch.tokens, batch.mask)
    result = learn.train_step(model, batch, optimizer, 1e-3, FAST)
    assert result.rows == 20
    want = torch.nn.functional.cross_entropy(logits, batch.labels)
    assert float(result.loss) == pytest.approx(float(want), rel=1e-5)
    assert int(result.correct) == int((logits.argmax(1) == batch.labels).sum())
    assert float(result.grad_norm) > 0


def test_rows_spread_unevenly_over_processes_weigh_the_same() -> None:
    def gradient(prepared: list[Prepared], labels: list[int], rows: float | None) -> torch.Tensor:
        model = small_model(modalities="text", dropout=0.0).train()
        cfg = FAST.model_copy(update={"grad_clip": None})
        batch = learn.collate(prepared, labels)
        learn.train_step(model, batch, learn.make_optimizer(model, cfg), 1e-3, cfg, rows=rows)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    prepared, labels = toy(12, seed=4)
    prepared = [Prepared(None, row.tokens) for row in prepared]
    whole = gradient(prepared, labels, None)
    parts = [  # three processes; the third has no row of its own
        gradient(prepared[:9], labels[:9], 12 / 3),
        gradient(prepared[9:], labels[9:], 12 / 3),
        gradient(prepared[:1], labels[:1], math.inf),
    ]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole)


@pytest.mark.parametrize("parts", [2, 5, 99])
def test_a_step_taken_in_parts_is_the_same_step(parts: int) -> None:
    """More rows than fit on a device at once must not change what is learned."""
    prepared, labels = toy(12, seed=4)
    batch = learn.collate([Prepared(None, row.tokens) for row in prepared], labels)

    def step(accumulate: int) -> tuple[learn.StepResult, dict[str, torch.Tensor]]:
        model = small_model(modalities="text", dropout=0.0).train()
        cfg = FAST.model_copy(update={"accumulate": accumulate, "grad_clip": 0.1})
        optimizer = learn.make_optimizer(model, cfg)
        objective = Objective(weights=torch.tensor([0.5, 2.0]))
        result = learn.train_step(model, batch, optimizer, 1e-3, cfg, objective=objective, rows=7)
        return result, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (whole, want), (taken, got) = step(1), step(parts)
    assert float(taken.loss) == pytest.approx(float(whole.loss), rel=1e-5)
    assert int(taken.correct) == int(whole.correct)
    assert float(taken.grad_norm) == pytest.approx(float(whole.grad_norm), rel=1e-4)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7)


def test_a_batch_is_split_into_all_its_rows_in_order() -> None:
    batch = learn.collate(*toy(7, seed=1))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [2, 2, 3]
    for name in ("pixels", "tokens", "mask", "labels"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(batch, name)), name
    assert len(batch.split(20)) == 7


def test_gradients_are_clipped_to_the_global_norm() -> None:
    model = small_model().train()
    cfg = FAST.model_copy(update={"grad_clip": 1e-3})
    optimizer = learn.make_optimizer(model, cfg)
    result = learn.train_step(model, learn.collate(*toy(8, seed=0)), optimizer, 1e-3, cfg)
    norm = math.sqrt(
        sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    )
    assert float(result.grad_norm) > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-2)


def test_learning_rates_of_backbones_and_of_the_rest(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    transformers.BertModel(tiny).save_pretrained(tmp_path)
    model = small_model(text=TextModel(encoder=f"hf:{tmp_path}")).train()
    cfg = Train(lr=1e-2, backbone_lr=1e-4, weight_decay=0.1, precision="float32")
    optimizer = learn.make_optimizer(model, cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    seen: dict[str, tuple[float, float]] = {}
    learn.train_step(model, learn.collate(*toy(8, seed=0)), optimizer, 5e-3, cfg)
    for group in optimizer.param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = (group["lr"], group["weight_decay"])
    assert seen.keys() == set(names.values())
    assert seen["head.1.weight"] == (5e-3, 0.1)
    assert seen["head.1.bias"] == (5e-3, 0.0)
    assert seen["image.net.0.1.weight"] == (5e-3, 0.0)  # batch norm
    layer = "text.net.encoder.layer.0.attention.self.query"
    assert seen[f"{layer}.weight"] == (pytest.approx(5e-5), 0.1)
    assert seen[f"{layer}.bias"] == (pytest.approx(5e-5), 0.0)
    assert isinstance(optimizer, torch.optim.AdamW)


def test_an_encoders_own_learning_rate_goes_before_all_others() -> None:
    model = small_model(
        image=ImageModel(lr=2e-4), text=TextModel(encoder="gru", dim=32, lr=4e-2), dropout=0.0
    ).train()
    cfg = Train(lr=1e-2, backbone_lr=1e-4, precision="float32")
    optimizer = learn.make_optimizer(model, cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn.train_step(model, learn.collate(*toy(8, seed=0)), optimizer, 5e-3, cfg)  # half way up
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(before)
    for name, p in model.named_parameters():
        want = {"image": 1e-4, "text": 2e-2}.get(name.partition(".")[0], 5e-3)
        assert rates[p] == pytest.approx(want), name
        assert float((p.detach() - before[name]).abs().max()) < 1.2 * want  # Adam's first step


def test_learning_rate_warms_up_and_falls() -> None:
    cfg = Train(lr=1.0, warmup=0.2, schedule="cosine")
    rates = [learn.lr_at(step, 50, cfg) for step in range(50)]
    assert 0 < rates[0] < rates[5] < rates[9] < 1.0
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[30] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01
    constant = Train(lr=1.0, warmup=0.0, schedule="constant")
    assert {learn.lr_at(step, 50, constant) for step in range(50)} == {1.0}
    assert learn.lr_at(0, 1, cfg) == 1.0


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, want in (
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True, "sse4a": True}, "bf16"),  # AMD
        ({"avx512_bf16": True, "sse4a": False}, "float32"),  # Intel, AMX hidden
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=features: found)
        assert learn.resolve_precision("auto", "cpu") == want
    for computes in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda *, including_emulation, found=computes: found
        )
        assert learn.resolve_precision("auto", "cuda") == ("bf16" if computes else "float32")
    assert learn.resolve_precision("bf16", "cpu") == "bf16"
    assert learn.resolve_precision("float32", "cuda") == "float32"


def test_bf16_trains_and_gives_float32_scores() -> None:
    model = small_model().train()
    cfg = FAST.model_copy(update={"precision": "bf16"})
    optimizer = learn.make_optimizer(model, cfg)
    batch = learn.collate(*toy(16, seed=0))
    first = learn.train_step(model, batch, optimizer, 3e-3, cfg)
    assert first.loss.dtype == torch.float32
    for _ in range(10):
        last = learn.train_step(model, batch, optimizer, 3e-3, cfg)
    assert float(last.loss) < float(first.loss)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.inference_mode(), learn.autocast("bf16", "cpu"):
        logits, embedding = model.eval()(batch.pixels, batch.tokens, batch.mask)
    assert logits.dtype == embedding.dtype == torch.float32


def test_a_wrapped_model_trains_and_evaluates_alike(tmp_path: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        plain, inner = small_model(1).train(), small_model(1).train()
        wrapped = DistributedDataParallel(inner)
        batch = learn.collate(*toy(16, seed=3))
        torch.manual_seed(0)
        a = learn.train_step(plain, batch, learn.make_optimizer(plain, FAST), 1e-3, FAST)
        torch.manual_seed(0)
        b = learn.train_step(wrapped, batch, learn.make_optimizer(wrapped, FAST), 1e-3, FAST)
        assert float(a.loss) == pytest.approx(float(b.loss))
        for x, y in zip(plain.parameters(), inner.parameters(), strict=True):
            torch.testing.assert_close(x, y)
        assert measured(wrapped, [batch]).counts.rows == 16
    finally:
        dist.destroy_process_group()


def test_the_classic_config_is_the_classic_model() -> None:
    path = ROOT / "jobs" / "configs" / "classic.yaml"
    cfg = config.load(path, ["data.archive=somewhere", "out=elsewhere"])
    assert cfg.model.image.encoder == "small_cnn" and cfg.model.text.encoder == "bag"
    assert cfg.model.fusion == "concat"
    model = build_model(
        make_spec(
            cfg.model, num_classes=2, vocab_size=WORDS, pad_id=0, max_tokens=8, image_size=SIZE
        )
    )
    optimizer = learn.make_optimizer(model, cfg.train)
    assert isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW)
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {(1e-3, 0.0)}
    assert learn.lr_at(3, 10, cfg.train) == 1e-3
