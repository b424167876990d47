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

from mmray import cli, golden, storage
from mmray.archive import shards
from mmray.archive.rows import Sample
from mmray.bundle import MANIFEST, RANGES, Bundle, load
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
        assert quantized.golden == floats.golden, "and what they must give, within what tolerance"
        assert golden.tolerance(quantized.golden) == golden.tolerance(floats.golden)
        noted = [golden.doubt_limit(predictor.golden) for predictor in (quantized, floats)]
        assert min(noted) > 0 and noted[0] != noted[1], "what 8 bits leave in doubt is its own"
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
        assert load(uri).int8 == made[1].int8 is not None
        assert made[0].golden is not None
        made[0].save(uri, golden=made[0].golden)
        assert load(uri).int8 is None, "nothing is left of the one that was there"

    def test_pairs_unlike_the_golden_ones_are_refused(self, tmp_path: Path) -> None:
        uri = tiny.bundle(str(tmp_path / "floats"), sharp=30.0)
        grey = io.BytesIO()  # of the mean colour: nothing is seen in it
        Image.new("RGB", (48, 48), (124, 116, 104)).save(grey, "PNG")
        files = ((".png", grey.getvalue()), (".txt", b"a sea"))
        members = [(f"{i}{ending}", data) for i in range(8) for ending, data in files]
        tiny.write_tar(tmp_path / "grey" / "0.tar", members)
        with pytest.raises(
            BundleError, match=r"does not bear 8 bits .*grey: golden pair .*--pairs"
        ):
            quantize(uri, str(tmp_path / "grey"), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_rows_come_from_all_over_the_archive_and_those_set_aside_are_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        uri = tiny.bundle(str(tmp_path / "floats"))
        tiny.write_archive(tmp_path / "a", [4] * 31)
        tiny.write_tar(tmp_path / "a" / "00000.tar", [("x.jpg", b""), ("x.txt", b"a sea")])
        read: list[str] = []
        plain = shards.read_shard
        monkeypatch.setattr(
            shards,
            "read_shard",
            lambda root, shard, **k: read.append(shard.path) or plain(root, shard, **k),
        )
        found = quantize(uri, str(tmp_path / "a"), str(tmp_path / "out"), pairs=32)
        assert len(read) == 16 and read[0] == "00000.tar" and read[-1] >= "00028.tar"
        assert found.set_aside == 1 and found.rows == (32 - 1) // 2

    def test_where_pictures_may_be_missing_those_that_are_there_are_looked_at(
        self, tmp_path: Path
    ) -> None:
        uri = tiny.bundle(str(tmp_path / "floats"), missing=True)
        pairs = [(f"{i}.txt", b"a sea") for i in range(4)]
        tiny.write_tar(tmp_path / "a" / "0.tar", [*pairs, *tiny.members(16, 50)])
        found = quantize(uri, str(tmp_path / "a"), str(tmp_path / "int8"), pairs=20)
        assert found.set_aside == 0 and found.rows == 10
        assert found.after.most_difference < 0.02
        assert load(found.out).metrics["quantized"]["of"] == load(uri).fingerprint

    def test_what_cannot_be_is_refused_before_it_costs(
        self, made: tuple[Bundle, Bundle], tmp_path: Path, archive: str
    ) -> None:
        assert made[1].golden is not None
        made[1].save(str(tmp_path / "int8"), golden=made[1].golden)
        floats = tiny.bundle(str(tmp_path / "floats"))
        text = tiny.bundle(str(tmp_path / "text"), modalities="text")
        tiny.write_tar(tmp_path / "broken" / "0.tar", [("0.jpg", b""), ("0.txt", b"a sea")])
        (tmp_path / "empty").mkdir()
        for uri, pairs, out, words in (
            (str(tmp_path / "int8"), archive, "out", "quantized already"),
            (text, archive, "out", "no convolution"),
            (floats, str(tmp_path / "broken"), "out", "0 of 1 pairs .* the first: image empty"),
            (floats, str(tmp_path / "empty"), "out", "no shards"),
            (floats, archive, "floats", "is the bundle itself"),
        ):
            with pytest.raises(ConfigError, match=words):
                quantize(uri, pairs, str(tmp_path / out))
        assert load(floats).int8 is None and not (tmp_path / "out").exists()


def test_a_cpu_without_8_bits_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "supported", lambda: False)
    uri = tiny.bundle(str(tmp_path / "floats"))
    with pytest.raises(ConfigError, match="does not multiply 8-bit integers"):
        quantize(uri, "nowhere", str(tmp_path / "out"))


@needs_int8
@pytest.mark.parametrize("damage", ["edited", "gone"])
def test_damaged_ranges_are_named(made: tuple[Bundle, Bundle], tmp_path: Path, damage: str) -> None:
    assert made[1].golden is not None
    made[1].save(str(tmp_path / "b"), golden=made[1].golden)
    path = tmp_path / "b" / RANGES
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("0.0", "0.1"))
    with pytest.raises(BundleError, match=RANGES):
        load(str(tmp_path / "b"))


@needs_int8
@pytest.mark.parametrize(
    "text",
    ["[1]", "{", '{"1.0": [0, NaN]}', '{"1.0": [1, 2]}', '{"1.0": [0, 1e300]}', '{"no": [0, 1]}'],
)
def test_ranges_that_are_none_are_refused_by_whoever_loads_them(
    made: tuple[Bundle, Bundle], tmp_path: Path, text: str
) -> None:
    """Written by somebody who also mended the manifest."""
    assert made[1].golden is not None
    replace(made[1], int8=text).save(str(tmp_path / "b"), golden=made[1].golden)
    with pytest.raises(BundleError, match=r"int8\.json|ranges of 'no'"):
        Predictor(load(str(tmp_path / "b")), "cpu")


def test_a_bundle_that_was_never_quantized_keeps_its_fingerprint(tmp_path: Path) -> None:
    uri = tiny.bundle(str(tmp_path / "floats"))
    bundle = load(uri)
    assert bundle.fingerprint == replace(bundle, int8=None).fingerprint
    assert RANGES not in json.loads((tmp_path / "floats" / MANIFEST).read_text())["files"]
    assert replace(bundle, int8="{}").fingerprint != bundle.fingerprint
