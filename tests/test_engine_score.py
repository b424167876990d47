"""Scoring on a real Ray: every pair comes out exactly once, whatever happens on the way."""

from __future__ import annotations

import csv
import functools
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import tiny
from ray import cloudpickle

from mmray import bundle as bundles
from mmray import golden, ledger, storage, targets
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.engine import dataflow, guard, passes
from mmray.engine import score as engine
from mmray.engine.decoder import Decoder
from mmray.engine.pieces import Piece, Plan
from mmray.engine.scorer import Scorer
from mmray.errors import ConfigError, MmrayError, RunError
from mmray.model import int8
from mmray.predict import Predictor
from mmray.preprocess import Preprocessor, image
from mmray.quantize import quantize
from mmray.report.progress import Console
from mmray.rescore import rescore
from mmray.verify import verify

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.bundle(str(tmp_path_factory.mktemp("bundles") / "one"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad pairs in folders, an empty tar, a cut tar, and a file that is no tar."""
    root = tmp_path_factory.mktemp("archive")
    tiny.write_tar(root / "2024" / "a.tar", [*tiny.members(9), *runs.BROKEN, *tiny.members(3, 50)])
    tiny.write_archive(root / "2025", [5, 0, 12])
    cut = tiny.write_tar(root / "cut.tar", tiny.members(6))
    cut.write_bytes(cut.read_bytes()[:-9000])
    (root / "none.tar").write_bytes(b"this is no tar at all, only its name says so" * 40)
    return root


def run(bundle: str, archive: object, out: object, **options: object) -> dict[str, object]:
    """With one actor where no number is given: each takes seconds to start. Where one dies there
    are two, and all that a cluster has room for where rows are counted."""
    chosen = engine.ScoreOptions(**{"chunk_rows": 4, "actors": 1, **options})
    return engine.score(bundle, str(archive), str(out), chosen, Console())


def content(out: object) -> dict[str, pa.Table]:
    root = storage.join(str(out), ledger.SCORES)
    return {
        item.path: ledger.read_scores(storage.join(root, item.path)).replace_schema_metadata(None)
        for item in storage.list_objects(root)
    }


def expected(bundle: str, archive: Path, chunk_rows: int = 4) -> dict[str, pa.Table]:
    """What a plain loop over the archive with the same Predictor gives; no Ray, no parts."""
    predictor = Predictor(bundles.load(bundle))
    tables = {}
    for shard in list_shards(str(archive)):
        samples = [s for s in read_shard(str(archive), shard) if isinstance(s, Sample)]
        chunks = [samples[i : i + chunk_rows] for i in range(0, len(samples), chunk_rows)]
        scored = [predictor.score_table(chunk) for chunk in chunks]
        empty = ledger.rows.scores_schema(tiny.LABELS).empty_table()
        tables[shard.path + ".parquet"] = pa.concat_tables([empty, *scored]).combine_chunks()
    return tables


@pytest.mark.usefixtures("ray_cluster")
class TestOneRun:
    def test_rows_out_are_rows_in_with_the_scores_of_a_plain_loop(
        self, bundle: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        summary = run(bundle, archive, tmp_path, actors=None)
        assert content(tmp_path) == expected(bundle, archive)
        verdict = verify(str(tmp_path))
        assert verdict.ok and verdict.rows == summary["rows"] == 9 + 6 + 3 + 17 + 6
        aside = {
            row["key"]: row["error"].split(":")[0]
            for row in content(tmp_path)["2024/a.tar.parquet"].to_pylist()
            if row["error"]
        }
        assert aside == {
            "bad0": "image truncated",
            "bad1": "no image",
            "bad2": "no caption",
            "bad3": "image empty",
            "bad4": "two images under one key",
            "bad5": "caption not UTF-8",
        }
        problems = {item["shard"]: item["problem"] for item in summary["problems"]}
        assert problems.keys() == {"cut.tar", "none.tar"}
        assert "set aside" in capsys.readouterr().err

        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "scores").rglob("*.parquet")}
        again = run(bundle, archive, tmp_path)
        assert "nothing to do" in capsys.readouterr().err
        assert again["rows"] == summary["rows"] and again["seconds"] == summary["seconds"]
        assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "scores").rglob("*.parquet")}

        other = tiny.bundle(str(tmp_path / "other"), seed=1)
        with pytest.raises(ConfigError, match="bundle fingerprint"):
            run(other, archive, tmp_path)

    @pytest.mark.skipif(not int8.supported(), reason="this CPU does not multiply 8-bit integers")
    def test_a_quantized_bundle_is_scored_with_in_8_bits(
        self, bundle: str, archive: Path, tmp_path: Path
    ) -> None:
        quantized, out = str(tmp_path / "int8"), tmp_path / "out"
        quantize(bundle, str(archive), quantized, pairs=20)
        run(quantized, archive, out)
        found = content(out)
        assert found == expected(quantized, archive) != expected(bundle, archive)
        assert verify(str(out)).ok
        again, findings = rescore(str(out))
        assert again and not findings

    def test_a_run_says_how_many_rows_were_decided_in_float32(
        self, bundle: str, archive: Path, tmp_path: Path
    ) -> None:
        """They are what a run in bfloat16 is slower by."""
        made = bundles.load(bundle)
        assert made.golden is not None
        everything = {**made.golden.schema.metadata, golden.DOUBT: b"100"}
        train = made.training.train.model_copy(update={"precision": "bf16"})
        doubtful = replace(made, training=made.training.model_copy(update={"train": train}))
        doubtful.save(str(tmp_path / "b"), golden=made.golden.replace_schema_metadata(everything))
        summary = run(str(tmp_path / "b"), archive, tmp_path / "out")
        assert summary["decided_in_float32"] == summary["scored"] > 0
        assert "decided in float32" in (tmp_path / "out" / ledger.REPORT).read_text()

    @pytest.mark.parametrize("kind", ["tar", "parquet"])
    def test_readers_share_a_shard_far_larger_than_the_others(
        self, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        root = tiny.write_archive(tmp_path / "archive", [2, 160, 2, 2, 2, 2, 2, 2])
        large = root / "00001.tar"
        if kind == "parquet":
            found = [
                s
                for s in read_shard(str(root), next(list_shards(str(large))))
                if isinstance(s, Sample)
            ]
            columns = {"image": [s.image for s in found], "caption": [s.caption for s in found]}
            pq.write_table(pa.table(columns), large.with_suffix(".parquet"), row_group_size=15)
            large.unlink()
        monkeypatch.setattr(targets, "PART_BYTES", 1000)
        read: list[Piece] = []
        monkeypatch.setattr(
            passes, "Plan", lambda pieces: Plan(read.append(p) or p for p in pieces)
        )
        run(bundle, root, tmp_path / "out")
        assert content(tmp_path / "out") == expected(bundle, root)
        shares = [piece for piece in read if piece.shard.path.startswith(large.stem)]
        assert len(shares) >= 3 and sum(piece.whole for piece in shares) == 1
        assert verify(str(tmp_path / "out")).ok

    def test_parts_of_an_earlier_command_are_not_scored_again(
        self, bundle: str, archive: Path, tmp_path: Path
    ) -> None:
        run(bundle, archive, tmp_path / "whole")
        whole = ledger.read_scores(ledger.scores_uri(str(tmp_path / "whole"), "2025/00002.tar"))
        out = str(tmp_path / "half")
        marked = whole.slice(4, 4).set_column(2, "key", pa.array(["kept"] * 4))
        ledger.write_part(out, "2025/00002.tar", 4, 8, marked)
        run(bundle, archive, out)
        rows = content(out)["2025/00002.tar.parquet"]
        assert rows.column("key").to_pylist()[4:8] == ["kept"] * 4
        assert rows.drop(["key"]) == whole.replace_schema_metadata(None).drop(["key"])

    def test_hostile_images_cost_themselves_and_nothing_else(
        self, bundle: str, shared: Path, tmp_path: Path
    ) -> None:
        folder = shared / "data" / "bad-images"
        with open(folder / "MANIFEST.csv", newline="", encoding="utf-8") as handle:
            outcomes = {row["file"]: row["pillow_outcome"] for row in csv.DictReader(handle)}
        pairs = []
        for i, name in enumerate(sorted(outcomes)):
            pairs += [(f"bad{i:03d}.jpg", (folder / name).read_bytes())]
            pairs += [(f"bad{i:03d}.txt", b"whatever it may be"), *tiny.members(1, i)]
        tiny.write_tar(tmp_path / "archive" / "a.tar", pairs)
        summary = run(bundle, tmp_path / "archive", tmp_path / "out", chunk_rows=64)
        rows = content(tmp_path / "out")["a.tar.parquet"].to_pylist()
        scored = {row["key"] for row in rows if row["error"] is None}
        good = {f"bad{i:03d}" for i, name in enumerate(sorted(outcomes)) if outcomes[name] == "ok"}
        assert scored == good | {f"{i:05d}" for i in range(len(outcomes))}
        assert all(row["error"].startswith("image ") for row in rows if row["error"])
        assert (summary["rows"], summary["set_aside"]) == (280, 63)
        assert verify(str(tmp_path / "out")).ok

    def test_s3_to_s3(self, bundle: str, archive: Path, s3_endpoint: Any) -> None:
        s3_bucket = s3_endpoint.bucket()
        for source, name in ((archive, "archive"), (Path(bundle), "bundle")):
            for item in storage.list_objects(str(source)):
                data = storage.read_bytes(storage.join(str(source), item.path))
                storage.write_bytes(storage.join(s3_bucket, name, item.path), data)
        out = storage.join(s3_bucket, "out")
        run(storage.join(s3_bucket, "bundle"), storage.join(s3_bucket, "archive"), out)
        assert content(out) == expected(bundle, archive)
        assert verify(out).ok
        assert not ledger.covered(out)

    def test_a_trial_by_rows_and_by_shards(
        self, bundle: str, archive: Path, tmp_path: Path
    ) -> None:
        whole = expected(bundle, archive)
        summary = run(bundle, archive, tmp_path / "rows", limit=20)
        assert summary["rows"] == 20 and verify(str(tmp_path / "rows")).ok
        trial = content(tmp_path / "rows")
        some, full = trial["2025/00000.tar.parquet"], whole["2025/00000.tar.parquet"].slice(0, 2)
        assert some.drop(["p_calm", "p_wild"]) == full.drop(["p_calm", "p_wild"])
        assert some["p_calm"].to_pylist() == pytest.approx(full["p_calm"].to_pylist(), abs=1e-5)
        with pytest.raises(ConfigError, match="trial"):
            run(bundle, archive, tmp_path / "rows")

        summary = run(bundle, archive, tmp_path / "shards", shards="2025/*")
        assert summary["shards_done"] == 3 and verify(str(tmp_path / "shards")).ok
        run(bundle, archive, tmp_path / "shards")
        assert content(tmp_path / "shards") == whole and verify(str(tmp_path / "shards")).ok

    def test_decoding_beside_the_scoring_actors_changes_no_byte(
        self, bundle: str, archive: Path, tmp_path: Path
    ) -> None:
        summary = run(bundle, archive, tmp_path, actors=1, decoders=1)
        assert content(tmp_path) == expected(bundle, archive)
        assert verify(str(tmp_path)).ok and summary["set_aside"] == 7

    def test_embeddings_are_written_beside_the_scores(
        self, bundle: str, archive: Path, tmp_path: Path
    ) -> None:
        run(bundle, archive, tmp_path, embeddings=True, shards="2024/*")
        table = content(tmp_path)["2024/a.tar.parquet"]
        assert table.schema.field("embedding").type == pa.list_(pa.float16(), 16)
        assert table.column("embedding").null_count == 6
        assert table.drop(["embedding"]) == expected(bundle, archive)["2024/a.tar.parquet"]

    def test_the_error_budget_stops_a_run_that_goes_on_with_a_larger_one(
        self, bundle: str, tmp_path: Path
    ) -> None:
        pairs = [*tiny.members(100), *[(f"bad{i}.txt", b"no picture") for i in range(20)]]
        tiny.write_tar(tmp_path / "archive" / "a.tar", pairs)
        with pytest.raises(RunError, match="max-errors") as caught:
            run(bundle, tmp_path / "archive", tmp_path / "out", max_errors=0.001)
        assert caught.value.exit_code == 1
        summary = run(bundle, tmp_path / "archive", tmp_path / "out", max_errors=0.5)
        assert (summary["rows"], summary["set_aside"]) == (120, 20)

    def test_a_bundle_that_scores_otherwise_than_its_golden_pairs_is_refused(
        self, bundle: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dataflow, "Scorer", OffScorer)
        with pytest.raises(MmrayError, match="golden"):
            run(bundle, archive, tmp_path)

    @pytest.mark.parametrize("beside", [False, True])
    def test_rows_that_crash_never_end_or_eat_memory_are_set_aside_and_no_others(
        self,
        bundle: str,
        archive: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        beside: bool,
    ) -> None:
        workers: dict[str, object] = {"actors": 2}
        if beside:
            monkeypatch.setattr(dataflow, "Decoder", HarmedDecoder)
            workers = {"actors": 1, "decoders": 1}
        else:
            monkeypatch.setattr(dataflow, "Scorer", HarmedScorer)
        summary = run(bundle, archive, tmp_path, shards="2025/*", row_seconds=3.0, **workers)
        assert summary["rows"] == 17 and verify(str(tmp_path)).ok
        assert summary["recovery_s"] > 0
        rows = content(tmp_path)["2025/00002.tar.parquet"].to_pylist()
        assert {row["key"]: row["error"].split(":")[0] for row in rows if row["error"]} == {
            "00007": "decode crashed",
            "00009": "decode took too long",
            "00011": "decode took too much memory",
        }
        good = expected(bundle, archive)["2025/00002.tar.parquet"].to_pylist()
        for row, must in zip(rows, good, strict=True):
            if row["error"] is None:  # its batch lacks a row, so to the last bit it may differ
                assert row == pytest.approx(must, abs=1e-6)

    def test_a_row_that_kills_its_worker_is_set_aside_alone(
        self, bundle: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dataflow, "Scorer", MortalScorer)
        with pytest.raises(RunError, match="1 of 17 rows set aside"):
            run(bundle, archive, tmp_path, shards="2025/*", chunk_rows=2, max_errors=0.01, actors=2)
        summary = run(bundle, archive, tmp_path, shards="2025/*", chunk_rows=2, actors=2)
        rows = content(tmp_path)["2025/00002.tar.parquet"].to_pylist()
        assert [row["key"] for row in rows if row["error"]] == [KILLER]
        assert summary["reasons"] == {"worker died": 1}
        assert summary["rows"] == 17 and verify(str(tmp_path)).ok

    def test_what_is_unlucky_twice_gets_the_scores_of_an_undisturbed_run(
        self, bundle: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its worker dies in the first pass and in the next; its rows are scored together all the
        same, and so to the last bit as ever."""
        deaths = tmp_path / "deaths"
        deaths.mkdir()

        class UnluckyScorer(Scorer):
            def _score(self, samples: list[Sample], prepared: Any) -> dict[str, Any]:
                if any(sample.key == KILLER for sample in samples):
                    died = len(list(deaths.iterdir()))
                    (deaths / f"{died}-{len(samples)}").touch()
                    if died < 2:
                        os._exit(1)
                return super()._score(samples, prepared)

        monkeypatch.setattr(dataflow, "Scorer", UnluckyScorer)
        summary = run(bundle, archive, tmp_path / "out", shards="2025/*", actors=2)
        assert sorted(path.name for path in deaths.iterdir()) == ["0-4", "1-4", "2-4"]
        name = "2025/00002.tar.parquet"
        assert content(tmp_path / "out")[name] == expected(bundle, archive)[name]
        assert (summary["rows"], summary["set_aside"]) == (17, 0)


KILLER = "00007"


class MortalScorer(Scorer):
    """Dies like a decoder that crashes whenever it is given one certain row."""

    def _score(self, samples: list[Sample], prepared: Any) -> dict[str, Any]:
        if any(sample.key == KILLER for sample in samples):
            os._exit(1)
        return super()._score(samples, prepared)


def harm(preprocessor: Preprocessor) -> None:
    """Its decoder crashes, hangs or takes all memory, each on one row."""
    pixels = preprocessor._pixels

    def harmed(sample: Sample) -> Any:
        if sample.key == "00007":
            os.kill(os.getpid(), signal.SIGSEGV)
        while sample.key == "00009":
            time.sleep(1)
        if sample.key == "00011":
            with mock.patch.object(image, "_decode", eat):
                return pixels(sample)
        return pixels(sample)

    def eat(*_: object) -> None:
        held = []
        while True:
            held.append(bytes(64 << 20))

    preprocessor._pixels = harmed  # type: ignore[method-assign]


class HarmedScorer(Scorer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        harm(self._predictor.preprocessor)
        guard._limit(5 << 30)


class HarmedDecoder(Decoder):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        harm(self._prepare._preprocessor)
        guard._limit(5 << 30)


class OffScorer(Scorer):
    """Runs where the same weights give other scores."""

    def __init__(self, *args: object) -> None:
        forward = Predictor._run

        def off(self: Predictor, batch: object) -> object:
            outputs = forward(self, batch)
            outputs.probabilities[:] = outputs.probabilities[:, ::-1]
            return outputs

        Predictor._run = off
        try:
            super().__init__(*args)
        finally:
            Predictor._run = forward


# --- the command, killed -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough work to be interrupted four times: 6,000 pairs in three tars, of pictures that take
    their time; workers go on for a moment when their driver is killed."""
    root = tmp_path_factory.mktemp("large")
    pictures = [tiny.jpeg(i, size=1500) for i in range(8)]
    for shard in range(3):
        pairs = []
        for i in range(2000):
            pairs += [(f"{i:05d}.jpg", pictures[i % 8]), (f"{i:05d}.txt", tiny.caption(i).encode())]
        tiny.write_tar(root / f"{shard:05d}.tar", pairs)
    return root


class Command:
    """`mmray score` in a process of its own."""

    def __init__(self, bundle: str, archive: Path, out: Path) -> None:
        self._out, self._log = out, out.with_suffix(".log")
        line = [sys.executable, "-m", "mmray", "score", bundle, str(archive), "--out", str(out)]
        with self._log.open("w") as log:
            # A shell that runs the tests in the background lets them, and this, ignore Ctrl-C.
            heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            self.process = subprocess.Popen(line, stderr=log, preexec_fn=heed)

    def said(self) -> str:
        return self._log.read_text()

    def wait_for_parts(self) -> None:
        """Until it has scored something that was not there when it began to."""
        deadline, before = time.monotonic() + 120, None
        while self.process.poll() is None and time.monotonic() < deadline:
            if before is None and "scoring" in self.said():
                before = scored_files(self._out)
            elif before is not None and scored_files(self._out) - before:
                return
            time.sleep(0.05)
        raise AssertionError(f"the archive is too small to interrupt its scoring\n{self.said()}")

    def end(self, timeout: float, how: signal.Signals | None = None) -> int:
        if how is not None:
            self.process.send_signal(how)
        return self.process.wait(timeout)


def scored_files(out: Path) -> set[Path]:
    return {p for p in out.rglob("*.parquet") if p.is_relative_to(out / "_run" / "parts")}


def test_kill_9_and_ctrl_c_leave_a_run_that_the_same_command_finishes(
    bundle: str, large_archive: Path, tmp_path: Path
) -> None:
    out, chance = tmp_path / "out", random.Random(20261123)
    for how in (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
        command = Command(bundle, large_archive, out)
        command.wait_for_parts()
        time.sleep(chance.random() / 2)
        code = command.end(60, how)
        assert code == (130 if how == signal.SIGINT else -how), command.said()
    command = Command(bundle, large_archive, out)
    assert command.end(timeout=240) == 0, command.said()
    assert "going on" in command.said()
    assert content(out) == expected(bundle, large_archive, chunk_rows=256)
    assert verify(str(out)).ok and not scored_files(out)
    for file in (out / "scores").iterdir():
        assert pq.read_metadata(file).num_rows == 2000
