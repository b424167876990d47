"""preprocess/text.py: what of a caption reaches the model, and that it is always the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mmray.config import TextPreprocess
from mmray.errors import ConfigError, NotFound
from mmray.preprocess.text import (
    SPECIAL_TOKENS,
    TextTokenizer,
    clean_text,
    load_tokenizer,
    train_tokenizer,
)

CFG = TextPreprocess()
KEEP = TextPreprocess(urls="keep", mentions="keep")
DROP = TextPreprocess(urls="drop", mentions="drop")

CAPTIONS = [
    "A red bus in the rain, seen from above",
    "the red bus again! http://t.co/abc @driver_1",
    "Blue shoes for men - summer 2012",
    "Blue shirt for women - winter 2012",
    "an apple and two pears on a red table",
    "Ein rotes Haus \u00fcber dem Fluss",
    "\u8d64\u3044\u30d0\u30b9",
] * 3


# --- cleaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Salt &amp; pepper &lt;3 &#39;so&#39; &eacute;", "Salt & pepper <3 'so' \u00e9"),
        ("twice escaped &amp;amp; &amp;lt;b&amp;gt;", "twice escaped & <b>"),
        ("  a\t\tb\r\n\nc\u2003d\u00a0e\u2028f\x85g\x0bh ", "a b c d e f g h"),
        ("nul\x00 bell\x07 esc\x1b del\x7f c1\x9f", "nul bell esc del c1"),
        ("zero\u200bwidth \ufeffmark soft\u00adhyphen", "zerowidth mark softhyphen"),
        ("left\u200e \u202eright\u202c \u2066isolate\u2069", "left right isolate"),
        ("half \ud83d a \ude00 pair", "half a pair"),
        ("&#8203;&zwj;&#x202e;hidden &#55357;", "hidden \ufffd"),
        ("e\u0301 \u1100\u1161", "\u00e9 \uac00"),
        (
            "\U0001f600 \u2764\ufe0f \u65e5\u672c\u8a9e",
            "\U0001f600 \u2764\ufe0f \u65e5\u672c\u8a9e",
        ),
        ("", ""),
        (" \n\u200b&nbsp;", ""),
    ],
)
def test_what_readers_do_not_see_does_not_reach_the_model(text: str, cleaned: str) -> None:
    assert clean_text(text, KEEP) == cleaned


def test_unicode_form_and_case_follow_the_config() -> None:
    assert clean_text("\uff26\uff55\uff4c\uff4c \ufb01ne \u2460 wait\u2026", KEEP) == (
        "Full fine 1 wait..."
    )
    nfc = TextPreprocess(unicode="NFC", urls="keep", mentions="keep")
    assert clean_text("\uff26 \ufb01ne e\u0301\u2026", nfc) == "\uff26 \ufb01ne \u00e9\u2026"
    assert clean_text("MiXeD \u00c4", KEEP) == "MiXeD \u00c4"
    assert clean_text("MiXeD \u00c4", TextPreprocess(lowercase=True)) == "mixed \u00e4"


@pytest.mark.parametrize(
    ("text", "token", "dropped"),
    [
        ("see http://t.co/AbC1 now", "see <url> now", "see now"),
        ("HTTPS://Example.org/a?b=c&d=e#f", "<url>", ""),
        ("at www.example.com, or", "at <url> , or", "at , or"),
        ("(http://a.b/c).", "( <url> ).", "( )."),
        ("'http://a.b/c'", "' <url> '", "' '"),
        ("textglued:http://t.co/x", "textglued: <url>", "textglued:"),
        ("cut http://t.co/N8\u2026", "cut <url>", "cut"),
        ("cut http://t.co/N8...", "cut <url>", "cut"),
        ("cut http://t.c\u2026", "cut <url>", "cut"),
        ("cut http://\u2026", "cut <url>", "cut"),
        ("cut https:/...", "cut <url>", "cut"),
        ("cut http\u2026", "cut <url>", "cut"),
        ("two http://a.b http://c.d", "two <url> <url>", "two"),
        ("\u898bhttp://t.co/x\u65e5\u672c", "\u898b <url> \u65e5\u672c", "\u898b \u65e5\u672c"),
        ("\uff48\uff54\uff54\uff50\uff1a\uff0f\uff0fa.b", "<url>", ""),
        ("&lt;http://a.b&gt;", "< <url> >", "< >"),
        ("the http protocol, awww. http:// alone", None, None),
    ],
)
def test_urls(text: str, token: str | None, dropped: str | None) -> None:
    kept = clean_text(text, KEEP)
    assert clean_text(text, CFG) == (kept if token is None else token)
    assert clean_text(text, DROP) == (kept if dropped is None else dropped)
    assert "http" in kept.lower() or "www" in kept


def test_a_cut_url_keeps_its_dots_where_urls_are_kept_and_nfc_is_asked_for() -> None:
    nfc = TextPreprocess(unicode="NFC", urls="token")
    assert clean_text("cut http://t.co/N8\u2026", nfc) == "cut <url>"


@pytest.mark.parametrize(
    ("text", "token", "dropped"),
    [
        ("RT @some_user1: hello", "RT <user> : hello", "RT : hello"),
        (".@potus said", ". <user> said", ". said"),
        ("@a @b", "<user> <user>", ""),
        ("mail me@example.com or a.b+c@d.org", None, None),
        ("meet @ 5, 3 @@ 4", None, None),
    ],
)
def test_mentions(text: str, token: str | None, dropped: str | None) -> None:
    assert clean_text(text, CFG) == (text if token is None else token)
    assert clean_text(text, DROP) == (text if dropped is None else dropped)
    assert clean_text(text, KEEP) == text


def test_a_kept_url_is_not_cut_at_a_user_in_its_path() -> None:
    cfg = TextPreprocess(urls="keep", mentions="token")
    assert clean_text("https://medium.com/@user/story by @user", cfg) == (
        "https://medium.com/@user/story by <user>"
    )


CONFIGS = [
    TextPreprocess(unicode=form, lowercase=lower, urls=how, mentions=how)
    for form in ("NFC", "NFKC")
    for lower in (False, True)
    for how in ("keep", "drop", "token")
]


def test_cleaning_what_is_clean_changes_nothing() -> None:
    pieces = [
        *(
            "&amp;",
            "&",
            "amp;",
            "lt;",
            "&#64;",
            "&#x200b;",
            "http://",
            "www.",
            "a.b/c",
            "@",
            "user",
        ),
        *("\u200b", "\u202e", "\ud800", "\x00", " ", "\n", ".", "\u2026", ")", "<url>", "\uff20"),
        *("\uff06", "e", "\u0301", "\u0130", "\ufdfa", "\u1e9e", "\u65e5", "https", ":", "/", "x"),
    ]
    random = np.random.default_rng(0)
    for _ in range(1500):
        text = "".join(random.choice(pieces, size=random.integers(1, 14)))
        for cfg in CONFIGS:
            cleaned = clean_text(text, cfg)
            assert clean_text(cleaned, cfg) == cleaned, ascii(text)
            cleaned.encode("utf-8")  # no half characters are left


def test_a_hostile_caption_does_not_hold_up_the_job() -> None:
    """Each of these is quadratic or worse for a careless pattern; together they take a moment."""
    for text in (
        "&amp;" * 10**6,
        "http://" * 10**6,
        "http://" + "." * 10**6,
        "a" + "\u0301\u0323" * 10**6,
        "@" * 10**6,
        "\ufdfa" * 10**6,
        " " * 10**6,
        "x" * 10**7,
    ):
        assert len(clean_text(text, CFG)) < 10**6


# --- a trained tokenizer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer(CAPTIONS, TextPreprocess(vocab_size=400, max_tokens=16))


def pieces(tokenizer: TextTokenizer, text: str) -> list[str]:
    inner = Tokenizer.from_str(tokenizer.to_json())
    return [inner.id_to_token(int(number)) for number in tokenizer.encode(text)]


def test_token_ids_are_what_a_model_expects(trained: TextTokenizer) -> None:
    ids = trained.encode("A red bus")
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert ids.max() < trained.vocab_size <= 400
    assert trained.pad_id == 0
    assert pieces(trained, "the red bus") == [
        "<cls>",
        "\u0120the",
        "\u0120red",
        "\u0120bus",
        "<sep>",
    ]


def test_nothing_is_unknown_to_it(trained: TextTokenizer) -> None:
    inner = Tokenizer.from_str(trained.to_json())
    for text in ("\U0001f600\u200d\u65e5", "\u0416 \u00ff", "qxz~^", "\u8d64\u3044"):
        ids = trained.encode(text)
        assert inner.token_to_id("<unk>") not in ids
        assert inner.decode(ids.tolist()).strip() == trained.clean(text)


def test_urls_and_users_are_one_token_each(trained: TextTokenizer) -> None:
    shown = pieces(trained, "the http://t.co/abc @driver_1 red")
    assert [piece.strip() for piece in shown] == [
        *("<cls>", "\u0120the", "<url>", "<user>", "\u0120red", "<sep>")
    ]
    learned = [
        token for token in Tokenizer.from_str(trained.to_json()).get_vocab() if "ur" in token
    ]
    assert "<url>" in learned
    assert not any("url" in token for token in learned if token != "<url>")


def test_a_long_caption_loses_its_end_but_not_its_final_token(trained: TextTokenizer) -> None:
    shown = pieces(trained, "red bus " * 100)
    assert len(shown) == 16
    assert shown[0] == "<cls>"
    assert shown[-1] == "<sep>"


def test_an_emptied_caption_is_its_special_tokens(trained: TextTokenizer) -> None:
    assert pieces(trained, "") == ["<cls>", "<sep>"]


def test_the_bundle_gives_back_the_same_tokenizer(trained: TextTokenizer) -> None:
    cfg = TextPreprocess(vocab_size=400, max_tokens=16)
    again = TextTokenizer.from_json(trained.to_json(), cfg)
    assert again.to_json() == trained.to_json()
    assert (again.pad_id, again.vocab_size) == (trained.pad_id, trained.vocab_size)
    for caption in CAPTIONS:
        assert (again.encode(caption) == trained.encode(caption)).all()


def test_the_same_captions_give_the_same_tokenizer_in_every_process(
    trained: TextTokenizer,
) -> None:
    """Workers that train it each for themselves, or a run repeated, must agree on every id."""
    program = (
        "import json, sys\nfrom mmray.config import TextPreprocess\n"
        "from mmray.preprocess import train_tokenizer\n"
        "captions = json.load(sys.stdin)\n"
        "cfg = TextPreprocess(vocab_size=400, max_tokens=16)\n"
        "sys.stdout.write(train_tokenizer(captions, cfg).to_json())\n"
    )
    import json

    for parallelism, seed in (("false", "1"), ("true", "2")):
        made = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(CAPTIONS[::-1]),
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env={
                "PATH": "",
                "TOKENIZERS_PARALLELISM": parallelism,
                "PYTHONHASHSEED": seed,
                "PYTHONIOENCODING": "utf-8",
            },
        )
        assert made.stdout == trained.to_json()


def test_vocabulary_is_bounded_and_special_tokens_come_first() -> None:
    small = train_tokenizer(CAPTIONS, TextPreprocess(vocab_size=300))
    assert small.vocab_size <= 300
    inner = Tokenizer.from_str(small.to_json())
    assert [inner.id_to_token(number) for number in range(6)] == list(SPECIAL_TOKENS)
    nothing = train_tokenizer([], TextPreprocess(vocab_size=300))
    assert (
        len(nothing.encode("still every byte is known")) == 28
    )  # 25 bytes, a space before, <cls>, <sep>


# --- a pretrained tokenizer ----------------------------------------------------------------------


def wordpiece(pad_id: int = 3, **padding: int) -> Tokenizer:
    """A small BERT-like tokenizer, as published models have them."""
    words = ["[CLS]", "[SEP]", "[UNK]", "[PAD]", "red", "bus", "http", "@", "user", "##s"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    if padding:
        tokenizer.enable_padding(pad_id=pad_id, pad_token="[PAD]", **padding)
    return tokenizer


def test_a_pretrained_tokenizer_keeps_its_own_tokens(tmp_path: Path) -> None:
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(path), TextPreprocess(max_tokens=6))
        assert loaded.pad_id == 3
        assert loaded.vocab_size == 10
        assert pieces(loaded, "Red buss") == ["[CLS]", "red", "bus", "##s", "[SEP]"]
        assert pieces(loaded, "red " * 50) == ["[CLS]", *["red"] * 4, "[SEP]"]


def test_urls_and_users_reach_it_as_words_it_can_know(tmp_path: Path) -> None:
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path), CFG)
    assert loaded.clean("see http://t.co/x @somebody") == "see http @user"
    assert pieces(loaded, "http://t.co/x @somebody") == (["[CLS]", "http", "@", "user", "[SEP]"])


def test_padding_and_truncation_of_the_file_give_way_to_the_config() -> None:
    """Sentence-embedding models publish tokenizers that pad everything to 128."""
    fixed = wordpiece(length=128)
    fixed.enable_truncation(4)
    loaded = TextTokenizer.from_json(fixed.to_str(), TextPreprocess(max_tokens=32))
    assert loaded.pad_id == 3
    assert pieces(loaded, "red bus red bus") == ["[CLS]", *["red", "bus"] * 2, "[SEP]"]
    again = TextTokenizer.from_json(loaded.to_json(), TextPreprocess(max_tokens=32))
    assert again.to_json() == loaded.to_json()
    assert again.pad_id == 3


def test_a_tokenizer_without_special_tokens_still_gives_one_token() -> None:
    bare = Tokenizer(models.WordLevel({"red": 0, "<unk>": 1, "<pad>": 2}, unk_token="<unk>"))
    loaded = TextTokenizer.from_json(bare.to_str(), DROP)
    assert loaded.encode("http://only.a/url").tolist() == [2]


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path), CFG)
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"[1]", b'{"model": {"type": "Nonsense"}}', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"tokenizer\.json") as caught:
            load_tokenizer(str(path), CFG)
        assert "\n" not in str(caught.value)
