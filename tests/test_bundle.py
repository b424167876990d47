"""Without these a model could score with another one's weights, words or labels, unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import safetensors.torch
import tiny
import torch
from conftest import Endpoint

from mmray import bundle as bundles
from mmray import golden, storage
from mmray.bundle import GOLDEN, MANIFEST, TOKENIZER, WEIGHTS, Bundle
from mmray.config import Model, Train
from mmray.errors import BundleError, StorageError
from mmray.predict import Predictor
from mmray.preprocess import TextTokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.load(tiny.bundle(str(tmp_path_factory.mktemp("bundle"))))


@pytest.fixture
def saved(made: Bundle, tmp_path: Path) -> Path:
    assert made.golden is not None
    made.save(str(tmp_path / "bundle"), golden=made.golden)
    return tmp_path / "bundle"


def remade(made: Bundle, **changes: Any) -> Bundle:
    """What ``make`` gives for the same parts, some of them changed."""
    assert made.tokenizer is not None
    parts: dict[str, Any] = {
        "labels": made.labels,
        "spec": made.spec,
        "preprocess": made.preprocess,
        "state_dict": made.build_model().state_dict(),
        "tokenizer": TextTokenizer.from_json(made.tokenizer, made.preprocess.text),
        "metrics": made.metrics,
        "training": made.training,
    }
    return bundles.make(**(parts | changes))


class TestSaveAndLoad:
    def test_everything_comes_back(self, made: Bundle, saved: Path) -> None:
        loaded = bundles.load(str(saved))
        assert loaded.fingerprint == made.fingerprint
        assert replace(loaded, golden=None) == replace(made, golden=None)
        assert loaded.golden is not None and loaded.golden.equals(made.golden)
        state, same = made.build_model().state_dict(), loaded.build_model().state_dict()
        assert state.keys() == same.keys()
        assert all(torch.equal(state[name], same[name]) for name in state)

    def test_keys_that_came_later_leave_the_fingerprints_of_older_bundles_alone(self) -> None:
        spec = Model().model_dump(mode="json")
        assert list(spec) == ["modalities", "image", "text", "fusion", "hidden", "dropout"]
        assert list(spec["image"]) == ["encoder", "weights", "normalize", "width", "freeze"]
        assert list(spec["text"]) == ["encoder", "dim", "layers", "heads", "freeze"]
        assert Model(missing=True).model_dump()["missing"] is True  # said where it says something
        assert "modality_dropout" not in Train().model_dump()

    def test_the_model_is_ready_to_predict(self, made: Bundle) -> None:
        assert not made.build_model().training

    def test_s3_and_back(self, made: Bundle, s3_endpoint: Endpoint) -> None:
        uri = storage.join(s3_endpoint.bucket(), "models", "one")
        assert made.golden is not None
        made.save(uri, golden=made.golden)
        assert {item.path for item in storage.list_objects(uri)} == {
            *(MANIFEST, WEIGHTS, TOKENIZER, GOLDEN)
        }
        assert bundles.load(uri).fingerprint == made.fingerprint
        storage.delete(storage.join(uri, WEIGHTS))
        with pytest.raises(BundleError, match=r"model\.safetensors: missing"):
            bundles.load(uri)

    def test_manifest_says_what_a_person_asks_first(self, made: Bundle, saved: Path) -> None:
        tree = json.loads((saved / MANIFEST).read_bytes())
        assert tree["labels"] == list(tiny.LABELS)
        assert (tree["task"], tree["fingerprint"]) == ("classify", made.fingerprint)
        assert tree["training"]["data"]["label"] == "label"
        assert tree["golden"]["rows"] == 4
        assert {"mmray", "torch", "pillow"} <= tree["versions"].keys()

    def test_reading_the_manifest_needs_no_torch(self, saved: Path) -> None:
        code = (
            "import sys; from mmray.bundle import read_manifest;"
            f"print(read_manifest({str(saved)!r}).embedding_dim, 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["16", "False"], done.stderr

    def test_save_over_another_bundle(self, made: Bundle, saved: Path) -> None:
        from mmray.config import Model

        spec = made.spec.model_copy(
            update={"config": Model(modalities="image", hidden=16), "vocab_size": None}
        )
        from mmray.archive.rows import Sample
        from mmray.model import build_model
        from mmray.predict import golden_table

        images = remade(made, spec=spec, state_dict=build_model(spec).state_dict(), tokenizer=None)
        samples = [Sample("golden", 0, "0", tiny.jpeg(0))]
        images.save(str(saved), golden=golden_table(images, samples))
        assert not (saved / TOKENIZER).exists()
        assert bundles.load(str(saved)).fingerprint == images.fingerprint != made.fingerprint


class TestCrash:
    @pytest.mark.parametrize("writes", range(4))
    def test_a_save_that_dies_leaves_no_bundle(
        self, made: Bundle, saved: Path, writes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[str] = []
        write = storage.write_bytes

        def die(uri: str, data: bytes) -> None:
            if len(done) == writes:
                raise StorageError("disk full")
            done.append(uri)
            write(uri, data)

        other = replace(made, labels=("other", "names"))
        table = tiny_golden(other)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", die)
            with pytest.raises(StorageError):
                other.save(str(saved), golden=table)
        with pytest.raises(BundleError, match="no bundle here, or one that was not finished"):
            bundles.load(str(saved))
        other.save(str(saved), golden=table)
        assert bundles.load(str(saved)).labels == other.labels


def tiny_golden(bundle: Bundle) -> pa.Table:
    """The golden table of a bundle that only has other labels."""
    assert bundle.golden is not None
    metadata = bundle.golden.schema.metadata
    return pa.table(
        bundle.golden.columns, schema=golden.schema(bundle.labels).with_metadata(metadata)
    )


class TestFingerprint:
    def test_it_is_of_content_not_of_layout(self, made: Bundle) -> None:
        state = made.build_model().state_dict()
        turned = {name: state[name] for name in reversed(state)}
        turned = {
            name: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t
            for name, t in turned.items()
        }
        assert remade(made, state_dict=turned).fingerprint == made.fingerprint

    def test_it_does_not_depend_on_where_the_data_lay(self, made: Bundle) -> None:
        training = made.training.model_copy(update={"seed": 9})
        assert remade(made, training=training, metrics={"x": 1}).fingerprint == made.fingerprint

    def test_whatever_changes_scores_changes_it(self, made: Bundle) -> None:
        assert made.tokenizer is not None
        state = made.build_model().state_dict()
        name = next(name for name, tensor in state.items() if tensor.is_floating_point())
        nudged = {**state, name: state[name] + 1e-6}
        crop = made.preprocess.image.model_copy(update={"resize": "crop"})
        words = json.loads(made.tokenizer)
        words["added_tokens"][0]["normalized"] ^= True
        others = [
            remade(made, labels=made.labels[::-1]),
            remade(made, state_dict=nudged),
            remade(made, preprocess=made.preprocess.model_copy(update={"image": crop})),
            replace(made, tokenizer=json.dumps(words)),
            remade(made, spec=made.spec.model_copy(update={"pad_id": 1})),
        ]
        assert len({made.fingerprint, *(other.fingerprint for other in others)}) == 6


def edit_json(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tree = json.loads(path.read_bytes())
        change(tree)
        path.write_text(json.dumps(tree))

    return edit


def nudge_weights(path: Path) -> None:
    state = safetensors.torch.load_file(path)
    name = min(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name].view(-1)[0] += 1e-6
    safetensors.torch.save_file(state, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


class TestTampering:
    @pytest.mark.parametrize(
        ("name", "edit"),
        [
            (WEIGHTS, nudge_weights),
            (WEIGHTS, truncate),
            (TOKENIZER, edit_json(lambda tree: tree["model"]["vocab"].popitem())),
            (GOLDEN, truncate),
            (MANIFEST, edit_json(lambda tree: tree["labels"].reverse())),
            (MANIFEST, edit_json(lambda tree: tree["preprocess"]["image"].update(resize="crop"))),
            (MANIFEST, edit_json(lambda tree: tree["preprocess"]["text"].update(urls="drop"))),
            (MANIFEST, edit_json(lambda tree: tree["spec"].update(pad_id=1))),
            (MANIFEST, edit_json(lambda tree: tree.update(fingerprint="0" * 64))),
            (MANIFEST, edit_json(lambda tree: tree["files"].update({WEIGHTS: "0" * 64}))),
        ],
    )
    def test_a_changed_file_is_named(
        self, saved: Path, name: str, edit: Callable[[Path], None]
    ) -> None:
        edit(saved / name)
        with pytest.raises(BundleError, match=f"{name}: (not the file|changed)"):
            bundles.load(str(saved))

    @pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, GOLDEN])
    def test_a_missing_file_is_named(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        with pytest.raises(BundleError, match=f"{name}: missing"):
            bundles.load(str(saved))

    def test_weights_of_another_bundle(self, saved: Path, tmp_path: Path) -> None:
        tiny.bundle(str(tmp_path / "other"), seed=1)
        (saved / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
        with pytest.raises(BundleError, match=f"{WEIGHTS}: not the file"):
            bundles.load(str(saved))


class TestTasks:
    def test_the_task_is_part_of_what_a_bundle_is(self, made: Bundle, tmp_path: Path) -> None:
        """The same weights mean other scores."""
        assert made.golden is not None
        prints = {made.fingerprint}
        for task in ("multilabel", "match"):
            other = remade(made, task=task)
            other.save(str(tmp_path / task), golden=made.golden)
            loaded = bundles.load(str(tmp_path / task))
            assert loaded.task == task and loaded.fingerprint == other.fingerprint
            prints.add(loaded.fingerprint)
        data = made.training.data.model_copy(update={"label_separator": ";"})
        training = made.training.model_copy(update={"data": data})
        prints.add(remade(made, task="multilabel", training=training).fingerprint)
        assert len(prints) == 4
        # a classifier's labels are not joined
        assert remade(made, training=training).fingerprint == made.fingerprint

    def test_a_bundle_from_before_there_were_tasks_stays_itself(
        self, made: Bundle, saved: Path
    ) -> None:
        def without_new_keys(tree: dict[str, Any]) -> None:
            for name in ("label_separator", "negatives_within"):
                del tree["training"]["data"][name]
            for name in ("focal_gamma", "negatives"):
                del tree["training"]["train"][name]

        edit_json(without_new_keys)(saved / MANIFEST)
        loaded = bundles.load(str(saved))
        assert (loaded.task, loaded.fingerprint) == ("classify", made.fingerprint)


class TestRefusal:
    def test_no_bundle_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="no bundle here"):
            bundles.load(str(tmp_path / "nothing"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": 2}, "format version 2; this mmray reads 1"),
            ({"surprise": 1}, "surprise: unknown key"),
            ({"task": "rank"}, "task: got 'rank'"),
            ({"labels": ["a"]}, "labels.*two or more different names"),
            ({"files": {"../../etc/passwd": "0" * 64}}, "files.*must be model"),
        ],
    )
    def test_what_this_version_does_not_understand(
        self, saved: Path, change: dict[str, Any], message: str
    ) -> None:
        edit_json(lambda tree: tree.update(change))(saved / MANIFEST)
        with pytest.raises(BundleError, match=message):
            bundles.read_manifest(str(saved))

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
    def test_a_manifest_that_is_none(self, saved: Path, content: bytes) -> None:
        (saved / MANIFEST).write_bytes(content)
        with pytest.raises(BundleError, match=MANIFEST):
            bundles.read_manifest(str(saved))

    def test_another_preprocessing_version(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bundles, "PREPROCESS_VERSION", 99)
        with pytest.raises(BundleError, match="made with preprocessing 1, this mmray has 99"):
            bundles.load(str(saved))

    def test_weights_that_do_not_fit(self, made: Bundle) -> None:
        state = made.build_model().state_dict()
        state.popitem()
        with pytest.raises(BundleError, match="does not fit the model"):
            Predictor(remade(made, state_dict=state))
