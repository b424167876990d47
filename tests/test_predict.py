"""Without these one bad pair would cost its neighbours, or the same pair get two scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import tiny
import torch
from torch import nn

from mmray import bundle as bundles
from mmray import doubt, golden, preprocess
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.bundle import Bundle
from mmray.config import (
    Data,
    ImagePreprocess,
    Modalities,
    Model,
    Preprocess,
    TextModel,
    TextPreprocess,
    Train,
)
from mmray.errors import BadRow, BundleError, ConfigError, RunError
from mmray.learn import collate
from mmray.model import build_model, make_spec, packed
from mmray.model.fuse import FusedEncoder
from mmray.predict import Predictor, golden_table
from mmray.preprocess import train_tokenizer

LABELS = ("autumn", "spring", "winter")
PROBABILITIES = rows.probability_columns(LABELS)


def pair(row: int) -> Sample:
    text = tiny.caption(row) if row % 3 else f"RT @user{row}: {tiny.caption(row)} http://t.co/{row}"
    return Sample("00000.tar", row, f"{row:05d}", tiny.jpeg(row, 40 + row), text)


def opinionated(modalities: Modalities = "both", missing: bool = False) -> Bundle:
    """An untrained bundle whose scores differ a lot from pair to pair."""
    cfg = Preprocess(
        image=ImagePreprocess(size=32), text=TextPreprocess(vocab_size=300, max_tokens=32)
    )
    tokenizer = train_tokenizer((tiny.caption(i) for i in range(50)), cfg.text)
    text = modalities != "image"
    spec = make_spec(
        Model(
            modalities=modalities,
            text=TextModel(dim=32, layers=1, heads=2),
            hidden=32,
            missing=missing,
        ),
        num_classes=3,
        vocab_size=tokenizer.vocab_size if text else None,
        pad_id=tokenizer.pad_id,
        max_tokens=32,
        image_size=32,
    )
    torch.manual_seed(0)
    model = build_model(spec)
    head = model.head[1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(40)
    return bundles.make(
        labels=LABELS,
        spec=spec,
        preprocess=cfg,
        state_dict=model.state_dict(),
        tokenizer=tokenizer if text else None,
        metrics={},
        training=bundles.Training(
            data=Data(archive="none"), seed=0, train=Train(precision="float32"), split={}
        ),
    )


@pytest.fixture(scope="module")
def made() -> Bundle:
    bundle = opinionated()
    broken = replace(pair(99), image=b"no picture")
    return replace(bundle, golden=golden_table(bundle, [*map(pair, range(30)), broken]))


@pytest.fixture
def predictor(made: Bundle) -> Predictor:
    return Predictor(made, "cpu", "float32", batch_size=4)


def probabilities(table: pa.Table) -> np.ndarray:
    columns = [table[name].to_numpy(zero_copy_only=False) for name in PROBABILITIES]
    return np.stack(columns, axis=1)


@pytest.fixture
def damaged() -> list[Sample]:
    """Pairs with every kind of trouble between good ones."""
    samples = [pair(row) for row in range(12)]
    samples[1] = replace(samples[1], image=b"junk")
    samples[2] = replace(samples[2], caption=None)
    samples[3] = replace(samples[3], error="image oversized: 9 GB", error_stage="read")
    samples[6] = replace(samples[6], image=None)
    samples[7] = replace(samples[7], image=samples[7].image[:200] if samples[7].image else None)
    samples[11] = replace(samples[11], caption=" \n ")
    return samples


class TestRows:
    def test_one_row_a_sample_in_order_with_scores_or_the_reason(
        self, predictor: Predictor, damaged: list[Sample]
    ) -> None:
        table = predictor.score_table(damaged)
        assert table.schema.equals(rows.scores_schema(LABELS))
        assert table[rows.ROW].to_pylist() == list(range(12))
        assert table[rows.KEY].to_pylist() == [s.key for s in damaged]
        found = dict(zip(range(12), table.to_pylist(), strict=True))
        stages = {i: row[rows.ERROR_STAGE] for i, row in found.items() if row[rows.ERROR]}
        assert stages == {
            1: "image",
            2: "caption",
            3: "read",
            6: "image",
            7: "image",
            11: "caption",
        }
        assert found[3][rows.ERROR] == "image oversized: 9 GB"
        assert found[2][rows.ERROR] == "no caption"
        for row in found.values():
            values = [row[name] for name in PROBABILITIES]
            if row[rows.ERROR]:
                assert values == [None] * 3 and row[rows.LABEL] is None
            else:
                assert sum(values) == pytest.approx(1, abs=1e-5)
                assert row[rows.LABEL] == LABELS[int(np.argmax(values))]

    def test_errors_do_not_shift_or_change_the_others(
        self, predictor: Predictor, damaged: list[Sample]
    ) -> None:
        table = predictor.score_table(damaged)
        for i, sample in enumerate(damaged):
            alone = predictor.score_table([sample])
            assert alone[rows.ERROR].to_pylist() == [table[rows.ERROR][i].as_py()]
            np.testing.assert_allclose(
                probabilities(alone)[0], probabilities(table)[i], rtol=0, atol=1e-5
            )

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_batch_size_does_not_matter(self, made: Bundle, batch_size: int) -> None:
        samples = [pair(row) for row in range(10)]
        one = Predictor(made, "cpu", "float32", batch_size=4).score_table(samples)
        other = Predictor(made, "cpu", "float32", batch_size=batch_size).score_table(samples)
        np.testing.assert_allclose(probabilities(one), probabilities(other), rtol=0, atol=1e-5)

    def test_the_same_chunk_gives_the_same_bytes(
        self, predictor: Predictor, damaged: list[Sample]
    ) -> None:
        first = predictor.score_table(damaged)
        predictor.score_table([pair(row) for row in range(20, 33)])
        assert predictor.score_table(damaged).equals(first)

    def test_no_rows(self, predictor: Predictor) -> None:
        table = predictor.score_table([], embeddings=True)
        assert table.num_rows == 0
        assert table.schema.equals(rows.scores_schema(LABELS, 32))

    def test_embeddings_stand_beside_their_rows(
        self, predictor: Predictor, damaged: list[Sample]
    ) -> None:
        table = predictor.score_table(damaged, embeddings=True)
        assert table.schema.equals(rows.scores_schema(LABELS, 32))
        found = table[rows.EMBEDDING].to_pylist()
        for i, sample in enumerate(damaged):
            if table[rows.ERROR][i].as_py():
                assert found[i] is None
            else:
                alone = predictor.forward([predictor.prepare(sample)]).embeddings[0]
                np.testing.assert_allclose(np.array(found[i]), alone, rtol=2e-3, atol=2e-3)

    def test_steps_give_what_the_whole_gives(self, predictor: Predictor) -> None:
        samples = [pair(row) for row in range(9)]
        outputs = predictor.forward([predictor.prepare(sample) for sample in samples])
        np.testing.assert_array_equal(
            outputs.probabilities, probabilities(predictor.score_table(samples))
        )

    @pytest.mark.parametrize("modalities", ["image", "text"])
    def test_one_modality_needs_only_its_own(self, modalities: Literal["image", "text"]) -> None:
        predictor = Predictor(opinionated(modalities), "cpu")
        other = {"image": {"caption": None}, "text": {"image": None}}[modalities]
        own = {"image": {"image": None}, "text": {"caption": None}}[modalities]
        table = predictor.score_table([replace(pair(1), **other), replace(pair(1), **own)])
        assert table[rows.ERROR].to_pylist() == [
            None,
            {"image": "no image", "text": "no caption"}[modalities],
        ]

    def test_a_model_that_does_without_one_scores_what_there_is(
        self, damaged: list[Sample]
    ) -> None:
        bundle = opinionated(missing=True)
        kept = golden_table(bundle, damaged)
        predictor = Predictor(replace(bundle, golden=kept), "cpu", "float32", batch_size=4)
        assert {2, 6} <= set(kept[rows.ROW].to_pylist())  # one without caption, one without image
        assert predictor.check_golden() < 1e-5
        table = predictor.score_table([*damaged, replace(damaged[6], caption=None)])
        errors = table[rows.ERROR].to_pylist()
        assert [i for i, error in enumerate(errors) if error is not None] == [1, 3, 7, 12]
        assert errors[12] == "neither image nor caption"
        for i in (0, 2, 6, 11):
            alone = predictor.score_table([damaged[i]])
            np.testing.assert_allclose(
                probabilities(table)[i], probabilities(alone)[0], rtol=1e-4, atol=1e-5
            )
        whole = [pair(row) for row in (2, 6)]
        for i, as_pair in zip((2, 6), probabilities(predictor.score_table(whole)), strict=True):
            assert np.abs(probabilities(table)[i] - as_pair).max() > 1e-3

    def test_what_is_prepared_elsewhere_gives_the_same_scores(self, predictor: Predictor) -> None:
        samples = [pair(1), replace(pair(2), image=None), pair(3)]
        left, prepared = predictor.preprocessor.prepare_all(samples)
        bare = [replace(sample, image=None) for sample in left]
        again = predictor.score(bare, prepared)
        assert again.table == predictor.score_table(samples) and again.seconds_predict > 0


@pytest.fixture(scope="module")
def several(made: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle = replace(made, task="multilabel", golden=None)
    uri = str(tmp_path_factory.mktemp("several"))
    bundle.save(uri, golden=golden_table(bundle, [pair(row) for row in range(12)]))
    return bundles.load(uri)


class TestSeveralLabels:
    """A multilabel bundle gives each label by itself."""

    def test_probabilities_are_of_each_label_by_itself(self, several: Bundle) -> None:
        predictor = Predictor(several, "cpu", "float32")
        samples = [pair(row) for row in range(12)]
        scores = predictor.score_table(samples)
        inputs = collate([predictor.prepare(sample) for sample in samples])
        with torch.inference_mode():
            logits, _ = several.build_model()(inputs.pixels, inputs.tokens, inputs.mask)
        np.testing.assert_allclose(probabilities(scores), logits.sigmoid().numpy(), atol=1e-5)

    def test_the_label_is_all_that_are_probable(self, several: Bundle) -> None:
        scores = Predictor(several, "cpu").score_table([pair(row) for row in range(12)])
        assert scores.schema.equals(rows.scores_schema(several.labels))
        for row in scores.to_pylist():
            given = [label for label in several.labels if row[f"p_{label}"] >= 0.5]
            assert row["label"] == "|".join(given)

    def test_no_label_at_all_is_an_answer_and_no_error(self, several: Bundle) -> None:
        never = safetensors.torch.load(several.weights)
        bias = next(name for name in never if name.startswith("head") and name.endswith("bias"))
        never[bias] -= 100
        bundle = replace(several, weights=safetensors.torch.save(never), golden=None)
        bundle = replace(bundle, golden=golden_table(bundle, [pair(0), pair(1)]))
        predictor = Predictor(bundle, "cpu")
        predictor.check_golden()
        cut = replace(pair(1), image=b"no picture")
        (none, broken) = predictor.score_table([pair(0), cut]).to_pylist()
        assert none["label"] == "" and none["error"] is None
        assert broken["label"] is None and broken["error"] is not None

    def test_golden_pairs_hold(self, several: Bundle) -> None:
        assert Predictor(several, "cpu").check_golden() < 1e-3


class Faulty(nn.Module):
    """A model in front of which something goes wrong."""

    def __init__(self, model: nn.Module, fault: Callable[[torch.Tensor, Any], Any]) -> None:
        super().__init__()
        self.model, self.fault = model, fault

    def forward(self, pixels: torch.Tensor, *others: torch.Tensor | None) -> Any:
        return self.fault(pixels, lambda: self.model(pixels, *others))


WHITE = 250


def white(row: int) -> Sample:
    """A pair with a picture that ``is_white`` knows."""
    from io import BytesIO

    from PIL import Image

    sink = BytesIO()
    Image.new("RGB", (32, 32), "white").save(sink, "PNG")
    return replace(pair(row), image=sink.getvalue())


def is_white(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flatten(1).float().mean(1) > WHITE


class TestFaults:
    def test_only_the_row_that_breaks_the_model_is_set_aside(self, predictor: Predictor) -> None:
        samples = [white(row) if row == 5 else pair(row) for row in range(10)]
        expected = predictor.score_table(samples)

        def fault(pixels: torch.Tensor, run: Callable[[], Any]) -> Any:
            if is_white(pixels).any():
                raise ValueError("a row\nthat breaks")
            return run()

        predictor._model = Faulty(predictor._model, fault)  # type: ignore[assignment]
        table = predictor.score_table(samples)
        errors = table[rows.ERROR].to_pylist()
        assert errors[5] == "unexpected error: ValueError: a row that breaks"
        assert table[rows.ERROR_STAGE][5].as_py() == "predict"
        assert [i for i, error in enumerate(errors) if error] == [5]
        others = [i for i in range(10) if i != 5]
        np.testing.assert_allclose(
            probabilities(table)[others], probabilities(expected)[others], rtol=0, atol=1e-5
        )

    def test_a_score_that_is_no_number_is_an_error(self, predictor: Predictor) -> None:
        def fault(pixels: torch.Tensor, run: Callable[[], Any]) -> Any:
            logits, embedding = run()
            return logits.masked_fill(is_white(pixels)[:, None], torch.nan), embedding

        predictor._model = Faulty(predictor._model, fault)  # type: ignore[assignment]
        table = predictor.score_table([pair(0), white(1), pair(2)])
        assert table[rows.ERROR].to_pylist() == [None, "score not finite", None]
        assert table[rows.LABEL][1].as_py() is None

    def test_weights_that_are_no_numbers_score_no_row(self, made: Bundle) -> None:
        assert isinstance(Predictor(made, "cpu")._model.image, FusedEncoder) == packed.supported()
        weights = safetensors.torch.load(made.weights)
        weights["image.net.1.0.weight"].fill_(torch.nan)  # of a convolution
        broken = replace(made, weights=safetensors.torch.save(weights))
        table = Predictor(broken, "cpu").score_table([pair(0), pair(1)])
        assert table[rows.ERROR].to_pylist() == ["score not finite"] * 2

    def test_a_broken_device_is_no_rows_fault(self, predictor: Predictor) -> None:
        def fault(pixels: torch.Tensor, run: Callable[[], Any]) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

        predictor._model = Faulty(predictor._model, fault)  # type: ignore[assignment]
        with pytest.raises(RunError, match=r"the model fails on cpu whatever.*device-side assert"):
            predictor.score_table([pair(row) for row in range(10)])

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        ],
    )
    def test_short_memory_halves_the_batch_and_loses_no_row(
        self, predictor: Predictor, error: Exception
    ) -> None:
        samples = [pair(row) for row in range(10)]
        expected = predictor.score_table(samples)
        seen: list[int] = []

        def fault(pixels: torch.Tensor, run: Callable[[], Any]) -> Any:
            seen.append(len(pixels))
            if len(pixels) > 1:
                raise error
            return run()

        predictor._model = Faulty(predictor._model, fault)  # type: ignore[assignment]
        table = predictor.score_table(samples)
        assert table[rows.ERROR].null_count == 10
        np.testing.assert_allclose(probabilities(table), probabilities(expected), rtol=0, atol=1e-5)
        assert seen[:4] == [4, 2, 1, 1]

    def test_no_memory_for_one_row_stops_the_job(self, predictor: Predictor) -> None:
        def fault(pixels: torch.Tensor, run: Callable[[], Any]) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        predictor._model = Faulty(predictor._model, fault)  # type: ignore[assignment]
        with pytest.raises(RunError, match="no memory to score even one row"):
            predictor.score_table([pair(0), pair(1)])

    def test_a_surprise_while_preparing_is_that_rows(
        self, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pixels = predictor.preprocessor._pixels

        def surprise(sample: Sample) -> np.ndarray:
            if sample.row == 1:
                raise KeyError("who expected this")
            return pixels(sample)

        monkeypatch.setattr(predictor.preprocessor, "_pixels", surprise)
        table = predictor.score_table([pair(0), pair(1), pair(2)])
        assert table[rows.ERROR].to_pylist() == [
            None,
            "unexpected error: KeyError: 'who expected this'",
            None,
        ]
        with pytest.raises(BadRow, match="unexpected error: KeyError"):
            predictor.prepare(pair(1))

    def test_a_device_that_is_not_there(self, made: Bundle) -> None:
        with pytest.raises(ConfigError, match="device: got 'gpu'; allowed: auto, cpu"):
            Predictor(made, "gpu")
        if not torch.cuda.is_available():
            with pytest.raises(ConfigError, match="torch finds no GPU here"):
                Predictor(made, "cuda")


@pytest.fixture
def other_preprocessing(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        decode, clean = preprocess.decode_image, preprocess.text.clean_text
        if request.param == "channels swapped":
            patch.setattr(
                preprocess,
                "decode_image",
                lambda data, cfg: np.ascontiguousarray(decode(data, cfg)[::-1]),
            )
        if request.param == "mirrored":
            patch.setattr(
                preprocess,
                "decode_image",
                lambda data, cfg: np.ascontiguousarray(decode(data, cfg)[..., ::-1]),
            )
        if request.param == "captions uncleaned":
            patch.setattr(preprocess.text, "clean_text", lambda text, *_, **__: text)
        if request.param == "captions in capitals":
            patch.setattr(
                preprocess.text, "clean_text", lambda text, *a, **k: clean(text, *a, **k).upper()
            )
        yield


class TestGolden:
    def test_a_bundle_scores_in_what_it_was_trained_in_wherever_it_is(self, made: Bundle) -> None:
        """So that figures of the training hold in a batch job and online."""
        for trained in ("bf16", "float32"):
            train = made.training.train.model_copy(update={"precision": trained})
            bundle = replace(made, training=made.training.model_copy(update={"train": train}))
            assert Predictor(bundle, "cpu").precision == trained
            assert Predictor(bundle, "cpu", "float32").precision == "float32"

    def test_a_sound_bundle_passes_in_every_precision(self, made: Bundle) -> None:
        assert Predictor(made, "cpu", "float32").check_golden() <= 1e-5
        assert made.golden is not None
        assert 0 < Predictor(made, "cpu", "bf16").check_golden() <= golden.tolerance(made.golden)

    @pytest.mark.parametrize(
        "other_preprocessing",
        ["channels swapped", "mirrored", "captions uncleaned", "captions in capitals"],
        indirect=True,
    )
    @pytest.mark.usefixtures("other_preprocessing")
    def test_another_preprocessing_is_refused(self, made: Bundle) -> None:
        with pytest.raises(BundleError, match=r"golden pair 00000\.tar row \d+ must give p_autumn"):
            Predictor(made, "cpu", "float32").check_golden()

    def test_other_weights_are_refused(self, made: Bundle) -> None:
        predictor = Predictor(made, "cpu", "float32")
        with torch.no_grad():
            for parameter in predictor._model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        with pytest.raises(BundleError, match="gives other scores than its own"):
            predictor.check_golden()

    def test_a_model_that_scores_nan_is_refused(self, made: Bundle) -> None:
        predictor = Predictor(made, "cpu", "float32")
        with torch.no_grad():
            next(iter(predictor._model.head.parameters())).fill_(torch.nan)
        with pytest.raises(BundleError, match="it gives the error 'score not finite'"):
            predictor.check_golden()

    def test_a_picture_that_was_set_aside_must_stay_so(
        self, made: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode = preprocess.decode_image
        monkeypatch.setattr(
            preprocess,
            "decode_image",
            lambda data, cfg: (
                np.zeros((3, 32, 32), np.uint8) if data == b"no picture" else decode(data, cfg)
            ),
        )
        with pytest.raises(BundleError, match=r"row 99 must give the error .image not recog"):
            Predictor(made, "cpu", "float32").check_golden()

    def test_a_bundle_of_pairs_that_cannot_be_scored_is_not_made(self, made: Bundle) -> None:
        with pytest.raises(BundleError, match="none of 1 samples can be scored: no image"):
            golden_table(made, [replace(pair(0), image=None)])


def in_doubt(bundle: Bundle, limit: float) -> Bundle:
    """The bundle in bfloat16, with another limit of what leaves a label in doubt."""
    train = bundle.training.train.model_copy(update={"precision": "bf16"})
    assert bundle.golden is not None
    noted = {golden.TOLERANCE: str(golden.tolerance(bundle.golden)), golden.DOUBT: str(limit)}
    return replace(
        bundle,
        training=bundle.training.model_copy(update={"train": train}),
        golden=bundle.golden.replace_schema_metadata(noted),
    )


class TestDoubt:
    def test_rows_in_doubt_have_the_scores_of_float32_and_all_others_their_own(
        self, made: Bundle
    ) -> None:
        samples = [pair(row) for row in range(40)]
        exact, rough = (
            Predictor(made, "cpu", precision, decide=False).score_table(samples, embeddings=True)
            for precision in ("float32", "bf16")
        )
        scores = probabilities(rough)
        close = np.sort(doubt.closeness(scores, several=False))
        limit = float(close[10] + close[11]) / 2
        scored = Predictor(in_doubt(made, limit), "cpu").score(samples, embeddings=True)
        assert scored.decided == 11
        decided = doubt.closeness(scores, several=False) < limit
        for column in scored.table.column_names:
            if column.startswith("p_"):
                got = scored.table[column].to_numpy()
                np.testing.assert_array_equal(got[~decided], rough[column].to_numpy()[~decided])
                near = exact[column].to_numpy()[decided]
                np.testing.assert_allclose(got[decided], near, rtol=0, atol=1e-6)
        labels = scored.table[rows.LABEL].to_numpy(zero_copy_only=False)
        wanted = exact[rows.LABEL].to_numpy(zero_copy_only=False)
        assert (labels[decided] == wanted[decided]).all()
        vectors = [np.stack(t[rows.EMBEDDING].to_pylist()) for t in (scored.table, exact)]
        np.testing.assert_allclose(vectors[0][decided], vectors[1][decided], rtol=0, atol=1e-2)

    def test_both_ways_to_score_decide(self, made: Bundle) -> None:
        predictor = Predictor(in_doubt(made, 100.0), "cpu")
        samples = [pair(row) for row in range(8)]
        scored = predictor.score(samples)
        assert scored.decided == 8
        alone = predictor.forward([predictor.prepare(sample) for sample in samples])
        np.testing.assert_array_equal(alone.probabilities, probabilities(scored.table))

    @pytest.mark.parametrize("limit", [0.0, 1e-9])
    def test_no_second_model_is_built_before_it_is_needed(
        self, made: Bundle, limit: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        predictor = Predictor(in_doubt(made, limit), "cpu")
        monkeypatch.setattr(Bundle, "build_model", lambda bundle: pytest.fail("built"))
        assert predictor.score([pair(row) for row in range(8)]).decided == 0

    def test_in_float32_nothing_is_in_doubt(self, made: Bundle) -> None:
        bundle = in_doubt(made, 100.0)
        assert Predictor(bundle, "cpu", "float32").score([pair(0)]).decided == 0

    def test_a_bundle_says_what_bfloat16_leaves_in_doubt(self, made: Bundle) -> None:
        assert 0 < golden.doubt_limit(made.golden) < 1

    def test_of_a_bundle_that_does_not_say_nothing_is_in_doubt(self, made: Bundle) -> None:
        bundle = in_doubt(made, 0.0)
        assert bundle.golden is not None
        noted = {golden.TOLERANCE: bundle.golden.schema.metadata[golden.TOLERANCE]}
        older = replace(bundle, golden=bundle.golden.replace_schema_metadata(noted))
        assert Predictor(older, "cpu").score([pair(row) for row in range(8)]).decided == 0
