"""Changes of training pictures on their device: crop, flip, colour.

Shapes: B rows, C=3 colour channels (RGB), H x W pixels. What happens to a row follows from its
draws alone, numbers made on the CPU: the same picture comes out on any device, with any number of
workers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmray.config import Augment

DRAWS = 7  # numbers a row: area, left, top, flip, brightness, contrast, saturation
GREY = (0.299, 0.587, 0.114)  # luma of R, G, B (ITU-R BT.601)


def draw(rows: int, seed: int) -> Tensor:
    """Random draws for the rows of a step, float32 [rows, DRAWS] in [0, 1), on the CPU."""
    return torch.rand(rows, DRAWS, generator=torch.Generator().manual_seed(seed))


def augment(pixels_BCHW: Tensor, draws_BK: Tensor, cfg: Augment) -> Tensor:
    """uint8 [B, 3, H, W] -> the same, changed as ``cfg`` says and ``draws_BK`` decides."""
    draws_BK = draws_BK.to(pixels_BCHW.device)
    if cfg.crop < 1 or cfg.flip:
        pixels_BCHW = _crop_and_flip(pixels_BCHW, draws_BK[:, :4], cfg)
    if cfg.colour:
        pixels_BCHW = _colour(pixels_BCHW.float(), draws_BK[:, 4:], cfg.colour)
    return pixels_BCHW.round().to(torch.uint8) if pixels_BCHW.is_floating_point() else pixels_BCHW


def _crop_and_flip(pixels_BCHW: Tensor, draws_B4: Tensor, cfg: Augment) -> Tensor:
    """A part of the picture with the picture's own proportions, drawn back to its size; float32.

    In the coordinates of ``affine_grid``, -1 to 1 across the picture, a crop is a scale and a
    shift of its centre, and a flip a scale of -1: both are one resampling.
    """
    area_B, left_B, top_B, flip_B = draws_B4.unbind(1)
    side_B = (cfg.crop + (1 - cfg.crop) * area_B).sqrt()
    mirror_B = torch.where((flip_B < 0.5) & cfg.flip, -1.0, 1.0)
    theta_B23 = side_B.new_zeros(len(side_B), 2, 3)
    theta_B23[:, 0, 0] = side_B * mirror_B
    theta_B23[:, 0, 2] = (1 - side_B) * (2 * left_B - 1)
    theta_B23[:, 1, 1] = side_B
    theta_B23[:, 1, 2] = (1 - side_B) * (2 * top_B - 1)
    grid_BHW2 = F.affine_grid(theta_B23, list(pixels_BCHW.shape), align_corners=False)
    return F.grid_sample(pixels_BCHW.float(), grid_BHW2, padding_mode="border", align_corners=False)


def _colour(x_BCHW: Tensor, draws_B3: Tensor, strength: float) -> Tensor:
    """Brightness, contrast (about the picture's mean grey), saturation (about each pixel's grey),
    as torchvision's ColorJitter defines them; float32 in 0..255."""
    factors_B3 = 1 + strength * (2 * draws_B3 - 1)
    bright_B, contrast_B, colour_B = factors_B3.view(-1, 3, 1, 1, 1).unbind(1)
    x_BCHW = (x_BCHW * bright_B).clamp_(0, 255)
    mean_B = _grey(x_BCHW).mean((1, 2, 3), keepdim=True)
    x_BCHW = torch.lerp(mean_B, x_BCHW, contrast_B).clamp_(0, 255)
    return torch.lerp(_grey(x_BCHW), x_BCHW, colour_B).clamp_(0, 255)


def _grey(x_BCHW: Tensor) -> Tensor:
    """[B, 1, H, W]"""
    weights_C11 = x_BCHW.new_tensor(GREY).view(3, 1, 1)
    return (x_BCHW * weights_C11).sum(1, keepdim=True)
