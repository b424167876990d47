"""What a server says of its model: labels, what it needs, limits, examples."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from mmray import __version__
from mmray import golden as golden_pairs
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.bundle import Bundle
from mmray.errors import BadRow, ConfigError
from mmray.preprocess import Preprocessor
from mmray.serving.settings import ServeConfig

Need = Literal["required", "optional", "unused"]
#: What ``Prepared`` calls what comes of each.
PREPARED = {"image": "pixels", "caption": "tokens"}


def preprocessor_of(bundle: Bundle, cfg: ServeConfig) -> Preprocessor:
    """The bundle's preprocessing, under the server's cap of pixels where that is lower."""
    made = bundle.build_preprocessor()
    image = made.cfg.image
    capped = image.model_copy(update={"max_pixels": min(image.max_pixels, cfg.limits.pixels)})
    made.cfg = made.cfg.model_copy(update={"image": capped})
    return made


def card(bundle: Bundle, preprocessor: Preprocessor, task: str, cfg: ServeConfig) -> dict[str, Any]:
    """The answer of ``GET /v1/model``."""
    assert bundle.golden is not None, "only a bundle that was saved has golden pairs"
    return {
        "task": task,
        "labels": list(bundle.labels),
        "fingerprint": bundle.fingerprint,
        "inputs": needs(preprocessor, golden_pairs.inputs(bundle.golden)),
        "preprocess": preprocessor.cfg.model_dump(mode="json"),
        "limits": cfg.limits.model_dump(mode="json"),
        "metrics": dict(bundle.metrics),
        "mmray": __version__,
    }


def needs(preprocessor: Preprocessor, golden: Sequence[Sample]) -> dict[str, Need]:
    """Whether a pair may lack its image or its caption: found by trying, on a golden pair. Raises
    ConfigError where the server's limits allow none of them."""
    sound = max(
        (sample for sample in golden if _prepared(preprocessor, sample) is not None),
        key=lambda sample: (sample.image is not None) + (sample.caption is not None),
        default=None,
    )
    if sound is None:
        raise ConfigError(
            f"limits.pixels: got {preprocessor.cfg.image.max_pixels}; no golden pair of the bundle "
            "has a picture that small: allow more"
        )
    full = _prepared(preprocessor, sound)
    found: dict[str, Need] = {}
    for name, made in PREPARED.items():
        without = _prepared(preprocessor, replace(sound, **{name: None}))  # type: ignore[arg-type]
        unused = getattr(full, made) is None
        found[name] = "required" if without is None else "unused" if unused else "optional"
    return found


def _prepared(preprocessor: Preprocessor, sample: Sample) -> Any:
    try:
        return preprocessor.prepare(sample)
    except BadRow:
        return None


def examples(bundle: Bundle, count: int) -> list[dict[str, Any]]:
    """Golden pairs for the page, one of each predicted label in turn: base64 image, caption."""
    assert bundle.golden is not None
    table = bundle.golden
    found = [row for row in table.to_pylist() if row[rows.ERROR] is None]
    names = rows.probability_columns(bundle.labels)
    best = [max(names, key=lambda name: row.get(name) or 0.0) for row in found]
    turns = [(best[:i].count(label), i) for i, label in enumerate(best)]
    chosen = [found[i] for _, i in sorted(turns)[:count]]
    return [{"image": _base64(row[rows.IMAGE]), "caption": row[rows.CAPTION]} for row in chosen]


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()
