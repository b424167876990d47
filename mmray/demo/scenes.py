"""Pictures of the generated archive: small landscapes, sunny or stormy, drawn with Pillow."""

from __future__ import annotations

import io
import math
import random
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 112  # pixels, both sides
SCALE = 2  # drawn this much larger, then reduced: smooth edges

Colour = tuple[int, int, int]
CLEAR_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((64, 140, 220), (190, 225, 245)),  # noon
    ((40, 110, 190), (150, 205, 235)),
    ((90, 170, 210), (250, 225, 180)),  # morning
    ((100, 110, 180), (250, 170, 130)),  # evening
)
STORM_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((62, 70, 84), (130, 138, 148)),
    ((50, 64, 90), (120, 140, 165)),
    ((78, 66, 92), (160, 140, 150)),
    ((70, 84, 84), (165, 170, 150)),
)
GROUNDS: tuple[Colour, ...] = ((96, 150, 70), (140, 150, 80), (200, 175, 120), (80, 125, 95))
WATERS: tuple[Colour, ...] = ((50, 120, 160), (40, 140, 150), (70, 100, 150))
PAINTS: tuple[Colour, ...] = (
    (205, 80, 60), (235, 200, 90), (90, 130, 190), (240, 235, 225), (150, 90, 140), (70, 150, 130),
)  # fmt: skip


def snapshot(rng: random.Random, weather: Literal["sunny", "stormy"]) -> bytes:
    """A ``SIZE`` x ``SIZE`` RGB JPEG. Place, colours, exposure, noise and what stands in the
    landscape vary alike under both kinds of weather."""
    side = SIZE * SCALE
    sunny = weather == "sunny"
    image = _sky(rng.choice(CLEAR_SKIES if sunny else STORM_SKIES), side)
    image = _sun(rng, image) if sunny else image
    draw = ImageDraw.Draw(image)
    if sunny:
        for _ in range(rng.randint(0, 2)):
            _cloud(rng, draw, side, rng.uniform(0.1, 0.4), rng.uniform(0.05, 0.09), (250, 250, 250))
    else:
        for _ in range(rng.randint(5, 8)):
            grey = rng.randint(48, 105)
            tint = (grey, grey + 4, grey + 12)
            _cloud(rng, draw, side, rng.uniform(-0.05, 0.25), rng.uniform(0.09, 0.16), tint)
        if rng.random() < 0.5:
            _lightning(rng, draw, side)
    light = rng.uniform(0.85, 1.0) if sunny else rng.uniform(0.5, 0.75)
    rng.choice((_hills, _sea, _town))(rng, draw, side, light)
    if not sunny:
        _rain(rng, image)
    return _develop(rng, image)


def _sky(colours: tuple[Colour, Colour], side: int) -> Image.Image:
    top, bottom = (np.array(c, dtype=np.float32) for c in colours)
    share = np.linspace(0, 1, side, dtype=np.float32)[:, None]
    column = top + (bottom - top) * share
    return Image.fromarray(np.repeat(column[:, None], side, axis=1).astype(np.uint8), "RGB")


def _sun(rng: random.Random, image: Image.Image) -> Image.Image:
    side = image.width
    x, y = rng.uniform(0.12, 0.88) * side, rng.uniform(0.1, 0.38) * side
    radius = rng.uniform(0.06, 0.11) * side
    colour = rng.choice(((255, 236, 120), (255, 222, 90), (255, 246, 200)))
    glow = Image.new("L", image.size, 0)
    reach = radius * 2.4
    ImageDraw.Draw(glow).ellipse((x - reach, y - reach, x + reach, y + reach), fill=130)
    glow = glow.reduce(4).filter(ImageFilter.GaussianBlur(radius / 6)).resize(image.size)
    image = Image.composite(Image.new("RGB", image.size, colour), image, glow)
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        turn = rng.uniform(0, math.pi)
        for ray in range(10):
            angle = turn + ray * math.pi / 5
            near, far = radius * 1.3, radius * 1.8
            dx, dy = math.cos(angle), math.sin(angle)
            ends = (x + near * dx, y + near * dy, x + far * dx, y + far * dy)
            draw.line(ends, fill=colour, width=side // 70)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def _cloud(
    rng: random.Random, draw: ImageDraw.ImageDraw, side: int, y: float, size: float, colour: Colour
) -> None:
    """A row of puffs; ``y`` and ``size`` are shares of the side."""
    x = rng.uniform(0, 1)
    for puff in range(-2, 3):
        radius = size * rng.uniform(0.7, 1.0) * (1.15 - 0.2 * abs(puff)) * side
        centre_x = (x + puff * size * 0.85) * side
        centre_y = (y + rng.uniform(-0.2, 0.2) * size) * side
        box = (
            centre_x - radius,
            centre_y - radius * 0.75,
            centre_x + radius,
            centre_y + radius * 0.75,
        )
        draw.ellipse(box, fill=colour)


