"""The one preprocessing: training, batch scoring and serving run a pair through here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmray.archive.rows import Sample
from mmray.config import Modalities, Preprocess
from mmray.errors import BadRow
from mmray.preprocess.image import decode_image
from mmray.preprocess.text import TextTokenizer, clean_text, load_tokenizer, train_tokenizer

__all__ = [
    "PREPROCESS_VERSION",
    "Prepared",
    "Preprocessor",
    "TextTokenizer",
    "clean_text",
    "decode_image",
    "fault",
    "load_tokenizer",
    "train_tokenizer",
]

#: Raised whenever the same bytes would come out differently; part of a bundle's fingerprint.
PREPROCESS_VERSION = 1


@dataclass(frozen=True, slots=True)
class Prepared:
    """One pair, ready for the model; what the model does not use, or does without, is None.

    ``pixels``: uint8 [3, H, W], lying in memory as [H, W, 3]. ``tokens``: int32 [L],
    1 <= L <= max_tokens, not padded.
    """

    pixels: np.ndarray | None
    tokens: np.ndarray | None

    def __reduce__(self) -> tuple[Any, ...]:
        # By itself numpy writes an array out, and back, in the order of its axes.
        in_memory = None if self.pixels is None else self.pixels.transpose(1, 2, 0)
        return _read_back, (in_memory, self.tokens)


def _read_back(in_memory: np.ndarray | None, tokens: np.ndarray | None) -> Prepared:
    return Prepared(None if in_memory is None else in_memory.transpose(2, 0, 1), tokens)


def fault(sample: Sample) -> BadRow:
    """What is wrong with a sample that has an ``error``."""
    reason, _, detail = (sample.error or "").partition(": ")
    return BadRow(sample.error_stage or "read", reason, detail)


class Preprocessor:
    """A model's preprocessing: its config, its tokenizer, and the modalities it uses.

    ``missing``: the model does without a picture or a caption that is not there, though not without
    both; one that is there and broken is broken.
    """

    def __init__(
        self,
        cfg: Preprocess,
        tokenizer: TextTokenizer | None,
        modalities: Modalities,
        missing: bool = False,
    ) -> None:
        if modalities != "image" and tokenizer is None:
            raise ValueError(f"modalities: got {modalities!r} without a tokenizer")
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.modalities = modalities
        self.missing = missing
        self._nothing_dropped = cfg.text.model_copy(update={"urls": "keep", "mentions": "keep"})

    def allowing(self, max_pixels: int) -> Preprocessor:
        """The same for pictures of up to so many pixels, if that is more: the cap says whether a
        picture is read, not what comes out."""
        if max_pixels <= self.cfg.image.max_pixels:
            return self
        image = self.cfg.image.model_copy(update={"max_pixels": max_pixels})
        cfg = self.cfg.model_copy(update={"image": image})
        return Preprocessor(cfg, self.tokenizer, self.modalities, self.missing)

    def prepare(self, sample: Sample) -> Prepared:
        """The pair's pixels and tokens, from any thread; raises BadRow, and nothing else but
        MemoryError, when the model cannot be given them.

        What the reader found wrong (``sample.error``) is raised first, at its own stage.
        """
        if sample.error is not None:
            raise fault(sample)
        try:
            pixels = None if self.modalities == "text" else self._pixels(sample)
            tokens = None if self.modalities == "image" else self._tokens(sample)
        except (BadRow, MemoryError):  # short memory is the machine's state, not the row's
            raise
        except Exception as error:
            raise BadRow.surprise(
                "image" if self.tokenizer is None else "caption", error
            ) from error
        if pixels is None and tokens is None:
            raise BadRow("image", "neither image nor caption")
        return Prepared(pixels, tokens)

    def prepare_all(self, samples: Iterable[Sample]) -> tuple[list[Sample], list[Prepared | None]]:
        """Of every sample what ``prepare`` gives; where that is nothing, the sample comes back with
        the reason as its error."""
        left: list[Sample] = []
        prepared: list[Prepared | None] = []
        for sample in samples:
            try:
                prepared.append(self.prepare(sample))
                left.append(sample)
            except BadRow as bad:
                prepared.append(None)
                left.append(replace(sample, error=str(bad), error_stage=bad.stage))
        return left, prepared

    def _pixels(self, sample: Sample) -> np.ndarray | None:
        if sample.image is not None:
            return decode_image(sample.image, self.cfg.image)
        if self.missing:
            return None
        raise BadRow("image", "no image")

    def _tokens(self, sample: Sample) -> np.ndarray | None:
        assert self.tokenizer is not None
        # A caption of URLs alone has something to say, even to a model that drops them.
        if sample.caption is not None and clean_text(sample.caption, self._nothing_dropped):
            return self.tokenizer.encode(sample.caption)
        if self.missing:
            return None
        raise BadRow("caption", "no caption" if sample.caption is None else "empty caption")
