"""A retry would cost a user scores if it put its rows anywhere but where the reasons were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmray import ledger, rejects
from mmray.archive.shards import Shard
from mmray.errors import Conflict
from mmray.scoring_run import Run
from mmray.targets import Target, Targets

SHARD = Target(Shard("2024/a.tar", 100, "e1", "tar"))
RUN = Run("/archive", "/bundle", "f" * 64, ("cat", "dog"), Targets.of([SHARD]), 4, 2)
ERRORS = {1: "worker died: every time", 4: "image truncated: cut", 5: "no image"}


def table(ordinals: list[int], errors: dict[int, str], cat: float = 0.75) -> pa.Table:
    vector = np.array([cat, 1 - cat], np.float16)
    rows = [
        {"shard": SHARD.shard.path, "row": row, "key": f"k{row}"}
        | (
            {"error": errors[row], "error_stage": "image"}
            if row in errors
            else {"label": "cat", "p_cat": cat, "p_dog": 1 - cat, "embedding": vector}
        )
        for row in ordinals
    ]
    return pa.Table.from_pylist(rows, schema=RUN.schema())


@pytest.fixture
def out(tmp_path: Path) -> str:
    """Eight rows in one score file, three of them set aside."""
    ledger.write_part(str(tmp_path), SHARD.shard.path, 0, 8, table([*range(8)], ERRORS))
    ledger.commit(str(tmp_path), RUN, SHARD, 8, "no end-of-archive marker")
    return str(tmp_path)


def recommit(out: str, *reasons: str) -> ledger.ShardRecord:
    problem = ledger.read_record(ledger.scores_uri(out, SHARD.shard.path)).problem
    return rejects.recommit(out, RUN, SHARD, out + "/try", reasons, problem)


def scores(out: str) -> pa.Table:
    found = ledger.read_scores(ledger.scores_uri(out, SHARD.shard.path))
    return found.replace_schema_metadata(None)


def tried(out: str, ordinals: list[int], errors: dict[int, str]) -> None:
    """A part of a retry, of rows that need not follow each other."""
    part = table(ordinals, errors, cat=0.25)
    ledger.write_part(out + "/try", SHARD.shard.path, ordinals[0], ordinals[-1] + 1, part)


def test_retried_rows_take_their_place_and_all_others_stay(out: str) -> None:
    before = scores(out)
    tried(out, [1, 5], {5: "no image"})
    tried(out, [4], {4: "image corrupt: still"})
    record = recommit(out)
    assert ledger.read_record(ledger.scores_uri(out, SHARD.shard.path)) == record
    assert (record.rows, record.scored, record.set_aside) == (8, 6, 2)
    assert record.reasons == {"image corrupt": 1, "no image": 1}
    assert record.labels == {"cat": 6} and record.problem == "no end-of-archive marker"
    after = scores(out)
    others = pa.array([row not in ERRORS for row in range(8)])
    assert after.filter(others) == before.filter(others)
    assert after.slice(1, 1) == table([1], {}, cat=0.25)
    assert after["error"].to_pylist()[4:6] == ["image corrupt: still", "no image"]


def test_only_rows_of_the_reasons_asked_for_are_replaced(out: str) -> None:
    before = scores(out)
    tried(out, [1, 4, 5, 6], {})
    recommit(out, "worker died", "image")
    after = scores(out)
    assert after["error"].drop_null().to_pylist() == ["no image"]
    assert after.slice(6) == before.slice(6), "a row that had its scores keeps them"


def test_a_row_that_was_not_tried_stops_the_commit(out: str) -> None:
    before = scores(out)
    tried(out, [1, 4], {})
    with pytest.raises(Conflict, match=r"lacks row 5 of 2024/a\.tar"):
        recommit(out)
    assert scores(out) == before


def test_a_commit_that_is_made_again_or_changes_nothing_writes_nothing(out: str) -> None:
    file = Path(ledger.scores_uri(out, SHARD.shard.path))
    tried(out, [1, 4, 5], ERRORS)
    written = file.stat().st_mtime_ns
    recommit(out)
    assert file.stat().st_mtime_ns == written
    tried(out, [1, 4, 5], {5: "no image"})
    first = recommit(out)
    assert (written := file.stat().st_mtime_ns) and recommit(out) == first
    assert file.stat().st_mtime_ns == written


def test_reasons_are_asked_for_by_how_they_begin(out: str) -> None:
    def found(*reasons: str) -> list[int]:
        ordinals: list[int] = rejects.read(out, SHARD.shard.path, reasons)["row"].to_pylist()
        return ordinals

    assert found() == [1, 4, 5] and found("image") == [4] and found("no", "worker") == [1, 5]
    assert found("cut") == []
    record = ledger.read_record(ledger.scores_uri(out, SHARD.shard.path))
    assert rejects.counted(record, ["image"]) == {"image truncated": 1}
