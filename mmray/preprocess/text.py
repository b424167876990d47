"""Captions -> token ids: one way of cleaning, and the tokenizer that travels in the bundle."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mmray import storage
from mmray.config import TextPreprocess
from mmray.errors import ConfigError

PAD, UNK, CLS, SEP, URL, USER = "<pad>", "<unk>", "<cls>", "<sep>", "<url>", "<user>"
#: Special tokens of a trained tokenizer; their ids are 0 to 5 in this order.
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP, URL, USER)

#: What stands for a URL or a user in front of a tokenizer that lacks ``<url>`` or ``<user>`` and
#: would take them to pieces: the words that pretrained models of tweets were trained with
#: (Barbieri et al. 2020, TweetEval, https://aclanthology.org/2020.findings-emnlp.148).
URL_WORD, USER_WORD = "http", "@user"

#: Pad tokens by which a tokenizer.json that configures no padding is searched, in this order.
PAD_TOKENS = (PAD, "[PAD]", "<|pad|>", "<|endoftext|>")

#: Characters that are read for each token that is kept: bounds the work on a caption that is a
#: book. No text in use comes near that many characters a token.
CHARS_PER_TOKEN = 128

#: Cleaning is repeated until nothing changes, since what it takes away can lay bare more of the
#: same ("&amp;lt;"). Real text settles in two passes; this stops what was nested on purpose.
MAX_PASSES = 8

_SURROGATES = "\ud800-\udfff"  # halves of a character, which UTF-8 cannot hold
_CONTROLS = "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # but not those that are white space
_ZERO_WIDTH = "\xad\u034f\u180e\u200b-\u200d\u2060-\u2064\ufeff"
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
_ANNOTATION = "\ufff9-\ufffb\U000e0000-\U000e007f"  # interlinear marks and tag characters
_REMOVED = re.compile(f"[{_SURROGATES}{_CONTROLS}{_ZERO_WIDTH}{_BIDI}{_ANNOTATION}]")

_ELLIPSIS = r"(?:…|\.{3})"  # NFKC makes three full stops of the one character
# A URL ends at white space, at a quotation mark, and where text without spaces (Chinese,
# Japanese, Korean) goes on; the full stop or bracket after it is the sentence's.
_NOT_IN_URL = r"""\s<>"\u2018-\u201f«»…\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7af"""
_URL = re.compile(
    rf"(?:https?://|(?<!\w)www\.)[^{_NOT_IN_URL}]*[^{_NOT_IN_URL}.,;:!?')\]}}]{_ELLIPSIS}?"
    rf"|(?<!\w)https?(?::/{{0,2}})?{_ELLIPSIS}",  # cut before its host
    re.IGNORECASE,
)
# Not after a word character, so that an e-mail address stays one, nor inside a URL's path.
_MENTION = re.compile(r"(?<![\w@/])@[A-Za-z0-9_]+")


def clean_text(
    text: str, cfg: TextPreprocess, *, url_token: str = URL, user_token: str = USER
) -> str:
    """``text`` as it is tokenized, on one line; "" where nothing is left of it.

    HTML entities are resolved, control, zero-width and direction characters removed, Unicode
    normalised (``cfg.unicode``), letters lowered (``cfg.lowercase``), URLs and user mentions
    kept, dropped or replaced by their token, white space collapsed. Cleaning what is clean
    changes nothing.
    """
    for _ in range(MAX_PASSES):
        cleaned = _clean_once(text, cfg, url_token, user_token)
        if cleaned == text:
            break
        text = cleaned
    return text


def _clean_once(text: str, cfg: TextPreprocess, url_token: str, user_token: str) -> str:
    text = html.unescape(text[: CHARS_PER_TOKEN * cfg.max_tokens])
    text = unicodedata.normalize(cfg.unicode, _REMOVED.sub("", text))
    if cfg.lowercase:
        text = text.lower()
    if cfg.urls != "keep":
        text = _URL.sub(f" {url_token} " if cfg.urls == "token" else " ", text)
    if cfg.mentions != "keep":
        text = _MENTION.sub(f" {user_token} " if cfg.mentions == "token" else " ", text)
    return " ".join(text.split())


