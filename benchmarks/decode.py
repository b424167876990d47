"""JPEG bytes -> uint8 [3, 224, 224]: how many pictures a second one core prepares.

    python benchmarks/decode.py [--seconds 20] [--json]

Five ways side by side on generated photo-like JPEGs, in turns, so that whatever else the machine
does falls on all of them; CPU time of one thread, best of the turns. ``ratio`` is against Pillow
at full size. ``decode_image`` is mmray's own; it also reads the header, caps the pixel count and
turns the picture upright.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from _corpus import photo
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional

from mmray.config import ImagePreprocess
from mmray.preprocess import decode_image

CFG = ImagePreprocess()
SIZE = (CFG.size, CFG.size)
#: Side in pixels and JPEG quality; about 46 and 310 kB a picture.
PICTURES = ((512, 84), (1500, 83))


def pillow(data: bytes, draft: bool = False) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft("RGB", SIZE)
    small = image.convert("RGB").resize(SIZE, Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def torchvision(data: bytes) -> np.ndarray:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    result: np.ndarray = functional.resize(decode_jpeg(encoded), list(SIZE), antialias=True).numpy()
    return result


def turbo(data: bytes) -> np.ndarray:
    """simplejpeg's scaled decode at its own choice of scale, Pillow's resize."""
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=CFG.size, min_width=CFG.size)
    small = Image.fromarray(pixels).resize(SIZE, Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


WAYS: dict[str, Callable[[bytes], np.ndarray]] = {
    "Pillow, full size": pillow,
    "Pillow, draft": lambda data: pillow(data, draft=True),
    "torchvision": torchvision,
    "simplejpeg + Pillow resize": turbo,
    "decode_image (mmray)": lambda data: decode_image(data, CFG),
}


def measure(pictures: list[bytes], seconds: float) -> dict[str, float]:
    """Pictures a second for each way: its best turn of as many as fit into ``seconds``."""
    best = dict.fromkeys(WAYS, 0.0)
    for way in WAYS.values():
        way(pictures[0])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, way in WAYS.items():
            start = time.process_time()
            for data in pictures:
                way(data)
            best[name] = max(best[name], len(pictures) / (time.process_time() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="time to spend (default 20)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for side, quality in PICTURES:
        pictures = [photo(side, quality, seed) for seed in range(8)]
        rates = measure(pictures, args.seconds / len(PICTURES))
        base = rates["Pillow, full size"]
        results.append(
            {
                "side_px": side,
                "bytes": round(sum(map(len, pictures)) / len(pictures)),
                "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
                "ratio": {name: round(rate / base, 2) for name, rate in rates.items()},
            }
        )
    if args.json:
        print(json.dumps({"benchmark": "decode", "target_px": CFG.size, "results": results}))
        return
    for result in results:
        print(
            f"\n{result['side_px']} px, {result['bytes'] / 1000:.0f} kB -> {CFG.size} px, one core"
        )
        print(f"{'':28}{'images/s':>10}{'ratio':>8}")
        for name in WAYS:
            print(
                f"{name:28}{result['images_per_second'][name]:>10.0f}{result['ratio'][name]:>8.2f}"
            )


if __name__ == "__main__":
    main()
