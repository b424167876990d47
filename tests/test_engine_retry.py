"""Rows set aside get another try on a real Ray: what can be scored now is, nothing else moves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import tiny
from ray import cloudpickle

from mmray import cli, ledger, storage
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.archive.shards import Shard
from mmray.engine import dataflow
from mmray.engine import score as engine
from mmray.engine.losses import Losses
from mmray.engine.pieces import Piece
from mmray.engine.retry import PLACE, retry
from mmray.engine.scorer import Scorer
from mmray.errors import ConfigError, RunError
from mmray.report.progress import Console
from mmray.rescore import rescore
from mmray.verify import verify

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module

LARGE, DIED = "image too large: 9x9 pixels, cap 64", "worker died: every time it was tried"
KILLER = "00034"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.bundle(str(tmp_path_factory.mktemp("bundles") / "one"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Broken and good pairs, only good ones, none, and Parquet."""
    root = tmp_path_factory.mktemp("archive")
    tiny.write_tar(root / "2024" / "a.tar", [*tiny.members(9), *runs.BROKEN])
    tiny.write_tar(root / "b.tar", tiny.members(6, 20))
    tiny.write_tar(root / "empty.tar", [])
    tiny.write_tar(root / "c.tar", tiny.members(15, 30))
    images, captions = [tiny.jpeg(i) for i in range(8)], [tiny.caption(i) for i in range(8)]
    table = pa.table({"image": images, "caption": captions})
    pq.write_table(table, root / "d.parquet", row_group_size=3)
    return root


def refused(sample: Sample) -> str | None:
    """Every third row of three shards."""
    return LARGE if sample.shard != "b.tar" and sample.row % 3 == 0 and not sample.error else None


def died_or_refused(sample: Sample) -> str | None:
    """These, and four rows that killed their worker."""
    if sample.shard == "c.tar" and sample.row in (4, 5, 6, 13):
        return DIED
    return refused(sample)


def same(found: pa.Table, expected: pa.Table) -> None:
    """The same rows in the same order; scores to a rounding, as batches are cut otherwise."""
    numbers = [f.name for f in expected.schema if f.name.startswith(("p_", "embedding"))]
    assert found.drop(numbers) == expected.drop(numbers)
    for name in numbers:
        for one, other in zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, atol=2e-3)


def untouched(before: pa.Table, after: pa.Table) -> None:
    """Rows that had their scores before have the very same ones after."""
    had = pa.array([error is None for error in before["error"].to_pylist()], pa.bool_())
    assert after.filter(had) == before.filter(had)


def files(out: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (out / "scores").rglob("*.parquet")}


