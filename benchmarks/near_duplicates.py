"""What it costs to find near-identical pictures: hashing each, searching among all.

    python benchmarks/near_duplicates.py [--hashes 1000000] [--bits 16] [--json]

Hashes are random, one in ten another's with a few bits flipped; ``recall`` is the share of those
that were found with what they came from. CPU seconds of one thread, and how far the process grew.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
import torch
from _corpus import photo

from mmray.config import ImagePreprocess
from mmray.near import HASH_BITS, WORDS, joined
from mmray.preprocess import decode_image
from mmray.preprocess.perceptual import perceptual_hash

SIDES = ((512, 84), (1500, 83))  # side in pixels, JPEG quality
PICTURES = 16
COPIES = 10  # one hash in so many is another's copy


def hashing(side: int, quality: int) -> dict[str, float]:
    """Milliseconds a picture: its hash, and decoding it for a model of 224 pixels."""
    pictures = [photo(side, quality, seed) for seed in range(PICTURES)]
    found: dict[str, float] = {"side_px": side}
    cfg = ImagePreprocess()
    for name, work in (
        ("hash_ms", perceptual_hash),
        ("decode_224_ms", lambda data: decode_image(data, cfg)),
    ):
        work(pictures[0])
        start = time.process_time()
        for data in pictures:
            work(data)
        found[name] = round(1000 * (time.process_time() - start) / PICTURES, 2)
    return found


def searching(count: int, bits: int) -> dict[str, float]:
    """One search among ``count`` hashes."""
    random = np.random.default_rng(0)
    words = random.integers(0, 2**64, (WORDS, count), dtype=np.uint64)
    copies = np.arange(count - count // COPIES, count)
    sources = random.integers(0, count - count // COPIES, len(copies))
    words[:, copies] = words[:, sources]
    for _ in range(bits):  # the same bit twice stays within ``bits``
        bit = random.integers(HASH_BITS, size=len(copies))
        words[bit // 64, copies] ^= np.uint64(1) << (bit % 64).astype(np.uint64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    root = joined(words, bits)
    return {
        "hashes": count,
        "bits": bits,
        "cpu_seconds": round(time.process_time() - start, 1),
        "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10,
        "recall": float((root[copies] == root[sources]).mean()),
        "groups": len(np.unique(root)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hashes", type=int, default=1_000_000, help="to search among")
    parser.add_argument("--bits", type=int, default=16, help="that may differ (data.near)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    search = searching(args.hashes, args.bits)
    hashed = [hashing(*side) for side in SIDES]
    if args.json:
        print(json.dumps({"benchmark": "near_duplicates", "search": search, "hash": hashed}))
        return
    for part in (search, *hashed):
        print(", ".join(f"{name} {value}" for name, value in part.items()))


if __name__ == "__main__":
    main()
