"""Scoring from S3 to S3 through an endpoint that fails, refuses and lies: the same output.

The commands run in processes of their own, on a Ray of their own, which find the proxy in their
environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hostile import HostileS3
from test_engine_score import content, expected

from mmray import ledger, storage
from mmray.engine import score as engine
from mmray.errors import ConfigError, MmrayError
from mmray.report.progress import Console
from mmray.scoring_run import Run
from mmray.verify import verify

ACCESS_KEY = "AKIA0SECRET"  # the proxy quotes it in what it refuses
SHARDS = [40, 60, 25, 0, 33, 80]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: Any) -> dict[str, str]:
    """Bundle and archive, on disk and on S3."""
    folder = tmp_path_factory.mktemp("hostile")
    local = {
        "bundle": tiny.bundle(str(folder / "bundle")),
        "archive": str(tiny.write_archive(folder / "archive", SHARDS)),
    }
    bucket = str(s3_endpoint.bucket())
    for name, source in local.items():
        for item in storage.list_objects(source):
            data = storage.read_bytes(storage.join(source, item.path))
            storage.write_bytes(storage.join(bucket, name, item.path), data)
    remote = {f"s3_{name}": storage.join(bucket, name) for name in local}
    return {**local, **remote, "bucket": bucket}


@pytest.fixture
def proxy(s3_endpoint: Any) -> Iterator[HostileS3]:
    with HostileS3(s3_endpoint.url) as faulty:
        yield faulty


def score(places: dict[str, str], out: str, proxy: HostileS3) -> subprocess.CompletedProcess[str]:
    line = ["score", places["s3_bundle"], places["s3_archive"], "--out", out]
    return subprocess.run(
        [sys.executable, "-m", "mmray", *line],
        env={
            **os.environ,
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "RAY_ADDRESS": "local",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )


def whole(places: dict[str, str]) -> dict[str, Any]:
    return expected(places["bundle"], Path(places["archive"]), chunk_rows=256)


def test_a_run_through_faults_gives_the_same_scores_and_says_what_it_took(
    places: dict[str, str], proxy: HostileS3
) -> None:
    out = storage.join(places["bucket"], "faults")
    proxy.share, proxy.seed = 0.05, 5
    for kind in ("500", "SlowDown", "reset", "short", "slow"):
        proxy.plan(kind, "GET", path="/archive/00001.tar")
    proxy.plan("lost answer", "PUT", path="/run.json")
    for kind in ("SlowDown", "expired", "lost answer"):
        proxy.plan(kind, "PUT", path="/faults/")
    for kind in ("500", "short"):
        proxy.plan(kind, "LIST")
    done = score(places, out, proxy)
    assert done.returncode == 0, done.stderr
    injected = dict(proxy.injected)
    assert content(out) == whole(places)
    assert verify(out).ok and not ledger.covered(out)
    assert {"500", "SlowDown", "reset", "short", "slow", "expired", "lost answer"} <= set(injected)
    retries = json.loads(storage.read_bytes(storage.join(out, ledger.SUMMARY)))["retries"]
    assert retries["SlowDown"] >= 2 and retries["short body"] >= 1, (retries, injected)
    assert retries["connection lost"] >= 3 and retries["server error"] >= 1, (retries, injected)
    assert sum(retries.values()) <= sum(injected.values())
    assert f"S3: {sum(retries.values())} requests asked again (" in done.stderr


def test_credentials_that_are_expired_for_a_while_cost_time_and_nothing_else(
    places: dict[str, str], proxy: HostileS3
) -> None:
    """As between a role's keys running out and their renewal: every request of every process."""
    out = storage.join(places["bucket"], "expired")
    proxy.plan("expired", "PUT", path="/expired/_run/parts/", lasts_s=6)
    done = score(places, out, proxy)
    assert done.returncode == 0, done.stderr
    assert content(out) == whole(places) and verify(out).ok
    refused = proxy.injected["expired"]
    retries = json.loads(storage.read_bytes(storage.join(out, ledger.SUMMARY)))["retries"]
    assert 3 <= retries["expired credentials"] <= refused
    assert refused <= 100, "it asks again at growing intervals, not as fast as it can"


def test_a_run_that_is_refused_goes_on_when_it_is_allowed(
    places: dict[str, str], proxy: HostileS3
) -> None:
    out = storage.join(places["bucket"], "denied")
    proxy.plan("denied", "PUT", times=float("inf"), path="/denied/scores/")
    done = score(places, out, proxy)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"mmray: {out}/scores/0000")
    assert "refused PutObject: AccessDenied" in last and "need s3:PutObject" in last
    assert ACCESS_KEY not in done.stderr
    assert proxy.injected["denied"] <= len(SHARDS)  # asked once each
    proxy.relent()
    done = score(places, out, proxy)
    assert done.returncode == 0, done.stderr
    assert "going on" in done.stderr
    assert content(out) == whole(places) and verify(out).ok


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_that_changes_after_it_was_listed_stops_the_run_and_is_named(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = storage.join(places["bucket"], "moving"), storage.join(places["bucket"], "moved")
    for item in storage.list_objects(places["archive"]):
        data = storage.read_bytes(storage.join(places["archive"], item.path))
        storage.write_bytes(storage.join(archive, item.path), data)
    changing = storage.join(archive, "00002.tar")
    listed = storage.read_bytes(changing)
    list_archive = engine.what_is_asked

    def list_then_change(*asked: Any) -> Run:
        run = list_archive(*asked)
        storage.write_bytes(changing, listed + bytes(10240))
        return run

    def run() -> dict[str, Any]:
        options = engine.ScoreOptions(chunk_rows=256)
        return engine.score(places["bundle"], archive, out, options, Console())

    with monkeypatch.context() as patch:
        patch.setattr(engine, "what_is_asked", list_then_change)
        with pytest.raises(MmrayError, match=r"00002\.tar: changed since it was listed") as caught:
            run()
    assert "put the listed version back" in str(caught.value) and "another output" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match=r"changed in the archive.*00002\.tar.*another --out"):
        run()
    storage.write_bytes(changing, listed)
    run()
    assert content(out) == whole(places) and verify(out).ok
