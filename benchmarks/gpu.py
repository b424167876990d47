"""Rows a second on a GPU, against what its cores decode and what its model scores.

    python benchmarks/gpu.py [--rows 16384] [--encoder resnet18] [--json]

``decode_limit``: bare processes, one a core, that turn JPEGs of 512 px into pixels and tokens.
``model_only``: one process that scores prepared rows, transfers to the device included, of which
``decided`` (a share) in float32 once more.
``end_to_end``: `mmray score` in steady state, left out where Ray is not installed.
``over_limit``: the last over the smaller of the others. Without a GPU it only says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _arms import _pairs
from _corpus import pictures, write_bundle, write_tars
from score_throughput import run

from mmray.archive.rows import Sample
from mmray.bundle import load
from mmray.predict import Predictor

SHARDS, SECONDS = 16, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384, help="pairs (default 16384)")
    parser.add_argument("--encoder", default="resnet18", help="torchvision name")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    result: dict[str, object] = {"benchmark": "gpu", "encoder": args.encoder}
    if args.device == "cuda" and not torch.cuda.is_available():
        result["skipped"] = "torch finds no GPU"
    else:
        with tempfile.TemporaryDirectory() as folder:
            result |= _measure(Path(folder), args)
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def _measure(root: Path, args: argparse.Namespace) -> dict[str, object]:
    bundle = write_bundle(root / "bundle", args.encoder)
    archive = write_tars(root / "tars", [args.rows // SHARDS] * SHARDS, pictures(512))
    samples = [
        Sample("", i, "", image, caption)
        for i, (image, caption) in enumerate(_pairs(map(str, sorted(archive.glob("*.tar"))[:1])))
    ]
    found: dict[str, object] = {"cores": os.cpu_count(), "decode_limit": _decode(bundle, samples)}
    predictor = Predictor(load(str(bundle)), device=args.device)
    found |= {"batch_size": predictor.batch_size, "precision": predictor.precision}
    found |= _model(predictor, samples)
    if args.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        del predictor
        torch.cuda.empty_cache()
    if importlib.util.find_spec("ray") is None:
        return found | {"end_to_end": None}
    found["end_to_end"] = round(run("mmray", bundle, archive, None)["rows_per_second"], 1)
    lower = min(float(str(found[name])) for name in ("decode_limit", "model_only"))
    return found | {"over_limit": round(float(str(found["end_to_end"])) / lower, 3)}


def _decode(bundle: Path, samples: Sequence[Sample]) -> float:
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        rates = pool.starmap(_decode_worker, [(str(bundle), samples)] * cores)
    return round(sum(rates), 1)


def _decode_worker(bundle: str, samples: Sequence[Sample]) -> float:
    torch.set_num_threads(1)
    preprocessor = load(bundle).build_preprocessor()
    preprocessor.prepare_all(samples[:32])
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < SECONDS:
        preprocessor.prepare_all(samples[:256])
        done += len(samples[:256])
    return done / spent


def _model(predictor: Predictor, samples: Sequence[Sample]) -> dict[str, float]:
    some, prepared = predictor.preprocessor.prepare_all(samples[:256])
    decided = predictor.score(some, prepared).decided
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < SECONDS:
        predictor.score(some, prepared)
        done += len(some)
    return {"model_only": round(done / spent, 1), "decided": round(decided / len(some), 4)}


if __name__ == "__main__":
    main()
