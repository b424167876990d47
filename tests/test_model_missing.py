"""Without these a pair that lacks its picture would be scored by a black one, cost its neighbours
their scores, or stop a training on several workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmray import learn
from mmray.archive.rows import Sample
from mmray.config import Model, Preprocess, TextModel, Train, TrainConfig, validate
from mmray.counts import AnswerCounts
from mmray.demo.generate import pairs
from mmray.errors import ConfigError
from mmray.learn import Batch, collate, drop_modalities
from mmray.model import FUSIONS, FusionModel, build_model, make_spec
from mmray.preprocess import Prepared, Preprocessor, TextTokenizer, train_tokenizer

SIZE, WORDS = 64, 20
BOTH, NO_IMAGE, NO_TEXT = (True, True), (False, True), (True, False)
FLOAT = Train(precision="float32", lr=3e-3)


def model_of(
    tokenizer: TextTokenizer | None = None, size: int = SIZE, **fields: Any
) -> FusionModel:
    torch.manual_seed(0)
    small = {"hidden": 32, "text": TextModel(encoder="gru", dim=16, layers=1), "missing": True}
    spec = make_spec(
        Model(**(small | fields)),
        num_classes=2,
        vocab_size=tokenizer.vocab_size if tokenizer else WORDS,
        pad_id=0,
        max_tokens=32,
        image_size=size,
    )
    return build_model(spec)


def rows(*there: tuple[bool, bool], seed: int = 0) -> list[Prepared]:
    """A row for each (has a picture, has a caption)."""
    rng = np.random.default_rng(seed)
    made = []
    for picture, caption in there:
        pixels = rng.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
        tokens = rng.integers(1, WORDS, rng.integers(1, 9)).astype(np.int32)
        made.append(Prepared(pixels if picture else None, tokens if caption else None))
    return made


def logits_of(model: FusionModel, batch: Batch) -> torch.Tensor:
    logits, embedding = model(batch.pixels, batch.tokens, batch.mask, batch.pictured)
    assert torch.isfinite(logits).all() and torch.isfinite(embedding).all()
    return logits


def test_a_batch_says_what_is_there() -> None:
    prepared = rows(BOTH, NO_IMAGE, NO_TEXT)
    batch = collate(prepared, [0, 1, 0])
    assert batch.pixels is not None and batch.mask is not None and batch.pictured is not None
    assert batch.pictured.tolist() == [True, False, True]
    assert np.array_equal(batch.pixels[2], prepared[2].pixels)  # type: ignore[arg-type]
    assert not batch.pixels[1].any()
    assert batch.mask.any(1).tolist() == [True, True, False]
    assert batch.to("cpu").pictured is not None
    assert collate(rows(BOTH, NO_TEXT)).pictured is None
    assert collate(rows(NO_IMAGE)).pixels is None and collate(rows(NO_TEXT)).tokens is None


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_row_scores_the_same_alone_and_among_others(fusion: str) -> None:
    model = model_of(fusion=fusion).eval()
    prepared = rows(BOTH, NO_IMAGE, NO_TEXT, BOTH, NO_IMAGE, NO_TEXT)
    with torch.inference_mode():
        together = logits_of(model, collate(prepared))
        for row, expected in zip(prepared, together, strict=True):
            alone = logits_of(model, collate([row]))[0]
            torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in together.tolist()}) == len(prepared)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_stands_where_a_modality_is_absent_is_not_seen(fusion: str) -> None:
    model = model_of(fusion=fusion).eval()
    batch = collate(rows(BOTH, NO_IMAGE, NO_TEXT))
    assert batch.pixels is not None and batch.tokens is not None and batch.pictured is not None
    other = replace(batch, pixels=batch.pixels.clone(), tokens=batch.tokens.clone())
    assert other.pixels is not None and other.tokens is not None
    other.pixels[1], other.tokens[2] = 200, 5
    assert torch.equal(logits_of(model, batch), logits_of(model, other))
    with torch.no_grad():
        assert model.no_image is not None and model.no_text is not None
        before = logits_of(model, batch)
        model.no_image.vector.add_(torch.randn_like(model.no_image.vector))
        model.no_text.vector.add_(torch.randn_like(model.no_text.vector))
        changed = (logits_of(model, batch) != before).any(1)
    assert changed.tolist() == [False, True, True]  # learned, and only where it stands in


def test_an_absent_picture_is_no_black_one_in_the_statistics_of_batch_norms() -> None:
    def statistics(there: list[tuple[bool, bool]]) -> list[torch.Tensor]:
        model = model_of().train()
        logits_of(model, collate(rows(*there)))
        return [value for name, value in model.named_buffers() if "running" in name]

    for a, b in zip(statistics([BOTH, BOTH]), statistics([BOTH, BOTH, NO_IMAGE]), strict=True):
        torch.testing.assert_close(a, b)


def test_no_row_of_the_batch_with_a_picture_leaves_the_statistics_alone() -> None:
    model = model_of().train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    logits_of(model, collate(rows(NO_IMAGE, NO_IMAGE)))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


BATCHES = [[BOTH] * 4, [NO_IMAGE] * 4, [NO_TEXT] * 4, [BOTH, NO_IMAGE, NO_TEXT, BOTH]]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_weight_takes_part_in_every_batch(fusion: str, precision: Any) -> None:
    """DistributedDataParallel waits for the gradient of each."""
    model = model_of(fusion=fusion).train()
    for there in BATCHES:
        model.zero_grad(set_to_none=True)
        batch = collate(rows(*there))
        with learn.autocast(precision, "cpu"):
            logits = logits_of(model, batch)
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert model.no_image is not None and model.no_text is not None
    for stand_in in (model.no_image, model.no_text):
        assert stand_in.vector.grad is not None and stand_in.vector.grad.abs().sum() > 0


def test_distributed_training_goes_through_all_of_them(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(model_of().train())
        cfg = FLOAT.model_copy(update={"modality_dropout": 0.5})
        optimizer = learn.make_optimizer(model, cfg)
        for there in BATCHES * 2:
            batch = collate(rows(*there), [0, 1, 1, 0])
            assert learn.train_step(model, batch, optimizer, 1e-3, cfg).loss.isfinite()
    finally:
        dist.destroy_process_group()


def test_modality_dropout_takes_one_side_of_some_pairs_and_the_same_ones_again() -> None:
    batch = collate(rows(*[BOTH] * 400, *[NO_IMAGE] * 20, *[NO_TEXT] * 20))
    torch.manual_seed(1)
    dropped = drop_modalities(batch, 0.4)
    assert dropped.pictured is not None and dropped.mask is not None and batch.mask is not None
    pictured, captioned = dropped.pictured, dropped.mask.any(1)
    assert (pictured | captioned).all()  # never both
    assert pictured[400:].tolist() == [False] * 20 + [True] * 20
    assert captioned[400:].tolist() == [True] * 20 + [False] * 20
    for side in (pictured, captioned):
        assert 55 < int((~side[:400]).sum()) < 105  # of 80
    assert torch.equal(dropped.mask[captioned], batch.mask[captioned])
    torch.manual_seed(1)
    again = drop_modalities(batch, 0.4)
    assert torch.equal(again.pictured, pictured) and torch.equal(again.mask, dropped.mask)  # type: ignore[arg-type]
    torch.manual_seed(2)
    assert not torch.equal(drop_modalities(batch, 0.4).pictured, pictured)  # type: ignore[arg-type]
    assert drop_modalities(batch, 0.0) is batch
    draws = torch.tensor([[0.39, 0.4], [0.39, 0.6], [0.41, 0.4]])
    given = drop_modalities(collate(rows(*[BOTH] * 3)), 0.4, draws)
    assert given.pictured is not None and given.mask is not None
    assert given.pictured.tolist() == [False, True, True]
    assert given.mask.any(1).tolist() == [True, False, True]


def test_what_cannot_be_is_refused() -> None:
    base = {"data": {"archive": "a"}, "out": "o"}
    with pytest.raises(ConfigError, match=r"model\.missing: got true with modalities 'image'"):
        validate(TrainConfig, base | {"model": {"missing": True, "modalities": "image"}}, "x")
    with pytest.raises(ConfigError, match=r"train\.modality_dropout: got 0\.2 with model\.missing"):
        validate(TrainConfig, base | {"train": {"modality_dropout": 0.2}}, "x")
    with pytest.raises(AssertionError, match="this model needs pictures"):
        logits_of(model_of(missing=False), collate(rows(NO_IMAGE)))


# --- what it is good for -------------------------------------------------------------------------


def test_a_model_trained_with_modality_dropout_does_without_either() -> None:
    """Generated pairs in which picture and caption agree, so that each alone says enough."""
    cfg = Preprocess.model_validate({"image": {"size": 32}, "text": {"vocab_size": 600}})
    agreeing = [pair for pair in pairs(480) if pair.label != "sarcastic"]
    tokenizer = train_tokenizer([pair.caption for pair in agreeing], cfg.text)
    preprocessor = Preprocessor(cfg, tokenizer, "both", missing=True)

    def prepared(split: str, **without: None) -> tuple[list[Prepared], list[int]]:
        chosen = [pair for pair in agreeing if pair.split == split]
        samples = [Sample("a", 0, pair.key, pair.image, pair.caption) for pair in chosen]
        made = [preprocessor.prepare(replace(sample, **without)) for sample in samples]
        return made, [int(pair.label == "happy") for pair in chosen]

    train, labels = prepared("train")
    held_out = [
        collate(*prepared("dev")),
        collate(*prepared("dev", caption=None)),
        collate(*prepared("dev", image=None)),
    ]

    def accuracies(share: float) -> list[float]:
        """Of whole pairs, of pictures alone, of captions alone."""
        model = model_of(tokenizer, 32, text=TextModel(encoder="bag", dim=32), dropout=0.0).train()
        cfg = FLOAT.model_copy(update={"modality_dropout": share, "lr": 1e-2})
        optimizer = learn.make_optimizer(model, cfg)
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        for _ in range(15):
            for at in np.array_split(rng.permutation(len(train)), len(train) // 32):
                batch = collate([train[i] for i in at], [labels[i] for i in at])
                learn.train_step(model, batch, optimizer, 1e-2, cfg)
        found = [learn.evaluate_batches(model, [batch], AnswerCounts("01")) for batch in held_out]
        return [evaluation.counts.report()["accuracy"] for evaluation in found]

    pairs_alone, pictures, captions = accuracies(0.6)
    assert pairs_alone > 0.9 and pictures > 0.9 and captions > 0.7
    # Pictures are the easier half: left to itself, training learns next to nothing from words.
    assert captions > accuracies(0.0)[2] + 0.1