def _lightning(rng: random.Random, draw: ImageDraw.ImageDraw, side: int) -> None:
    x, y = rng.uniform(0.15, 0.85) * side, 0.25 * side
    points = [(x, y)]
    for _ in range(4):
        x += rng.uniform(-0.09, 0.09) * side
        y += 0.09 * side
        points.append((x, y))
    draw.line(points, fill=(255, 250, 200), width=side // 60, joint="curve")


def _rain(rng: random.Random, image: Image.Image) -> None:
    side = image.width
    draw = ImageDraw.Draw(image, "RGBA")
    lean = rng.uniform(-0.05, 0.05) * side
    for _ in range(rng.randint(60, 140)):
        x, y = rng.uniform(0, side), rng.uniform(0.2, 1.0) * side
        length = rng.uniform(0.04, 0.09)
        ends = (x, y, x + lean * length * 10, y + length * side)
        draw.line(ends, fill=(215, 225, 235, 110), width=SCALE)


def _shade(colour: Colour, light: float) -> Colour:
    r, g, b = (min(255, int(c * light)) for c in colour)
    return (r, g, b)


def _hills(rng: random.Random, draw: ImageDraw.ImageDraw, side: int, light: float) -> None:
    ground = rng.choice(GROUNDS)
    for layer, height in enumerate((0.55, 0.68, 0.8)):
        waves, phase = rng.uniform(0.6, 1.8), rng.uniform(0, 6.3)
        top = height * side
        points = [
            (x, top + 0.06 * side * math.sin(phase + waves * 2 * math.pi * x / side))
            for x in range(0, side + 8, 8)
        ]
        colour = _shade(ground, light * (1.1 - 0.15 * layer))
        draw.polygon([*points, (side, side), (0, side)], fill=colour)
    for _ in range(rng.randint(0, 6)):
        x, y = rng.uniform(0, 1) * side, rng.uniform(0.72, 0.95) * side
        height = rng.uniform(0.07, 0.13) * side
        draw.rectangle((x - 2, y - 4, x + 2, y), fill=_shade((90, 65, 45), light))
        crown = [(x - height / 3, y - 4), (x + height / 3, y - 4), (x, y - height)]
        draw.polygon(crown, fill=_shade((45, 95, 55), light))


def _sea(rng: random.Random, draw: ImageDraw.ImageDraw, side: int, light: float) -> None:
    horizon = rng.uniform(0.52, 0.66) * side
    draw.rectangle((0, horizon, side, side), fill=_shade(rng.choice(WATERS), light))
    for _ in range(rng.randint(6, 14)):
        x, y = rng.uniform(0, side), rng.uniform(horizon + 6, side)
        wave = (x, y, x + rng.uniform(0.05, 0.15) * side, y)
        draw.line(wave, fill=_shade((150, 190, 205), light), width=SCALE)
    beach = rng.uniform(0.85, 0.95) * side
    draw.polygon(
        [(0, beach), (side, beach + rng.uniform(-0.06, 0.06) * side), (side, side), (0, side)],
        fill=_shade((215, 190, 140), light),
    )
    for _ in range(rng.randint(0, 2)):
        x, y = rng.uniform(0.1, 0.9) * side, rng.uniform(horizon + 8, 0.8 * side)
        size = rng.uniform(0.06, 0.1) * side
        hull = [
            (x - size, y),
            (x + size, y),
            (x + size * 0.6, y + size * 0.4),
            (x - size * 0.6, y + size * 0.4),
        ]
        draw.polygon(hull, fill=_shade(rng.choice(PAINTS), light))
        sail = [(x, y - 2), (x, y - 1.6 * size), (x + 0.8 * size, y - 2)]
        draw.polygon(sail, fill=_shade((245, 240, 230), light))


def _town(rng: random.Random, draw: ImageDraw.ImageDraw, side: int, light: float) -> None:
    street = rng.uniform(0.86, 0.94) * side
    draw.rectangle((0, street, side, side), fill=_shade((120, 115, 110), light))
    x = -rng.uniform(0, 0.1) * side
    while x < side:
        width, height = rng.uniform(0.13, 0.24) * side, rng.uniform(0.2, 0.42) * side
        top = street - height
        draw.rectangle((x, top, x + width, street), fill=_shade(rng.choice(PAINTS), light))
        roof = [
            (x - 2, top),
            (x + width + 2, top),
            (x + width / 2, top - rng.uniform(0.05, 0.12) * side),
        ]
        draw.polygon(roof, fill=_shade((130, 65, 50), light))
        pane = 0.035 * side
        for row in range(2):
            for column in (0.28, 0.72):
                left, upper = x + column * width - pane / 2, top + (0.12 + row * 0.4) * height
                window = (left, upper, left + pane, upper + pane * 1.3)
                draw.rectangle(window, fill=_shade((235, 225, 170), light))
        x += width + rng.uniform(0, 0.03) * side


def _develop(rng: random.Random, image: Image.Image) -> bytes:
    """Reduced, with a random exposure, sensor noise and mirror, as JPEG bytes."""
    pixels = np.asarray(image.reduce(SCALE), dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    noise = np.random.default_rng(rng.getrandbits(64))
    grain = noise.standard_normal(pixels.shape, dtype=np.float32)
    pixels = pixels * rng.uniform(0.8, 1.2) + rng.uniform(2, 8) * grain
    buffer = io.BytesIO()
    developed = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")
    developed.save(buffer, "JPEG", quality=rng.randint(70, 92))
    return buffer.getvalue()
