"""A user would lose rows, or pay for them twice, if the ledger miscounted what is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray import ledger
from mmray.archive.shards import Shard
from mmray.errors import ConfigError, NotFound
from mmray.scoring_run import Run, open_run, read_run
from mmray.targets import Target, Targets
from mmray.verify import verify

LABELS = ("cat", "dog")


def target(name: str = "2024/00000.tar", size: int = 10, etag: str = "e1") -> Target:
    return Target(Shard(name, size, etag, "tar"))


def make_run(*targets: Target, **changes: object) -> Run:
    values = {
        "archive": "/archive",
        "bundle": "/bundle",
        "fingerprint": "f" * 64,
        "labels": LABELS,
        "targets": Targets.of(targets or (target(),)),
        "chunk_rows": 4,
    }
    return Run(**(values | changes))


def scores(shard: str, start: int, stop: int, aside: frozenset[int] = frozenset()) -> pa.Table:
    rows = [
        {
            "shard": shard,
            "row": row,
            "key": f"k{row}",
            "error": "image truncated: cut",
            "error_stage": "image",
        }
        if row in aside
        else {
            "shard": shard,
            "row": row,
            "key": f"k{row}",
            "label": "cat",
            "p_cat": 0.9,
            "p_dog": 0.1,
        }
        for row in range(start, stop)
    ]
    return pa.Table.from_pylist(rows, schema=make_run().schema())


def test_gaps_are_what_the_intervals_leave_out() -> None:
    assert ledger.gaps([], 0, 5) == [(0, 5)]
    assert ledger.gaps([(0, 5)], 0, 5) == []
    assert ledger.gaps([(1, 2), (4, 9)], 0, 10) == [(0, 1), (2, 4), (9, 10)]
    assert ledger.gaps([(0, 3), (2, 4)], 0, 4) == []
    assert ledger.gaps([], 0, 0) == []
    assert ledger.joined([(4, 6), (0, 2), (2, 4), (8, 9), (5, 7)]) == [(0, 7), (8, 9)]


def test_commit_merges_overlapping_parts_into_every_row_once(tmp_path: Path) -> None:
    out, one = str(tmp_path), target()
    shard = one.shard.path
    for start, stop in ((0, 4), (4, 8), (4, 6), (6, 8), (8, 9)):
        ledger.write_part(out, shard, start, stop, scores(shard, start, stop, frozenset({5})))
    record = ledger.commit(out, make_run(one), one, 9, None)
    assert (record.rows, record.scored, record.set_aside) == (9, 8, 1)
    assert record.reasons == {"image truncated": 1} and record.labels == {"cat": 8}
    table = pq.read_table(tmp_path / "scores" / "2024" / "00000.tar.parquet")
    assert table.column("row").to_pylist() == list(range(9))
    assert table.column("error").to_pylist()[5] == "image truncated: cut"
    assert ledger.read_record(ledger.scores_uri(out, shard)) == record
    assert ledger.covered(out) == {} and ledger.done_shards(out).to_pylist() == [shard]


def test_commit_called_again_after_its_put_finds_the_shard_committed(tmp_path: Path) -> None:
    out, one = str(tmp_path), target()
    shard, run = one.shard.path, make_run(one)
    ledger.write_part(out, shard, 0, 9, scores(shard, 0, 9, frozenset({5})))
    record = ledger.commit(out, run, one, 9, None)
    before = (tmp_path / "scores" / "2024" / "00000.tar.parquet").read_bytes()
    assert ledger.commit(out, run, one, 9, None) == record
    ledger.write_part(out, shard, 4, 9, scores(shard, 4, 9))  # the others were dropped already
    assert ledger.commit(out, run, one, 9, None) == record and ledger.covered(out) == {}
    assert (tmp_path / "scores" / "2024" / "00000.tar.parquet").read_bytes() == before


def test_commit_refuses_a_shard_with_a_gap(tmp_path: Path) -> None:
    out, one = str(tmp_path), target()
    ledger.write_part(out, one.shard.path, 0, 4, scores(one.shard.path, 0, 4))
    ledger.write_part(out, one.shard.path, 5, 8, scores(one.shard.path, 5, 8))
    with pytest.raises(AssertionError, match="cover rows up to 4"):
        ledger.commit(out, make_run(one), one, 8, None)
    assert len(ledger.done_shards(out)) == 0


def test_an_unreadable_shard_is_committed_empty_with_its_problem(tmp_path: Path) -> None:
    out, one = str(tmp_path), target()
    record = ledger.commit(out, make_run(one), one, 0, "no tar: begins with b'hello'")
    assert (record.rows, record.problem) == (0, "no tar: begins with b'hello'")
    assert pq.read_table(tmp_path / "scores" / "2024" / "00000.tar.parquet").num_rows == 0


def test_run_survives_its_json() -> None:
    run = make_run(target(), target("b.parquet"), trial="--limit 3", embedding_dim=8)
    assert Run.from_json(run.to_json(), "here") == run


def test_a_run_json_of_another_version_or_none_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no scoring run"):
        read_run(str(tmp_path))
    tree = json.loads(make_run().to_json()) | {"format": 99}
    for text in (json.dumps(tree).encode(), b"{}", b"not json", b"\xff"):
        with pytest.raises(ConfigError):
            Run.from_json(text, "here")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"fingerprint": "a" * 64}, "bundle fingerprint"),
        ({"archive": "/other"}, "archive"),
        ({"trial": "--limit 5"}, "trial"),
        ({"embedding_dim": 4}, "embedding"),
    ],
)
def test_another_runs_out_is_refused(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    open_run(str(tmp_path), make_run())
    with pytest.raises(ConfigError, match=word):
        open_run(str(tmp_path), make_run(**changes))


def test_a_changed_shard_is_refused_and_a_new_one_joins(tmp_path: Path) -> None:
    out = str(tmp_path)
    first, resumed = open_run(out, make_run(target("a.tar")))
    assert not resumed
    with pytest.raises(ConfigError, match=r"a\.tar"):
        open_run(out, make_run(target("a.tar", etag="e2")))
    grown, resumed = open_run(out, make_run(target("a.tar"), target("b.tar")))
    assert resumed and grown.run_id == first.run_id
    assert [t.shard.path for t in grown.targets] == ["a.tar", "b.tar"]
    assert read_run(out) == grown


# --- verify --------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Run]:
    """An OUT of two shards whose archive exists, as score leaves it."""
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for name in ("a.tar", "b.tar"):
        (archive / name).write_bytes(name.encode() * 100)
    from mmray.archive.shards import list_shards

    targets = [Target(shard) for shard in list_shards(str(archive))]
    run, _ = open_run(str(out), make_run(*targets, archive=str(archive)))
    for one in targets:
        ledger.write_part(str(out), one.shard.path, 0, 4, scores(one.shard.path, 0, 4))
        ledger.commit(str(out), run, one, 4, None)
    return tmp_path, run


def rewrite(path: Path, change: object) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def table_rows(first: int, count: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.slice(first, count)


def test_verify_reads_no_scores(
    finished: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    read = pq.ParquetFile.read

    def noted(self: pq.ParquetFile, columns: object = None, **options: object) -> pa.Table:
        asked.append(columns)
        return read(self, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", noted)
    assert verify(str(finished[0] / "out")).ok
    assert asked == [["row"], ["row"]]


def test_verify_counts_a_whole_run(finished: tuple[Path, Run]) -> None:
    verdict = verify(str(finished[0] / "out"))
    assert verdict.ok and (verdict.shards, verdict.rows, verdict.scored) == (2, 8, 8)


def test_verify_finds_what_was_done_to_a_run(finished: tuple[Path, Run]) -> None:
    base, _ = finished
    out, file = str(base / "out"), base / "out" / "scores" / "a.tar.parquet"
    whole = file.read_bytes()

    def finding() -> str:
        verdict = verify(out)
        assert not verdict.ok
        file.write_bytes(whole)
        return " ".join(verdict.findings)

    file.unlink()
    assert "a.tar: not scored yet" in finding()
    file.write_bytes(whole[: len(whole) // 2])
    assert "not a whole" in finding()
    rewrite(file, lambda table: pa.concat_tables([table.slice(0, 3), table.slice(0, 1)]))
    assert "1 missing (first 3), 1 doubled (first 0)" in finding()
    doubled = [table_rows(0, 2), table_rows(1, 1), table_rows(3, 1)]
    rewrite(file, lambda table: pa.concat_tables([cut(table) for cut in doubled]))
    assert "1 missing (first 2), 1 doubled (first 1)" in finding()
    rewrite(file, lambda table: table.slice(0, 3))
    assert "holds 3 rows, its record says 4" in finding()
    file.write_bytes((base / "out" / "scores" / "b.tar.parquet").read_bytes())
    assert "names shard b.tar" in finding()
    (base / "out" / "scores" / "c.tar.parquet").write_bytes(whole)
    assert "c.tar: has scores but is not in" in finding()
    (base / "out" / "scores" / "c.tar.parquet").unlink()
    (base / "archive" / "b.tar").write_bytes(b"changed")
    assert "b.tar: changed in the archive" in finding()


def test_verify_finds_another_bundles_file(finished: tuple[Path, Run]) -> None:
    base, run = finished
    one = run.targets[0]
    other = make_run(*run.targets, archive=run.archive, fingerprint="0" * 64, run_id=run.run_id)
    ledger.write_part(str(base / "out"), one.shard.path, 0, 4, scores(one.shard.path, 0, 4))
    ledger.commit(str(base / "out"), other, one, 4, None)
    assert "scored by bundle 000000" in " ".join(verify(str(base / "out")).findings)
