"""How long `mmray verify` takes over many finished shards.

    python benchmarks/verify_many.py [--shards 20000] [--rows 1000] [--json]

Makes a finished run of small shards in a local directory, each with a score file of ``--rows`` rows
(the archive's own files are empty: verify only lists them), and times `verify`. ``for_100000_s``:
what 100,000 would take at that rate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmray import ledger
from mmray.archive import rows
from mmray.archive.shards import list_shards
from mmray.scoring_run import Run, open_run
from mmray.targets import Target, Targets
from mmray.verify import verify

LABELS = ("negative", "neutral", "positive")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=20_000, help="(default 20000)")
    parser.add_argument("--rows", type=int, default=1000, help="a shard (default 1000)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = _finished(Path(folder), args.shards, args.rows)
        began = time.perf_counter()
        verdict = verify(out)
        seconds = time.perf_counter() - began
    assert verdict.ok and verdict.rows == args.shards * args.rows, verdict.findings[:3]
    result = {
        "benchmark": "verify_many",
        "shards": args.shards,
        "rows": verdict.rows,
        "seconds": round(seconds, 1),
        "for_100000_s": round(seconds * 100_000 / args.shards, 1),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def _finished(root: Path, shards: int, count: int) -> str:
    archive, out = root / "archive", str(root / "out")
    for folder in range(0, shards, 1000):
        (archive / f"{folder:07d}").mkdir(parents=True)
        for index in range(folder, min(folder + 1000, shards)):
            (archive / f"{folder:07d}" / f"{index:07d}.tar").touch()
    targets = Targets.of(map(Target, list_shards(str(archive))))
    run = Run(str(archive), "bundle", "f" * 64, LABELS, targets, chunk_rows=256)
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
        ledger.write_part(out, path, 0, count, table)
        return ledger.commit(out, run, target, count, None)

    for _ in ledger.each(commit, targets):
        pass
    return out


if __name__ == "__main__":
    main()
