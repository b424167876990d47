"""preprocess/__init__.py: one pair in, one prepared pair or one reason out."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from mmray.archive.rows import STAGES, Sample
from mmray.config import ImagePreprocess, Preprocess, TextPreprocess
from mmray.errors import BadRow
from mmray.preprocess import Prepared, Preprocessor, train_tokenizer

CFG = Preprocess(image=ImagePreprocess(size=32), text=TextPreprocess(vocab_size=300, urls="drop"))
TOKENIZER = train_tokenizer(["a red square", "a blue square"], CFG.text)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


PAIR = Sample("a.tar", 3, "k", image=picture(), caption="a red square")


def prepared(sample: Sample, modalities: Literal["both", "image", "text"] = "both") -> Prepared:
    return Preprocessor(CFG, TOKENIZER, modalities).prepare(sample)


def set_aside(
    sample: Sample, modalities: Literal["both", "image", "text"] = "both"
) -> tuple[str, str]:
    with pytest.raises(BadRow) as caught:
        prepared(sample, modalities)
    assert caught.value.stage in STAGES
    return caught.value.stage, str(caught.value)


def test_a_pair_becomes_pixels_and_tokens() -> None:
    pair = prepared(PAIR)
    assert pair.pixels is not None and pair.tokens is not None
    assert pair.pixels.shape == (3, 32, 32)
    assert pair.pixels.dtype == np.uint8
    assert pair.tokens.dtype == np.int32
    assert (pair.tokens == TOKENIZER.encode("a red square")).all()


def test_a_prepared_pair_comes_out_of_another_process_as_it_went_in() -> None:
    pair = prepared(PAIR)
    found = pickle.loads(pickle.dumps(pair))
    assert pair.pixels is not None and (found.pixels == pair.pixels).all()
    assert found.pixels.strides == pair.pixels.strides  # else every batch would be turned round
    assert (found.tokens == pair.tokens).all()
    assert pickle.loads(pickle.dumps(Prepared(None, None))) == Prepared(None, None)


def test_a_model_of_one_modality_asks_for_no_other() -> None:
    without_caption = prepared(replace(PAIR, caption=None), "image")
    assert without_caption.tokens is None and without_caption.pixels is not None
    without_image = prepared(replace(PAIR, image=None), "text")
    assert without_image.pixels is None and without_image.tokens is not None
    broken_image = prepared(replace(PAIR, image=b"broken"), "text")
    assert broken_image.tokens is not None
    assert Preprocessor(CFG, None, "image").prepare(PAIR).pixels is not None


def test_a_pair_that_lacks_what_the_model_needs_says_what() -> None:
    assert set_aside(replace(PAIR, image=None)) == ("image", "no image")
    assert set_aside(replace(PAIR, image=b"")) == ("image", "image empty")
    assert set_aside(replace(PAIR, caption=None)) == ("caption", "no caption")
    for blank in ("", " \n\t", "\u200b\ufeff", "&nbsp;"):
        assert set_aside(replace(PAIR, caption=blank)) == ("caption", "empty caption")
        assert set_aside(replace(PAIR, caption=blank), "text") == ("caption", "empty caption")


def test_a_model_that_does_without_one_of_them_says_what_is_broken_all_the_same() -> None:
    preprocessor = Preprocessor(CFG, TOKENIZER, "both", missing=True)
    whole, without_image = (
        preprocessor.prepare(PAIR),
        preprocessor.prepare(replace(PAIR, image=None)),
    )
    assert whole.pixels is not None and without_image.pixels is None
    assert np.array_equal(whole.pixels, prepared(PAIR).pixels)  # type: ignore[arg-type]
    for one in (whole, without_image):
        assert one.tokens is not None and (one.tokens == prepared(PAIR).tokens).all()
    for nothing in (None, "", " \n", "&nbsp;"):
        without_caption = preprocessor.prepare(replace(PAIR, caption=nothing))
        assert without_caption.tokens is None
        assert np.array_equal(without_caption.pixels, whole.pixels)  # type: ignore[arg-type]
        with pytest.raises(BadRow) as caught:
            preprocessor.prepare(replace(PAIR, image=None, caption=nothing))
        assert (caught.value.stage, str(caught.value)) == ("image", "neither image nor caption")
    for damaged, reason in ((b"", "image empty"), (b"junk", "image not recognised")):
        with pytest.raises(BadRow, match=reason):
            preprocessor.prepare(replace(PAIR, image=damaged))
    with pytest.raises(BadRow, match="caption not UTF-8"):
        preprocessor.prepare(
            replace(PAIR, caption=None, error="caption not UTF-8: x", error_stage="read")
        )


def test_a_caption_of_urls_alone_is_scored_even_where_urls_are_dropped() -> None:
    tokens = prepared(replace(PAIR, caption="http://t.co/abc")).tokens
    assert tokens is not None
    assert tokens.tolist() == TOKENIZER.encode("").tolist()


def test_what_the_reader_found_wrong_comes_first() -> None:
    bad = replace(PAIR, error="two images under one key: k.jpg, k.png", error_stage="read")
    with pytest.raises(BadRow) as caught:
        prepared(bad)
    assert caught.value.stage == "read"
    assert caught.value.reason == "two images under one key"
    assert caught.value.detail == "k.jpg, k.png"
    assert set_aside(replace(PAIR, error="no detail")) == ("read", "no detail")


def test_a_text_model_without_its_tokenizer_is_our_bug() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        Preprocessor(CFG, None, "both")
