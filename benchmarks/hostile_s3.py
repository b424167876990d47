"""What an S3 that fails costs a scoring run, and how fast a job asks an S3 that says SlowDown.

    python benchmarks/hostile_s3.py [--shards 60] [--share 0.05] [--seconds 30] [--json]

First the same archive twice through the proxy of the tests: undisturbed, and with faults of every
kind in a share of the requests. Then four processes that ask as fast as they can, in eight threads
each, for objects of a bucket that takes so many requests a second and no more (``--capacity``):
without a limiter, each process with its own, and with the one that a job shares. Counted is what
the proxy saw in the later two thirds of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny
from hostile import HostileS3

from mmray import ledger, storage
from mmray.demo.endpoint import s3_endpoint
from mmray.errors import StorageError
from mmray.verify import verify

BUCKET = "hostile"
SHARD_ROWS = 20
PROCESSES, THREADS = 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=60, help="of 20 pairs each (default 60)")
    parser.add_argument("--share", type=float, default=0.05, help="of requests that fail")
    parser.add_argument("--capacity", type=float, default=60, help="requests a second")
    parser.add_argument("--seconds", type=float, default=30, help="of asking, for each limiter")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory() as folder, s3_endpoint(BUCKET) as url:
        make_archive(Path(folder), args.shards)
        runs = {
            "undisturbed": score(url, "undisturbed", 0.0),
            "faults": score(url, "faults", args.share),
        }
        same = content("undisturbed") == content("faults")
        paces = {
            limiter: ask(url, limiter, args.capacity, args.seconds)
            for limiter in ("none", "each its own", "shared by the job")
        }
    result = {"benchmark": "hostile_s3", "runs": runs, "identical": same, "paces": paces}
    print(json.dumps(result) if args.json else tables(result))


def make_archive(folder: Path, shards: int) -> None:
    sources = {
        "bundle": tiny.bundle(str(folder / "bundle")),
        "archive": str(tiny.write_archive(folder / "archive", [SHARD_ROWS] * shards)),
    }
    for name, source in sources.items():
        for item in storage.list_objects(source):
            data = storage.read_bytes(storage.join(source, item.path))
            storage.write_bytes(f"s3://{BUCKET}/{name}/{item.path}", data)


# --- a run through faults ------------------------------------------------------------------------


def score(url: str, name: str, share: float) -> dict[str, Any]:
    root, out = f"s3://{BUCKET}", f"s3://{BUCKET}/{name}"
    line = ["score", f"{root}/bundle", f"{root}/archive", "--out", out]
    with HostileS3(url, share=share, seed=1) as proxy:
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "mmray", *line],
            env={**os.environ, "AWS_ENDPOINT_URL": proxy.url},
            check=True,
            capture_output=True,
            timeout=900,
        )
        seconds = time.monotonic() - began
        requests, injected = dict(proxy.requests), dict(proxy.injected)
    tell(f"{name}: {seconds:.1f} s, {sum(requests.values())} requests, injected {injected}")
    summary = json.loads(storage.read_bytes(storage.join(out, ledger.SUMMARY)))
    return {
        "seconds": round(seconds, 1),
        "rows": summary["rows"],
        "requests": requests,
        "injected": injected,
        "retries": summary["retries"],
        "verified": verify(out).ok,
    }


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def content(name: str) -> dict[str, Any]:
    root = f"s3://{BUCKET}/{name}/{ledger.SCORES}"
    return {
        item.path: ledger.read_scores(storage.join(root, item.path)).replace_schema_metadata(None)
        for item in storage.list_objects(root)
    }


# --- an S3 that says SlowDown --------------------------------------------------------------------


class Asker:
    """One process of a job."""

    def __init__(self, limiter: str) -> None:
        from mmray.engine import pace
        from mmray.throttle import LIMITER

        if limiter == "shared by the job":
            pace.share()
        elif limiter == "none":
            LIMITER.refused = lambda: None  # type: ignore[method-assign]

    def ask(self, seconds: float) -> int:
        """Requests that failed for good."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(THREADS) as pool:
            return sum(pool.map(self._ask_until, [end] * THREADS))

    def _ask_until(self, end: float) -> int:
        failed = 0
        while time.monotonic() < end:
            try:
                storage.stat(f"s3://{BUCKET}/archive/00000.tar")
            except StorageError:
                failed += 1
        return failed


@contextlib.contextmanager
def joined(url: str) -> Iterator[Any]:
    """A Ray whose workers ask this endpoint."""
    import ray

    from mmray.engine import cluster

    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = url
    cluster.connect()
    try:
        yield ray
    finally:
        cluster.disconnect()
        os.environ["AWS_ENDPOINT_URL"] = before


def ask(url: str, limiter: str, capacity: float, seconds: float) -> dict[str, Any]:
    with HostileS3(url) as proxy, joined(proxy.url) as ray:
        asker = ray.remote(num_cpus=0)(Asker)
        askers = [asker.remote(limiter) for _ in range(PROCESSES)]
        ray.get([one.ask.remote(0.0) for one in askers])
        proxy.capacity = capacity
        began = time.monotonic()
        failed = sum(ray.get([one.ask.remote(seconds) for one in askers]))
        arrivals = [above for at, above in proxy.arrivals if seconds / 3 < at - began < seconds]
    counted = seconds * 2 / 3
    tell(f"limiter {limiter}: {len(arrivals)} requests, {sum(arrivals)} refused")
    return {
        "asked_per_second": round(len(arrivals) / counted, 1),
        "accepted_per_second": round(arrivals.count(False) / counted, 1),
        "refused_share": round(sum(arrivals) / len(arrivals), 3),
        "failed": failed,
    }


# --- tables --------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    calm, rough = result["runs"]["undisturbed"], result["runs"]["faults"]
    lines = ["| | undisturbed | faults |", "|---|---|---|"]
    lines += row("seconds", [calm["seconds"], rough["seconds"]])
    lines += row("requests", [sum(run["requests"].values()) for run in (calm, rough)])
    lines += row("faults", [sum(run["injected"].values()) for run in (calm, rough)])
    for kind in sorted(rough["injected"]):
        lines += row(f"of these {kind}", [calm["injected"].get(kind, 0), rough["injected"][kind]])
    lines += row("asked again", [sum(run["retries"].values()) for run in (calm, rough)])
    for cause in sorted(rough["retries"]):
        lines += row(f"of these {cause}", [calm["retries"].get(cause, 0), rough["retries"][cause]])
    lines += row("verified", [calm["verified"], rough["verified"]])
    lines += row("identical scores", ["", result["identical"]])
    lines += ["", "| limiter | asked/s | accepted/s | refused | failed |", "|---|---|---|---|---|"]
    for limiter, pace in result["paces"].items():
        rates = [pace["asked_per_second"], pace["accepted_per_second"]]
        lines += row(limiter, [*rates, f"{pace['refused_share']:.1%}", pace["failed"]])
    return "\n".join(lines)


def row(name: str, values: Sequence[Any]) -> list[str]:
    return [f"| {name} | " + " | ".join(map(str, values)) + " |"]


if __name__ == "__main__":
    main()
