"""What an archive of a million shards costs the driver, of which nine in ten are scored already.

    python benchmarks/plan_million.py [--shards 1000000] [--done 900000] [--seconds 120] [--json]

An S3 endpoint on loopback pretends to hold the archive and the scores of the shards that are done;
each shard is the same small tar. `mmray score` is run against it as a user runs it, and stopped by
Ctrl-C some time after it began to score. ``plan_s``: from the command to the first shard read, less
the time of the two listings. ``driver_rss_mib``: the most memory the driver ever held.
``growth_mib``: what it grew by between two moments of the run, ``committed`` shards apart.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import _million
from _corpus import photo, write_bundle, write_tars

from mmray.archive.shards import Shard
from mmray.bundle import read_manifest
from mmray.engine.ingest import CHUNK_ROWS
from mmray.scoring_run import RUN, Run
from mmray.targets import Target, Targets

PAIRS = 2  # a shard


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=1_000_000, help="(default 1,000,000)")
    parser.add_argument("--done", type=int, default=900_000, help="of them (default 900,000)")
    parser.add_argument("--seconds", type=float, default=120, help="of scoring (default 120)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.shards, args.done, args.seconds)
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def measure(folder: Path, shards: int, done: int, seconds: float) -> dict[str, object]:
    write_tars(folder / "one", [PAIRS], [photo(64, 84, seed) for seed in range(PAIRS)])
    template = folder / "one" / "00000.tar"
    bundle = write_bundle(folder / "bundle", "small_cnn")
    server = subprocess.Popen(
        [sys.executable, _million.__file__, str(shards), str(done), template],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        run = _held(bundle, shards, template.stat().st_size)
        _put(f"{url}/million/out/{RUN}", run.to_json())
        return {"benchmark": "plan_million", "shards": shards, "done": done} | _run(
            url, bundle, seconds
        )
    finally:
        server.terminate()


def _held(bundle: Path, shards: int, size: int) -> Run:
    """The run as an earlier command left it."""
    manifest = read_manifest(str(bundle))
    listed = (Shard(_million.name(i), size, "e", "tar") for i in range(shards))
    return Run(
        archive="s3://million/archive",
        bundle=str(bundle),
        fingerprint=manifest.fingerprint,
        labels=tuple(manifest.labels),
        targets=Targets.of(map(Target, listed)),
        chunk_rows=CHUNK_ROWS,
    )


def _run(url: str, bundle: Path, seconds: float) -> dict[str, object]:
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none")
    environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": url, "RAY_ADDRESS": "local"}
    line = [sys.executable, "-m", "mmray", "score", str(bundle), "s3://million/archive"]
    began = time.time()
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  also when run by nohup
    driver = subprocess.Popen(
        [*line, "--out", "s3://million/out"], env=environment, preexec_fn=heed
    )
    samples: list[tuple[float, float, float]] = []  # s of scoring, MiB, shards committed
    stats: dict[str, float] = {}
    while driver.poll() is None and (not samples or samples[-1][0] < seconds):
        time.sleep(1)
        stats = json.loads(_get(f"{url}/_stats"))
        if stats["committed"]:
            scoring = time.time() - stats["read_first"]
            samples.append((scoring, _memory(driver.pid, "VmRSS"), stats["committed"]))
    peak = _memory(driver.pid, "VmHWM")
    driver.send_signal(signal.SIGINT)
    code = driver.wait(120)
    if code != 130:
        raise SystemExit(f"mmray score ended with {code} before it was stopped")
    listing = sum(
        stats[f"list_{what}_last"] - stats[f"list_{what}_first"] for what in ("archive", "scores")
    )
    early, late = samples[len(samples) // 4], samples[-1]
    return {
        "listing_s": round(listing, 1),
        "plan_s": round(stats["read_first"] - began - listing, 1),
        "driver_rss_mib": round(peak),
        "rss_mib": [round(memory) for _, memory, _ in samples[:: max(1, len(samples) // 8)]],
        "growth_mib": round(late[1] - early[1], 1),
        "committed": int(late[2] - early[2]),
        "shards_per_second": round((late[2] - early[2]) / (late[0] - early[0]), 1),
    }


def _memory(pid: int, name: str) -> float:
    """MiB, as the kernel counts them."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {name} of process {pid}")


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        data: bytes = answer.read()
        return data


def _put(url: str, data: bytes) -> None:
    request = urllib.request.Request(url, data=data, method="PUT")
    urllib.request.urlopen(request, timeout=600).close()


if __name__ == "__main__":
    main()
