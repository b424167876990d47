"""Text encoders: token ids -> Features.

Shapes: B rows, L tokens (padded to the batch's longest), D width, N attention heads, K width of a
head. What stands under padding (mask False) never reaches the result.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmray.config import TextModel
from mmray.errors import ConfigError
from mmray.model.features import Encoder, Features, attendable, masked_mean

HF = "hf:"
KEY = "model.text.encoder"
#: Model types whose positions begin after the padding token's number, as RoBERTa's do.
OFFSET = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


class TextEncoder(Encoder):
    """``forward(tokens_BL int64, mask_BL bool)`` -> Features; pooled is the mean of the tokens."""

    def forward(self, tokens_BL: Tensor, mask_BL: Tensor) -> Features:
        with self.grad_mode():
            x_BLD = self.encode(tokens_BL, mask_BL)
            return Features(masked_mean(x_BLD, mask_BL), x_BLD, mask_BL)

    def encode(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """One vector a token, float [B, L, D]."""
        raise NotImplementedError


class Bag(TextEncoder):
    """Embedding and a linear layer, averaged over the caption: word order is not seen."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(vocab_size, dim)
        self.linear = nn.Linear(dim, dim)

    def encode(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLD: Tensor = self.linear(self.embedding(tokens_BL))
        return x_BLD


class GRU(TextEncoder):
    """Gated recurrent units (Cho et al. 2014, arXiv:1406.1078) over the caption in both
    directions; a token's vector is what each has seen up to it, side by side.

    Captions are packed, so that the backward direction starts at a caption's end, not in its
    padding. ``mask`` is True up to there, and False after it.
    """

    def __init__(self, vocab_size: int, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.net = nn.GRU(
            dim,
            dim // 2,
            layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if layers > 1 else 0.0,
        )

    def encode(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLD = self.dropout(self.embedding(tokens_BL))
        lengths_B = mask_BL.sum(1).clamp(min=1).cpu()  # of no token at all nothing can be packed
        packed = pack_padded_sequence(x_BLD, lengths_B, batch_first=True, enforce_sorted=False)
        x_out_BLD, _ = pad_packed_sequence(
            self.net(packed)[0], batch_first=True, total_length=tokens_BL.shape[1]
        )
        return x_out_BLD


class Block(nn.Module):
    """Pre-norm transformer block (Xiong et al. 2020, arXiv:2002.04745), bidirectional."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x_BLD: Tensor, allowed_B11L: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attend(self.attention_norm(x_BLD), allowed_B11L)
        mlp_BLD: Tensor = self.mlp(self.mlp_norm(x_BLD))
        return x_BLD + mlp_BLD

    def attend(self, x_BLD: Tensor, allowed_B11L: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        qkv_3BNLK = self.qkv(x_BLD).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BNLK, k_BNLK, v_BNLK = qkv_3BNLK.unbind(0)
        dropout = self.dropout if self.training else 0.0
        x_BNLK = F.scaled_dot_product_attention(
            q_BNLK, k_BNLK, v_BNLK, attn_mask=allowed_B11L, dropout_p=dropout
        )
        x_out_BLD: Tensor = self.out(x_BNLK.transpose(1, 2).reshape(B, L, D))
        return F.dropout(x_out_BLD, self.dropout, self.training)


class Transformer(TextEncoder):
    """A transformer encoder from scratch, with learned positions."""

    def __init__(
        self, vocab_size: int, max_tokens: int, dim: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.empty(max_tokens, dim))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def encode(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        allowed_B11L = attendable(mask_BL)
        x_BLD = self.dropout(self.embedding(tokens_BL) + self.positions[: tokens_BL.shape[1]])
        for block in self.blocks:
            x_BLD = block(x_BLD, allowed_B11L)
        x_out_BLD: Tensor = self.norm(x_BLD)
        return x_out_BLD


class HuggingFace(TextEncoder):
    """An encoder of the ``transformers`` library, built from its config; no code of a hub runs."""

    def __init__(self, hf_config: dict[str, Any]) -> None:
        super().__init__()
        transformers = _transformers()
        fields = {key: value for key, value in hf_config.items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(hf_config["model_type"], **fields)
        self.net = _without_pooler(
            transformers.AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
        )
        self.dim = int(config.hidden_size)

    def encode(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLD: Tensor = self.net(
            input_ids=tokens_BL, attention_mask=mask_BL.long()
        ).last_hidden_state
        return x_BLD

    def load(self, name: str) -> None:
        """Copy in the safetensors weights at ``name`` (a path or a hub id); all must be there."""
        try:
            source, info = _transformers().AutoModel.from_pretrained(
                name,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(_unreadable(name, error)) from None
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise ConfigError(
                f"{KEY}: {HF}{name} has no weights for {len(missing)} tensors, the first "
                f"{missing[0]}; use a model of the type its config.json says"
            )
        self.net.load_state_dict(_without_pooler(source).state_dict(), strict=True)


def build(
    cfg: TextModel,
    *,
    vocab_size: int,
    max_tokens: int,
    dropout: float,
    hf_config: dict[str, Any] | None,
) -> TextEncoder:
    """The encoder ``cfg`` names, with random weights; ``load`` brings in those of ``hf:``."""
    encoder: TextEncoder
    if cfg.encoder == "bag":
        encoder = Bag(vocab_size, cfg.dim)
    elif cfg.encoder == "gru":
        encoder = GRU(vocab_size, cfg.dim, cfg.layers, dropout)
    elif cfg.encoder == "transformer":
        encoder = Transformer(vocab_size, max_tokens, cfg.dim, cfg.layers, cfg.heads, dropout)
    else:
        assert hf_config is not None
        encoder = HuggingFace(hf_config)
    encoder.settle(pretrained=cfg.encoder.startswith(HF), frozen=cfg.freeze)
    return encoder


def check(cfg: TextModel) -> None:
    """Raise ConfigError when ``cfg`` contradicts itself or needs a library that is missing."""
    if cfg.encoder.startswith(HF):
        _transformers()
        path = cfg.encoder.removeprefix(HF)
        if path.startswith(("/", ".", "~")) and not os.path.isdir(path):
            raise ConfigError(f"{KEY}: {path}: no such folder (seen from {os.getcwd()})")
    elif cfg.freeze:
        raise ConfigError(
            f"model.text.freeze: got true with encoder {cfg.encoder!r}, which starts from random "
            f"weights; set it to false or use a pretrained hf: encoder"
        )


def read_hf_config(encoder: str, *, vocab_size: int | None, max_tokens: int) -> dict[str, Any]:
    """The configuration of ``hf:<path or id>``, from its config.json, as plain data.

    Raises ConfigError when it cannot be read, is no plain text encoder, or does not fit the
    tokenizer (``vocab_size``, ``max_tokens``).
    """
    name = encoder.removeprefix(HF)
    try:
        config = _transformers().AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_unreadable(name, error)) from None
    if config.is_encoder_decoder or not isinstance(getattr(config, "hidden_size", None), int):
        raise ConfigError(
            f"{KEY}: {encoder} is a {config.model_type!r} model; needed is a text "
            f"encoder (bert, roberta, mpnet, ...)"
        )
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise ConfigError(
            f"preprocess.text.tokenizer: it has {vocab_size} tokens, {encoder} knows "
            f"{config.vocab_size}; use the tokenizer.json that belongs to the model"
        )
    longest = getattr(config, "max_position_embeddings", max_tokens)
    if config.model_type in OFFSET:
        longest -= (config.pad_token_id or 0) + 1
    if max_tokens > longest:
        raise ConfigError(
            f"preprocess.text.max_tokens: got {max_tokens}; {encoder} takes at most {longest}"
        )
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in fields.items() if not key.startswith("_")}


def _without_pooler(net: Any) -> Any:
    # The pooler's output is not used here; its weights would never get a gradient, which DDP
    # refuses.
    if getattr(net, "pooler", None) is not None:
        net.pooler = None
    return net


def _unreadable(name: str, error: Exception) -> str:
    problem = " ".join(str(error).split())
    return f"{KEY}: {HF}{name} cannot be read as a local folder or a hub id: {problem}"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"{KEY}: {HF} encoders need the transformers library; pip install 'mmray[hf]'"
        ) from None
    return transformers
