"""Without these a wrong or half-matching weight file would train from noise, unnoticed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from mmray.config import ImageModel, Model, TextModel
from mmray.errors import ConfigError
from mmray.model import FusionModel, build_model, load_pretrained, make_spec, weights

SHARED = Path(__file__).resolve().parents[2] / "shared"


def model_with(path: Path | str | None, **fields: object) -> tuple[FusionModel, Model]:
    cfg = Model(
        modalities="image",
        image=ImageModel.model_validate(
            {"encoder": "mobilenet_v2", "width": 0.35, "weights": path and str(path)} | fields
        ),
    )
    spec = make_spec(cfg, num_classes=3, vocab_size=None, pad_id=0, max_tokens=8, image_size=32)
    return build_model(spec), cfg


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    state: dict[str, torch.Tensor] = models.mobilenet_v2(width_mult=0.35).state_dict()
    return state


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def features_only(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_local_file_loads_whole_or_features_only(
    source: dict[str, torch.Tensor], tmp_path: Path, suffix: str, whole: bool
) -> None:
    path = write(tmp_path / f"w{suffix}", source if whole else features_only(source))
    model, cfg = model_with(path)
    load_pretrained(model, cfg)
    assert model.image is not None
    loaded = model.image.state_dict()
    assert len(loaded) == 312
    for key, value in loaded.items():
        assert torch.equal(value, source[key.removeprefix("net.")]), key


def test_a_file_that_does_not_fit_names_the_first_keys(
    source: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    lacking = {k: v for k, v in source.items() if k != "features.3.conv.0.0.weight"}
    path = write(tmp_path / "lacking.safetensors", lacking)
    model, cfg = model_with(path)
    with pytest.raises(ConfigError, match=r"missing features\.3\.conv\.0\.0\.weight$"):
        load_pretrained(model, cfg)

    path = write(tmp_path / "more.safetensors", source | {"features.99.x": torch.zeros(1)})
    model, cfg = model_with(path)
    with pytest.raises(ConfigError, match=r"unknown features\.99\.x"):
        load_pretrained(model, cfg)

    path = write(tmp_path / "narrow.safetensors", features_only(source))
    model, cfg = model_with(path, width=1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"width 1: features\.0\.0\.weight has shape \[16, 3"):
        load_pretrained(model, cfg)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    path = write(tmp_path / "other.safetensors", models.resnet18(weights=None).state_dict())
    model, cfg = model_with(path)
    with pytest.raises(ConfigError, match=r"missing features\.0\.0\.weight.* and \d+ more"):
        load_pretrained(model, cfg)


def test_a_resnet_file_with_and_without_its_classifier(tmp_path: Path) -> None:
    state = models.resnet18(weights=None).state_dict()
    for name, tensors in {
        "whole": state,
        "cut": {k: v for k, v in state.items() if not k.startswith("fc.")},
    }.items():
        path = write(tmp_path / f"{name}.safetensors", tensors)
        model, cfg = model_with(path, encoder="resnet18", width=1.0)
        load_pretrained(model, cfg)
        assert model.image is not None
        got = model.image.state_dict()["net.layer4.1.conv2.weight"]
        assert torch.equal(got, state["layer4.1.conv2.weight"])


def test_a_file_from_before_batch_norm_counted_its_batches(
    source: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    old = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    model, cfg = model_with(write(tmp_path / "old.safetensors", old))
    load_pretrained(model, cfg)
    assert model.image is not None
    got = model.image.state_dict()["net.features.18.1.running_var"]
    assert torch.equal(got, source["features.18.1.running_var"])


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    path = tmp_path / "evil.pt"
    torch.save({"x": Payload()}, path)
    model, cfg = model_with(path)
    with pytest.raises(ConfigError, match=r"evil\.pt: not readable"):
        load_pretrained(model, cfg)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ConfigError, match=r"not readable|no state dict"):
        load_pretrained(model, cfg)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.safetensors", "no such file"),
        ("dir/weights.bin", "ends in .safetensors, .pt, .pth"),
        ("IMAGENET1K_V9", "MobileNet_V2_Weights.IMAGENET1K_V1"),
        ("ResNet18_Weights.IMAGENET1K_V1", "allowed for mobilenet_v2"),
    ],
)
def test_weights_that_are_not_there_are_refused_before_anything_is_built(
    name: str, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        model_with(name)
    assert "model.image.weights" in str(error.value)
    assert words in str(error.value)


def test_enum_names_need_the_normalisation_they_were_trained_with() -> None:
    for name in ("IMAGENET1K_V1", "MobileNet_V2_Weights.IMAGENET1K_V2"):
        weights.check(ImageModel(encoder="mobilenet_v2", weights=name))
    with pytest.raises(ConfigError, match=r"model\.image\.normalize: got 'unit'.*imagenet"):
        weights.check(ImageModel(encoder="mobilenet_v2", weights="DEFAULT", normalize="unit"))
    with pytest.raises(ConfigError, match=r"model\.image\.normalize.*symmetric"):
        weights.check(ImageModel(encoder="efficientnet_v2_l", weights="DEFAULT"))
    with pytest.raises(ConfigError, match="torchvision has none for 'small_cnn'"):
        weights.check(ImageModel(encoder="small_cnn", weights="DEFAULT"))
    with pytest.raises(ConfigError, match=r"model\.image\.width"):
        weights.check(ImageModel(encoder="mobilenet_v2", weights="DEFAULT", width=0.5))


def test_enum_weights_are_downloaded_with_a_checked_hash_and_without_unpickling(
    source: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = models.mobilenet_v2(weights=None).state_dict()
    asked: list[dict[str, object]] = []

    def download(self: object, **options: object) -> dict[str, torch.Tensor]:
        asked.append(options)
        return state

    monkeypatch.setattr(models.MobileNet_V2_Weights, "get_state_dict", download)
    model, cfg = model_with("IMAGENET1K_V1", width=1.0)
    load_pretrained(model, cfg)
    assert model.image is not None
    got = model.image.state_dict()["net.features.18.0.weight"]
    assert torch.equal(got, state["features.18.0.weight"])
    assert asked[0]["check_hash"] and asked[0]["weights_only"]


@pytest.mark.parametrize("width", [0.35, 1.0])
def test_the_shared_weights_load_and_give_the_networks_features(width: float) -> None:
    path = SHARED / "weights" / f"mobilenet_v2_w{width}.safetensors"
    if not path.exists():
        pytest.skip("needs the shared weights beside the checkout")
    reference = models.mobilenet_v2(width_mult=width).features.eval()
    reference.load_state_dict(load_file(path), strict=True)
    model, cfg = model_with(path, width=width, normalize="symmetric", freeze=True)
    load_pretrained(model, cfg)
    assert model.image is not None
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        want = reference(pixels / 127.5 - 1).mean((2, 3))
        # in training mode too: these statistics must never be renewed
        got = model.train().image(pixels).pooled
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_text_weights_are_only_wanted_by_hf_encoders() -> None:
    cfg = Model(modalities="text", text=TextModel(encoder="bag", dim=8))
    spec = make_spec(cfg, num_classes=2, vocab_size=9, pad_id=0, max_tokens=8, image_size=32)
    model = build_model(spec)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    load_pretrained(model, cfg)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