@pytest.mark.usefixtures("ray_cluster")
class TestRetry:
    def test_rows_that_can_be_scored_now_are_and_nothing_else_moves(
        self,
        bundle: str,
        archive: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        whole = runs.finished(bundle, archive, tmp_path, refused, embeddings=True)
        before, written = runs.content(tmp_path), files(tmp_path)
        assert verify(str(tmp_path)).ok
        summary = retry(str(tmp_path), Console())
        after = runs.content(tmp_path)
        assert after.keys() == before.keys() == whole.keys()
        for shard, table in after.items():
            same(table, whole[shard])
            untouched(before[shard], table)
        assert after["c.tar"].schema.field("embedding").type == pa.list_(pa.float16(), 16)
        assert verify(str(tmp_path)).ok

        assert summary["retried"] == {"rows": 17, "scored": 11, "set_aside": 6}
        kept = json.loads((tmp_path / "_run" / "summary.json").read_text())
        assert kept == {k: v for k, v in summary.items() if k != "retried"}
        assert (kept["rows"], kept["set_aside"]) == (15 + 6 + 15 + 8, 6)
        assert kept["reasons"] == runs.reasons(tmp_path)
        assert "image too large" not in (tmp_path / "_run" / "report.html").read_text()
        assert not (tmp_path / PLACE).exists() and not ledger.covered(str(tmp_path))
        again = files(tmp_path)
        moved = {p.name for p in again if again[p] != written[p]}
        assert moved == {"a.tar.parquet", "c.tar.parquet", "d.parquet.parquet"}

        options = engine.ScoreOptions(chunk_rows=runs.CHUNK_ROWS, embeddings=True)
        capsys.readouterr()
        engine.score(bundle, str(archive), str(tmp_path), options, Console())
        assert "nothing to do" in capsys.readouterr().err
        assert files(tmp_path) == again

    def test_only_the_reasons_asked_for_on_s3(
        self, bundle: str, archive: Path, s3_endpoint: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bucket = s3_endpoint.bucket()
        for source, name in ((archive, "archive"), (Path(bundle), "bundle")):
            for item in storage.list_objects(str(source)):
                data = storage.read_bytes(storage.join(str(source), item.path))
                storage.write_bytes(storage.join(bucket, name, item.path), data)
        there, out = storage.join(bucket, "bundle"), storage.join(bucket, "out")
        whole = runs.finished(there, storage.join(bucket, "archive"), out, died_or_refused)
        before = runs.reasons(out)
        assert cli.run(["retry", out, "--reason", "worker", "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["retried"] == {"rows": 4, "scored": 4, "set_aside": 0}
        assert runs.reasons(out) == {k: v for k, v in before.items() if k != "worker died"}
        same(runs.content(out)["c.tar"].slice(4, 2), whole["c.tar"].slice(4, 2))
        assert verify(out).ok and not list(storage.list_objects(storage.join(out, "_run/retry")))
        assert cli.run(["retry", out, "--reason", "worker"]) == 0
        assert "nothing to retry: no row" in capsys.readouterr().err

    def test_a_row_that_kills_again_is_set_aside_again_and_takes_no_other(
        self, bundle: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = runs.finished(bundle, archive, tmp_path, died_or_refused)
        monkeypatch.setattr(dataflow, "Scorer", MortalScorer)
        summary = retry(str(tmp_path), Console(), actors=1)
        assert summary["reasons"]["worker died"] == 1 and verify(str(tmp_path)).ok
        for shard, table in runs.content(tmp_path).items():
            killer = [shard == "c.tar" and key == KILLER for key in table["key"].to_pylist()]
            rest = pa.array([not one for one in killer], pa.bool_())
            same(table.filter(rest), whole[shard].filter(rest))

    def test_higher_caps_let_pictures_in_that_were_too_large(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bundle = tiny.bundle(str(tmp_path / "bundle"), max_pixels=64 * 64)
        root, out = tmp_path / "archive", tmp_path / "out"
        tiny.write_tar(root / "b.tar", tiny.members(6, 20))
        huge = [("x.jpg", tiny.jpeg(1) + bytes(rows.MAX_IMAGE_BYTES)), ("x.txt", b"a long file")]
        large = [("y.jpg", tiny.jpeg(2, size=96)), ("y.txt", b"a large picture")]
        tiny.write_tar(root / "a.tar", [*tiny.members(5), *huge, *large, *runs.BROKEN])
        runs.finished(bundle, root, out, lambda _: None)
        before, written = runs.content(out), files(out)
        assert runs.reasons(out)["image too large"] == 2

        def retried(*options: str) -> dict[str, Any]:
            assert cli.run(["retry", str(out), "--json", *options]) == 0
            summary: dict[str, Any] = json.loads(capsys.readouterr().out)
            verdict, (_, findings) = verify(str(out)), rescore(str(out))
            assert verdict.ok and not findings
            return summary

        asked = ["--reason", "image too large"]
        assert retried(*asked)["retried"] == {"rows": 2, "scored": 0, "set_aside": 2}
        assert files(out) == written
        summary = retried(*asked, "--max-pixels", str(96 * 96))
        assert summary["retried"] == {"rows": 2, "scored": 1, "set_aside": 1}
        assert summary["caps"]["max_pixels"] == 96 * 96
        assert "max_pixels 9,216" in (out / "_run" / "report.html").read_text()
        summary = retried("--max-image-bytes", str(rows.MAX_IMAGE_BYTES + 10_000))
        assert "image too large" not in summary["reasons"] and summary["retried"]["scored"] == 1
        assert summary["caps"]["max_pixels"] == 96 * 96
        after = {row["key"]: row for row in runs.content(out)["a.tar"].to_pylist()}
        assert after["x"]["label"] and after["y"]["label"]
        untouched(before["a.tar"], runs.content(out)["a.tar"])
        moved = {p.name for p, held in files(out).items() if held != written[p]}
        assert moved == {"a.tar.parquet"}

    def test_more_failures_than_allowed_stop_it_and_lose_nothing(
        self, bundle: str, tmp_path: Path
    ) -> None:
        pairs = [(f"bad{i}.txt", b"no picture") for i in range(120)]
        tiny.write_tar(tmp_path / "archive" / "a.tar", [*pairs, *tiny.members(20)])
        out = tmp_path / "out"
        runs.finished(bundle, tmp_path / "archive", out, lambda _: LARGE)
        before = files(out)
        with pytest.raises(RunError, match="max-errors") as caught:
            retry(str(out), Console(), max_errors=0.1)
        assert caught.value.exit_code == 1 and files(out) == before and verify(str(out)).ok


def test_another_bundle_in_its_place_is_refused_before_ray_starts(
    archive: Path, tmp_path: Path
) -> None:
    bundle = tiny.bundle(str(tmp_path / "bundle"))
    runs.finished(bundle, archive, tmp_path / "out", refused)
    before = files(tmp_path / "out")
    storage.delete_all(bundle)
    tiny.bundle(bundle, seed=1)
    with pytest.raises(ConfigError, match="fingerprint"):
        retry(str(tmp_path / "out"), Console())
    assert files(tmp_path / "out") == before


class MortalScorer(Scorer):
    """Dies like a decoder that crashes whenever it is given one certain row."""

    def _score(self, samples: list[Sample], prepared: None) -> dict[str, Any]:
        if any(sample.key == KILLER for sample in samples):
            os._exit(1)
        return super()._score(samples, prepared)


# --- pieces of scattered rows --------------------------------------------------------------------


def test_a_piece_of_some_rows_skips_all_others() -> None:
    piece = Piece(Shard("a.tar", 1, "", "tar"), 7).only([(2, 4), (6, 7), (9, 12)], chunk_rows=1)
    wanted = [row for row in range(piece.start, piece.stop or 0) if not piece.skips(row)]
    assert wanted == [2, 3, 6, 9, 10, 11]
    assert (piece.index, piece.whole, piece.chunk_rows) == (7, False, 1)
    assert not any(Piece(piece.shard).skips(row) for row in range(5))


def test_what_died_before_runs_alone_and_the_rest_in_chunks() -> None:
    of = Piece(Shard("a.tar", 1, "", "tar"))
    losses = Losses({"a.tar": [3, 8]})
    alone, others = losses.pieces(of, [(2, 5), (8, 9), (20, 22)])
    assert (alone.start, alone.stop, alone.covered, alone.chunk_rows) == (3, 9, ((4, 8),), 1)
    assert (others.start, others.stop, others.chunk_rows) == (2, 22, None)
    assert others.covered == ((3, 4), (5, 20))
    assert list(losses.pieces(of, [])) == []


# --- the command, killed -------------------------------------------------------------------------


def test_kill_9_in_the_middle_loses_nothing_and_the_same_command_goes_on(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "archive", tmp_path / "out"
    pictures = [tiny.jpeg(i, size=1500) for i in range(4)]
    for shard in range(6):
        pairs: list[tuple[str, bytes]] = []
        for i in range(300):
            pairs += [(f"{i:05d}.jpg", pictures[i % 4]), (f"{i:05d}.txt", tiny.caption(i).encode())]
        tiny.write_tar(root / f"{shard:05d}.tar", pairs)
    whole = made_of_one_shard(bundle, root, out)
    before = runs.content(out)

    with running(out) as command:
        wait_until(lambda: runs.reasons(out)["image too large"] < 6 * 200, command, out)
        command.send_signal(signal.SIGKILL)
        assert command.wait(60) == -signal.SIGKILL
    assert verify(str(out)).ok, "killed anywhere, the run holds"
    assert 0 < runs.reasons(out)["image too large"] < 6 * 200
    with running(out) as command:
        assert command.wait(120) == 0, log(out)
    assert runs.reasons(out) == {} and verify(str(out)).ok and not (out / PLACE).exists()
    for shard, table in runs.content(out).items():
        same(table, whole.set_column(0, "shard", pa.array([shard] * 300)))
        untouched(before[shard], table)
    options = engine.ScoreOptions(chunk_rows=runs.CHUNK_ROWS)
    engine.score(bundle, str(root), str(out), options, Console())
    assert "nothing to do" in capsys.readouterr().err


def made_of_one_shard(bundle: str, root: Path, out: Path) -> pa.Table:
    """A run over equal shards with two of three rows set aside, scored once; what one holds."""
    one = root.parent / "one"
    one.mkdir()
    (one / "00000.tar").symlink_to(root / "00000.tar")
    whole = runs.finished(bundle, one, root.parent / "scratch", lambda _: None)["00000.tar"]
    errors = {row: LARGE for row in range(300) if row % 3}
    run = runs.started(bundle, root, out)
    for target in run.targets:
        shard = target.shard.path
        table = runs.set_aside(whole, errors).set_column(0, "shard", pa.array([shard] * 300))
        ledger.write_part(str(out), shard, 0, 300, table)
        ledger.commit(str(out), run, target, 300, None)
    return whole


def running(out: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "mmray", "retry", str(out), "--actors", "1"]
    with out.with_suffix(".log").open("a") as text:
        return subprocess.Popen(line, stderr=text, env=os.environ | {"RAY_ADDRESS": "local"})


def log(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def wait_until(done: Any, command: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert command.poll() is None and time.monotonic() < deadline, log(out)
        time.sleep(0.02)
