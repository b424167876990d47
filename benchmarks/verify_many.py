"""How long `mmray verify` takes over many finished shards.

    python benchmarks/verify_many.py [--shards 20000] [--s3 2000] [--rows 1000] [--json]

Makes a finished run of small shards, each with a score file of ``--rows`` rows (the archive's own
files are empty: verify only lists them), and times `verify`: in a local directory, and a smaller
one on an embedded S3 endpoint, which shares the cores. ``for_100000_s``: what 100,000 would take at
that rate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa

from mmray import ledger, storage
from mmray.archive import rows
from mmray.archive.shards import list_shards
from mmray.demo.endpoint import s3_endpoint
from mmray.scoring_run import Run, open_run
from mmray.targets import Target, Targets
from mmray.verify import verify

LABELS = ("negative", "neutral", "positive")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=20_000, help="(default 20000)")
    parser.add_argument("--s3", type=int, default=2000, help="shards on S3 (default 2000)")
    parser.add_argument("--rows", type=int, default=1000, help="a shard (default 1000)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "verify_many"}
    with tempfile.TemporaryDirectory() as folder:
        result["local"] = _timed(folder, args.shards, args.rows)
    with s3_endpoint("verify"):
        result["s3"] = _timed("s3://verify", args.s3, args.rows)
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def _timed(root: str, shards: int, count: int) -> dict[str, Any]:
    began = time.perf_counter()
    out = _finished(root, shards, count)
    print(f"{out}: made in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    began = time.perf_counter()
    verdict = verify(out)
    seconds = time.perf_counter() - began
    assert verdict.ok and verdict.rows == shards * count, verdict.findings[:3]
    return {
        "shards": shards,
        "rows": verdict.rows,
        "seconds": round(seconds, 1),
        "for_100000_s": round(seconds * 100_000 / shards, 1),
    }


def _finished(root: str, shards: int, count: int) -> str:
    archive, out = storage.join(root, "archive"), storage.join(root, "out")
    paths = [f"{index // 1000:04d}/{index:07d}.tar" for index in range(shards)]
    for _ in ledger.each(lambda path: storage.write_bytes(f"{archive}/{path}", b""), paths):
        pass
    targets = Targets.of(map(Target, list_shards(archive)))
    run = Run(archive, "bundle", "f" * 64, LABELS, targets, chunk_rows=256)
    open_run(out, run)
    scores = np.random.default_rng(0).dirichlet(np.ones(3), count).astype(np.float32)
    columns = {
        rows.ROW: pa.array(np.arange(count)),
        rows.KEY: pa.array([f"{i:09d}" for i in range(count)]),
        rows.LABEL: pa.array([LABELS[i] for i in scores.argmax(axis=1)]),
        **{
            name: pa.array(c)
            for name, c in zip(rows.probability_columns(LABELS), scores.T, strict=True)
        },
        rows.ERROR: pa.nulls(count, pa.string()),
        rows.ERROR_STAGE: pa.nulls(count, pa.string()),
    }

    def commit(target: Target) -> ledger.ShardRecord:
        path = target.shard.path
        table = pa.table({rows.SHARD: pa.array([path] * count), **columns}, schema=run.schema())
        return ledger.put_scores(out, run, target, table, None)

    for _ in ledger.each(commit, targets):
        pass
    return out


if __name__ == "__main__":
    main()
