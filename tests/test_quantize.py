"""Without these a bundle in 8 bits could score otherwise than it was measured to, or than another
machine's."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from mmray import cli, storage
from mmray.archive import shards
from mmray.archive.rows import Sample
from mmray.bundle import RANGES, Bundle, load
from mmray.errors import BundleError, ConfigError
from mmray.model import int8
from mmray.predict import Predictor
from mmray.quantize import quantize

needs_int8 = pytest.mark.skipif(
    not int8.supported(), reason="this CPU does not multiply 8-bit integers"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_archive(tmp_path_factory.mktemp("archive"), [20, 20, 20]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, archive: str) -> tuple[Bundle, Bundle]:
    """A bundle, and what ``quantize`` makes of it."""
    root = tmp_path_factory.mktemp("bundles")
    uri = tiny.bundle(str(root / "floats"), sharp=30.0)
    quantize(uri, archive, str(root / "int8"), pairs=40)
    return load(uri), load(str(root / "int8"))


def samples(archive: str) -> list[Sample]:
    return [
        item
        for shard in shards.list_shards(archive)
        for item in shards.read_shard(archive, shard)
        if isinstance(item, Sample)
    ]


def scores(predictor: Predictor, archive: str) -> Any:
    table = predictor.score_table(samples(archive))
    return np.stack([table[f"p_{label}"].to_numpy() for label in tiny.LABELS], axis=1)


@needs_int8
class TestQuantize:
    def test_it_scores_in_8_bits_almost_as_before(
        self, made: tuple[Bundle, Bundle], archive: str
    ) -> None:
        floats, quantized = (Predictor(bundle, "cpu") for bundle in made)
        assert quantized.int8 and not floats.int8
        assert quantized.fingerprint != floats.fingerprint
        assert quantized.check_golden() > floats.check_golden()
        before, after = scores(floats, archive), scores(quantized, archive)
        assert before.std() > 0.02, "or nothing could be told"
        assert 0 < np.abs(before - after).max() < 0.02

    def test_the_same_row_scores_the_same_in_any_company(
        self, made: tuple[Bundle, Bundle], archive: str
    ) -> None:
        predictor = Predictor(made[1], "cpu")
        some = samples(archive)[:9]
        together = predictor.score_table(some)["p_calm"].to_numpy()
        alone = [predictor.score_table([sample])["p_calm"].to_numpy()[0] for sample in some]
        np.testing.assert_allclose(together, alone, atol=1e-5)

    def test_asked_for_another_precision_it_is_the_bundle_it_was(
        self, made: tuple[Bundle, Bundle], archive: str
    ) -> None:
        floats, quantized = (Predictor(bundle, "cpu", "float32") for bundle in made)
        assert np.array_equal(scores(floats, archive), scores(quantized, archive))

    def test_a_cpu_without_8_bits_scores_as_before(
        self, made: tuple[Bundle, Bundle], archive: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(int8, "supported", lambda: False)
        floats, quantized = (Predictor(bundle, "cpu") for bundle in made)
        assert np.array_equal(scores(floats, archive), scores(quantized, archive))
        quantized.check_golden()

    def test_the_command_says_what_it_did(
        self, tmp_path: Path, archive: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        uri = tiny.bundle(str(tmp_path / "floats"))
        line = ["quantize", uri, archive, "--out", str(tmp_path / "int8"), "--pairs", "20"]
        assert cli.run([*line, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["fingerprint"] == load(said["out"]).fingerprint
        assert said["rows"] == 10 and said["convolutions"] == 3
        assert said["after"]["labels_changed"] <= said["rows"]
        assert cli.run(line) == 0
        assert "float32 with int8" in capsys.readouterr().out

    def test_s3_and_back(self, made: tuple[Bundle, Bundle], s3_endpoint: Any) -> None:
        uri = storage.join(s3_endpoint.bucket(), "model")
        assert made[1].golden is not None
        made[1].save(uri, golden=made[1].golden)
        assert load(uri).ranges == made[1].ranges
        assert made[0].golden is not None
        made[0].save(uri, golden=made[0].golden)
        assert load(uri).ranges is None, "nothing is left of the one that was there"

    def test_pairs_unlike_the_golden_ones_are_refused(self, tmp_path: Path) -> None:
        uri = tiny.bundle(str(tmp_path / "floats"), sharp=30.0)
        grey = io.BytesIO()  # of the mean colour: nothing is seen in it
        Image.new("RGB", (48, 48), (124, 116, 104)).save(grey, "PNG")
        files = ((".png", grey.getvalue()), (".txt", b"a sea"))
        members = [(f"{i}{ending}", data) for i in range(8) for ending, data in files]
        tiny.write_tar(tmp_path / "grey" / "0.tar", members)
        with pytest.raises(BundleError, match=r"does not bear 8 bits: .* int8 .*golden pair"):
            quantize(uri, str(tmp_path / "grey"), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_what_cannot_be_is_refused_before_it_costs(
        self, made: tuple[Bundle, Bundle], tmp_path: Path, archive: str
    ) -> None:
        assert made[1].golden is not None
        made[1].save(str(tmp_path / "int8"), golden=made[1].golden)
        with pytest.raises(ConfigError, match="quantized already"):
            quantize(str(tmp_path / "int8"), archive, str(tmp_path / "out"))
        text = tiny.bundle(str(tmp_path / "text"), modalities="text")
        with pytest.raises(ConfigError, match="no convolution"):
            quantize(text, archive, str(tmp_path / "out"))
        floats = tiny.bundle(str(tmp_path / "floats"))
        tiny.write_tar(tmp_path / "broken" / "0.tar", [("0.jpg", b""), ("0.txt", b"a sea")])
        with pytest.raises(ConfigError, match="too few pairs"):
            quantize(floats, str(tmp_path / "broken"), str(tmp_path / "out"))


def test_a_cpu_without_8_bits_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "supported", lambda: False)
    uri = tiny.bundle(str(tmp_path / "floats"))
    with pytest.raises(ConfigError, match="does not multiply 8-bit integers"):
        quantize(uri, "nowhere", str(tmp_path / "out"))


@needs_int8
@pytest.mark.parametrize("damage", ["edited", "nonsense", "gone"])
def test_damaged_ranges_are_named(made: tuple[Bundle, Bundle], tmp_path: Path, damage: str) -> None:
    assert made[1].golden is not None
    made[1].save(str(tmp_path / "b"), golden=made[1].golden)
    path = tmp_path / "b" / RANGES
    if damage == "gone":
        path.unlink()
    elif damage == "edited":
        path.write_text(path.read_text().replace("0.0", "0.1"))
    else:
        path.write_text("[1]")
    with pytest.raises(BundleError, match=RANGES.replace(".", r"\.")):
        load(str(tmp_path / "b"))


@needs_int8
def test_ranges_that_are_no_numbers_are_refused(
    made: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    """By somebody who also mended the manifest."""
    bundle = replace(made[1], ranges={"net": (0.0, float("nan"))})
    assert made[1].golden is not None
    bundle.save(str(tmp_path / "b"), golden=made[1].golden)
    with pytest.raises(BundleError, match="not the ranges"):
        load(str(tmp_path / "b"))
