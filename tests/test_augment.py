"""Without these a model would be trained on other pictures than the config says."""

from __future__ import annotations

import pytest
import torch

from mmray.augment import DRAWS, augment, draw
from mmray.config import Augment, Model, Train, TrainConfig, validate
from mmray.errors import ConfigError

LEFT_TO_RIGHT = torch.arange(0, 256, 8, dtype=torch.uint8).expand(3, 32, 32)


def pixels(rows: int) -> torch.Tensor:
    """Smooth random pictures, uint8 [rows, 3, 32, 32]."""
    small = torch.randint(0, 256, (rows, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    big = torch.nn.functional.interpolate(small.float(), size=32, mode="bilinear")
    return big.to(torch.uint8)


def test_a_flip_turns_a_picture_around_and_nothing_else() -> None:
    x, draws = pixels(6), draw(6, 0)
    draws[:, 3] = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7])
    got = augment(x, draws, Augment(flip=True))
    assert got.dtype == torch.uint8
    assert torch.equal(got[1::2], x[1::2]) and torch.equal(got[::2], x[::2].flip(3))


@pytest.mark.parametrize(("left", "first", "last"), [(0.0, 0, 124), (1.0, 124, 248)])
def test_a_crop_keeps_the_share_of_the_area_that_was_drawn(
    left: float, first: int, last: int
) -> None:
    """A quarter of the area is half of each side; the ramp shows which half."""
    draws = torch.zeros(1, DRAWS)
    draws[:, 1], draws[:, 3] = left, 0.9
    got = augment(LEFT_TO_RIGHT[None], draws, Augment(crop=0.25))[0, 0].int()
    assert got.shape == (32, 32)
    assert abs(int(got[5, 0]) - first) <= 4 and abs(int(got[5, -1]) - last) <= 4
    whole = augment(LEFT_TO_RIGHT[None], draws + torch.eye(DRAWS)[0], Augment(crop=0.25))[0]
    assert torch.equal(whole, LEFT_TO_RIGHT)  # a draw of 1 keeps all


def test_colours_are_those_of_torchvision() -> None:
    """Brightness, then contrast, then saturation, by its own functions."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    x, draws = pixels(4), draw(4, 2)
    got = augment(x, draws, Augment(colour=0.5))
    for row, (bright, contrast, colour) in enumerate((0.5 + draws[:, 4:]).tolist()):
        want = x[row].float() / 255
        want = functional.adjust_brightness(want, bright)
        want = functional.adjust_contrast(want, contrast)
        want = functional.adjust_saturation(want, colour)
        assert (got[row].float() - want * 255).abs().max() < 1.5


def test_what_happens_to_a_row_follows_from_its_draws_alone() -> None:
    """Spread over workers, a step sees the same pictures."""
    x, draws, cfg = pixels(7), draw(7, 5), Augment(crop=0.4, flip=True, colour=0.3)
    whole = augment(x, draws, cfg)
    parts = [augment(x[i:j], draws[i:j], cfg) for i, j in ((0, 4), (4, 7))]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(draw(7, 5), draws) and not torch.equal(draw(7, 6), draws)
    assert not torch.equal(whole, x)


def test_no_change_is_asked_for_by_default() -> None:
    assert not Train().augment.changes and Augment(flip=True).changes


def test_augmenting_what_no_model_sees_is_refused() -> None:
    tree = {
        "data": {"archive": "a"},
        "out": "o",
        "model": Model(modalities="text").model_dump(),
        "train": {"augment": {"flip": True}},
    }
    with pytest.raises(ConfigError, match=r"train\.augment: changes pictures.*modalities is text"):
        validate(TrainConfig, tree, "test")