class TextTokenizer:
    """Captions as token ids: cleaning, then a ``tokenizers.Tokenizer`` with its special tokens.

    ``vocab_size`` is the number of embeddings a model needs (largest id + 1); ``pad_id`` the id
    to fill batches with.
    """

    def __init__(self, tokenizer: Tokenizer, cfg: TextPreprocess) -> None:
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ConfigError("tokenizer: its vocabulary is empty")
        self.vocab_size = max(vocab.values()) + 1
        self.pad_id = _pad_id(tokenizer)
        self._cfg = cfg
        self._url_token = URL if URL in vocab else URL_WORD
        self._user_token = USER if USER in vocab else USER_WORD
        self._tokenizer = tokenizer
        self._tokenizer.enable_truncation(cfg.max_tokens)
        # To the longest of a batch, thus nothing for one text; kept because it names the pad id.
        self._tokenizer.enable_padding(
            pad_id=self.pad_id, pad_token=tokenizer.id_to_token(self.pad_id) or PAD
        )

    def clean(self, text: str) -> str:
        """The text that ``encode`` tokenizes."""
        return clean_text(text, self._cfg, url_token=self._url_token, user_token=self._user_token)

    def encode(self, text: str) -> np.ndarray:
        """The token ids of a caption: int32 [L], 1 <= L <= max_tokens, not padded.

        ``text`` is cleaned here. A longer caption loses its end, not its final special token;
        one of which nothing is left is its special tokens, or one pad token where it has none.
        """
        ids = self._tokenizer.encode(self.clean(text)).ids
        return np.array(ids or [self.pad_id], dtype=np.int32)

    def to_json(self) -> str:
        """The tokenizer as the text of a ``tokenizer.json``: data, no code."""
        text: str = self._tokenizer.to_str()
        return text

    @classmethod
    def from_json(cls, text: str, cfg: TextPreprocess) -> TextTokenizer:
        """A tokenizer from the text of a ``tokenizer.json``; ConfigError if it is not one."""
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001  the library raises Exception itself
            raise ConfigError(f"tokenizer: not the text of a tokenizer.json: {error}") from None
        return cls(tokenizer, cfg)


def _pad_id(tokenizer: Tokenizer) -> int:
    """The id to pad with; 0 where the tokenizer names none, which a mask makes as good."""
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    ids = (tokenizer.token_to_id(token) for token in PAD_TOKENS)
    return next((found for found in ids if found is not None), 0)


def train_tokenizer(captions: Iterable[str], cfg: TextPreprocess) -> TextTokenizer:
    """A BPE tokenizer (Sennrich et al. 2016) of at most ``cfg.vocab_size`` tokens.

    It works on bytes (Radford et al. 2019), so that no caption holds anything unknown to it. The
    same captions in any order give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # lstrip: the space before a <url> belongs to it, and is no token of its own
    special = [AddedToken(token, special=True, lstrip=True) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The trainer does not know special tokens when it meets them: it would learn their letters.
    texts = (clean_text(caption, cfg, url_token="", user_token="") for caption in captions)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)],
    )
    return TextTokenizer(tokenizer, cfg)


def load_tokenizer(path: str, cfg: TextPreprocess) -> TextTokenizer:
    """A Hugging Face ``tokenizer.json``, or the one in a directory; local or ``s3://``.

    Raises NotFound where there is none, ConfigError where it is not one.
    """
    uri = path if path.endswith(".json") else storage.join(path, "tokenizer.json")
    try:
        text = storage.read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{uri}: not a tokenizer.json: not UTF-8") from None
    try:
        return TextTokenizer.from_json(text, cfg)
    except ConfigError as error:
        raise ConfigError(f"{uri}: {error}") from None
