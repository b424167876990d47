"""A run that sets too much aside must not end as if all were well, however often it is begun."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import tiny

from mmray import bundle as bundles
from mmray import cli, ledger
from mmray.archive.rows import Sample
from mmray.archive.shards import read_shard
from mmray.budget import LEAST_ROWS, Budget
from mmray.errors import RunError
from mmray.predict import Predictor
from mmray.verify import verify


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.bundle(str(tmp_path_factory.mktemp("bundles") / "one"))


def write(root: Path, **shards: tuple[int, int]) -> str:
    """An archive of shards with so many good pairs, and so many without a picture."""
    for name, (good, bad) in shards.items():
        broken = [(f"bad{i}.txt", b"no picture") for i in range(bad)]
        tiny.write_tar(root / f"{name}.tar", [*tiny.members(good), *broken])
    return str(root)


def score(bundle: str, archive: str, out: Path, *options: str) -> int:
    return cli.run(["score", bundle, archive, "--out", str(out), *options])


def test_rows_are_judged_when_there_are_some_and_shards_by_how_many_there_are() -> None:
    budget = Budget("out", 0.01, shards=200)
    budget.take(rows=LEAST_ROWS - 1, set_aside=50)
    with pytest.raises(RunError, match=r"out: 50 of 100 rows set aside.*1\.000% allows"):
        budget.take(rows=1)
    budget = Budget("out", 0.01, shards=200)
    budget.take(unreadable=1)
    budget.take(unreadable=1)
    with pytest.raises(RunError, match="3 of 200 shards cannot be read"):
        budget.take(unreadable=1)
    Budget("out", None, shards=1).take(rows=200, set_aside=200, unreadable=1)


@pytest.mark.usefixtures("ray_cluster")
class TestCommand:
    def test_what_an_earlier_command_set_aside_counts_and_nothing_is_scored_twice(
        self, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        archive, out = write(tmp_path / "archive", a=(40, 20), b=(60, 0), c=(60, 0)), tmp_path / "o"
        assert score(bundle, archive, out, "--shards", "a.tar", "--max-errors", "50%") == 0
        assert score(bundle, archive, out, "--max-errors", "5%") == 1
        said = capsys.readouterr().err
        assert "mmray: " + str(out) + ": 20 of 1" in said and "more than --max-errors 5" in said
        assert score(bundle, archive, out, "--max-errors", "40%") == 0 and verify(str(out)).ok
        for options, code in ((["--max-errors", "11%"], 1), (["--max-errors", "12%"], 0), ([], 0)):
            assert score(bundle, archive, out, *options) == code
            assert "nothing to do" in capsys.readouterr().err

    def test_parts_of_a_killed_command_count(
        self, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        archive, out = write(tmp_path / "archive", a=(40, 80)), tmp_path / "out"
        run = runs.started(bundle, archive, out, chunk_rows=256)
        stream = read_shard(archive, run.targets[0].shard, stop=115)
        samples = [sample for sample in stream if isinstance(sample, Sample)]
        scores = Predictor(bundles.load(bundle)).score_table(samples)
        ledger.write_part(str(out), "a.tar", 0, 115, scores)
        assert score(bundle, archive, out, "--max-errors", "1%") == 1
        said = capsys.readouterr().err
        assert "75 of 115 rows set aside" in said and "scoring" not in said

    def test_a_few_rows_are_judged_at_the_end(
        self, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        archive, out = write(tmp_path / "archive", a=(10, 5)), tmp_path / "out"
        assert score(bundle, archive, out, "--max-errors", "1%") == 1
        assert "5 of 15 rows set aside" in capsys.readouterr().err
        assert verify(str(out)).ok and (out / "_run" / "summary.json").exists()
        assert cli.run(["retry", str(out), "--max-errors", "1%"]) == 1
        assert "5 of 5 rows set aside" in capsys.readouterr().err

    def test_shards_that_cannot_be_read_count(
        self, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        archive, out = write(tmp_path / "archive", a=(4, 0), b=(4, 0)), tmp_path / "out"
        (tmp_path / "archive" / "none.tar").write_bytes(b"no tar, only its name says so" * 400)
        assert score(bundle, archive, out, "--max-errors", "10%") == 1
        assert "1 of 3 shards cannot be read" in capsys.readouterr().err
        assert score(bundle, archive, out, "--max-errors", "40%") == 0 and verify(str(out)).ok
        assert score(bundle, archive, out, "--max-errors", "10%") == 1
