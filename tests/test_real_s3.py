"""What only a real S3 server shows: Ceph's RADOS gateway, over HTTPS.

An emulator takes what servers refuse. tests/test_storage.py holds the gateway to all that it holds
the others to; here is what is S3's alone, and a whole scoring run. A user of such a server would
lose pairs, or could not write a byte.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest
import runs
import tiny
from archives import read
from botocore.exceptions import ClientError
from test_archive_remote import SHARDS

from mmray import ledger, storage
from mmray.demo.child import Child
from mmray.demo.run import Size, Story, download, make_archive, score_and_kill, score_to_the_end
from mmray.errors import Conflict
from mmray.report.progress import Console

pytestmark = pytest.mark.real_s3


@pytest.fixture
def bucket(real_s3: Any) -> str:
    return str(real_s3.bucket())


def names(root: str) -> list[str]:
    return [item.path for item in storage.list_objects(root)]


def test_more_keys_than_fit_a_page_are_listed_and_deleted(bucket: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: storage.write_bytes(f"{bucket}/p/{n:05d}", b""), range(1001)))
    storage.write_bytes(f"{bucket}/pq", b"not below p")
    assert names(f"{bucket}/p") == [f"{number:05d}" for number in range(1001)]
    storage.delete_all(f"{bucket}/p")
    assert names(bucket) == ["pq"]


def test_a_large_file_goes_up_in_parts(bucket: str, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(20_000_000)
    (tmp_path / "source").write_bytes(data)
    storage.write_file(f"{bucket}/large", tmp_path / "source")
    assert storage.stat(f"{bucket}/large").etag.endswith("-3"), "not written as three parts"
    assert storage.read_bytes(f"{bucket}/large") == data


def test_of_many_writers_of_an_absent_object_one_wins(bucket: str) -> None:
    """Two commands that begin a run in the same place would otherwise mix their scores."""

    def won(number: int) -> bool:
        try:
            storage.write_bytes(f"{bucket}/run.json", b"%d" % number, if_absent=True)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        (winner,) = [number for number, first in enumerate(pool.map(won, range(8))) if first]
    assert storage.read_bytes(f"{bucket}/run.json") == b"%d" % winner


def test_bytes_of_two_versions_are_never_mixed(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/x", b"1" * 4_000_000)
    with storage.open_read(f"{bucket}/x") as stream:
        assert stream.read(10) == b"1" * 10
        storage.write_bytes(f"{bucket}/x", b"2" * 4_000_000)
        stream.seek(3_000_000)
        with pytest.raises(Conflict, match="changed"):
            stream.read(10)


@pytest.mark.parametrize("name", SHARDS)
def test_shards_read_as_they_do_from_a_disk(bucket: str, tmp_path: Path, name: str) -> None:
    for root in (bucket, str(tmp_path)):
        storage.write_bytes(storage.join(root, name), SHARDS[name])
    samples, (end,) = read(bucket, fields=("*",))
    assert (samples, [end]) == read(tmp_path, fields=("*",))
    assert len(samples) >= 40 and end.problem is None


def test_checksums_in_trailers_are_refused_and_mmray_sends_none(bucket: str) -> None:
    """The SDK's default, over HTTPS. When the gateway takes them, mmray.s3 need not avoid them."""
    request = {"Bucket": bucket.removeprefix("s3://"), "Key": "x", "Body": b"x"}
    with pytest.raises(ClientError) as refused:
        boto3.session.Session().client("s3").put_object(**request)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 411
    storage.client().put_object(**request)
    assert storage.read_bytes(f"{bucket}/x") == b"x"


# --- a whole run ---------------------------------------------------------------------------------


def scores(out: str) -> dict[str, pa.Table]:
    return {
        shard: ledger.read_scores(ledger.scores_uri(out, shard))
        for shard in ledger.done_shards(out).to_pylist()
    }


def written(root: str) -> Iterator[tuple[str, object]]:
    """Every object of a bucket, and when it was written."""
    pages = storage.client().get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=root.removeprefix("s3://")):
        yield from ((item["Key"], item["LastModified"]) for item in page["Contents"])


@pytest.mark.timeout(600)
def test_an_archive_is_scored_killed_continued_and_verified(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    said = io.StringIO()
    story, out = Story(Console(said)), f"{bucket}/scored"
    size = Size(pairs=400, broken=4, odd=20, shard_rows=10)
    make_archive(tmp_path / "source", f"{bucket}/archive", size, story)
    tiny.bundle(f"{bucket}/bundle")
    command = ["score", f"{bucket}/bundle", f"{bucket}/archive", "--out", out]
    score_and_kill(command, bucket, story)
    assert 0 < len(ledger.done_shards(out)) < 41, said.getvalue()
    score_to_the_end(command, story)
    assert "going on: " in said.getvalue()

    before = dict(written(bucket))
    score_to_the_end(command, story)
    assert "nothing to do" in said.getvalue()
    changed = {key for key, when in written(bucket) if before.get(key) != when}
    assert not {key for key in changed if "scores/" in key}

    with Child(["verify", out], story.within("verify")) as child:
        child.check()
    assert "420 rows = 406 scored + 14 set aside" in said.getvalue()

    for name in ("archive", "bundle"):
        download(f"{bucket}/{name}", tmp_path / name)
    local = [str(tmp_path / name) for name in ("bundle", "archive", "out")]
    score_to_the_end(["score", *local[:2], "--out", local[2]], story)
    assert scores(out) == scores(local[2])  # what Parquet metadata says of the run apart


@pytest.mark.timeout(600)
def test_what_was_set_aside_is_handed_out_and_tried_again_in_place(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    said = io.StringIO()
    story, out = Story(Console(said)), f"{bucket}/scored"
    tiny.bundle(f"{bucket}/bundle")
    for name, pairs in {
        "a.tar": [*tiny.members(9), *runs.BROKEN],
        "b.tar": tiny.members(6),
    }.items():
        tar = tiny.write_tar(tmp_path / name, pairs)
        storage.write_bytes(f"{bucket}/archive/{name}", tar.read_bytes())
    large = "image too large: 9x9 pixels, cap 64"
    whole = runs.finished(
        f"{bucket}/bundle",
        f"{bucket}/archive",
        out,
        lambda sample: large if sample.shard == "a.tar" and sample.row < 3 else None,
    )
    before = dict(written(bucket))

    def command(*line: str) -> None:
        with Child(list(line), story.within(line[0])) as child:
            child.check()

    command("rejects", out, "--reason", "image too large", "--export", f"{bucket}/rejects")
    manifest = storage.read_bytes(f"{bucket}/rejects/manifest.csv").decode()
    assert manifest.count("image too large") == 3 and "a.tar" in manifest
    (tar,) = [name for name in names(f"{bucket}/rejects") if name.endswith(".tar")]
    assert tiny.jpeg(1) in storage.read_bytes(f"{bucket}/rejects/{tar}")

    command("retry", out, "--reason", "image too large")
    after = scores(out)
    assert after["a.tar"].column("error").slice(0, 9).null_count == 9, said.getvalue()
    assert after["a.tar"].slice(3).equals(whole["a.tar"].slice(3))
    changed = {key for key, when in written(bucket) if key in before and before[key] != when}
    assert {key for key in changed if "/scores/" in key} == {"scored/scores/a.tar.parquet"}
    assert not names(f"{out}/_run/retry")
    command("verify", out, "--deep")
