"""Finished scoring runs, made without Ray by the Predictor itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyarrow as pa
import tiny

from mmray import bundle as bundles
from mmray import ledger, storage
from mmray.archive.rows import Sample, ShardEnd
from mmray.archive.shards import read_shard
from mmray.engine.asked import ScoreOptions, asked
from mmray.predict import Predictor
from mmray.scoring_run import Run, open_run

CHUNK_ROWS = 4
Refuse = Callable[[Sample], str | None]


def started(bundle: str, archive: object, out: object, **options: object) -> Run:
    """A run of which nothing is scored yet."""
    chosen = ScoreOptions(**{"chunk_rows": CHUNK_ROWS, **options})
    wanted = asked(bundle, bundles.read_manifest(bundle), str(archive), chosen)
    return open_run(str(out), wanted)[0]


def finished(
    bundle: str, archive: object, out: object, refuse: Refuse, **options: object
) -> dict[str, pa.Table]:
    """Make OUT as `mmray score` leaves it, but with every sample set aside for which ``refuse``
    gives an error. Returns what the score files would hold without that."""
    run = started(bundle, archive, out, **options)
    embeddings = run.embedding_dim is not None
    predictor, whole = Predictor(bundles.load(bundle)), {}
    for target in run.targets:
        *samples, end = read_shard(str(archive), target.shard)
        assert isinstance(end, ShardEnd)
        chunks = [samples[i : i + CHUNK_ROWS] for i in range(0, len(samples), CHUNK_ROWS)]
        scores = [predictor.score_table(chunk, embeddings=embeddings) for chunk in chunks]
        table = pa.concat_tables([run.schema().empty_table(), *scores]).combine_chunks()
        errors = {s.row: e for s in samples if (e := refuse(s)) is not None}
        whole[target.shard.path] = table
        if end.rows:
            part = set_aside(table, errors)
            ledger.write_part(str(out), target.shard.path, 0, end.rows, part)
        ledger.commit(str(out), run, target, end.rows, end.problem)
    return whole


def set_aside(scores: pa.Table, errors: Mapping[int, str]) -> pa.Table:
    """``scores`` with these rows set aside instead."""
    keep = ("shard", "row", "key")
    rows = [
        {name: row[name] for name in keep} | {"error": errors[row["row"]], "error_stage": "image"}
        if row["row"] in errors
        else row
        for row in scores.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=scores.schema)


def content(out: object) -> dict[str, pa.Table]:
    """The score files of OUT by shard."""
    root = storage.join(str(out), ledger.SCORES)
    return {
        item.path.removesuffix(".parquet"): ledger.read_scores(
            storage.join(root, item.path)
        ).replace_schema_metadata(None)
        for item in storage.list_objects(root)
    }


def reasons(out: object) -> dict[str, int]:
    """Rows set aside by reason, counted from the rows themselves."""
    counts: dict[str, int] = {}
    for table in content(out).values():
        for error in table.column("error").drop_null().to_pylist():
            counts[error.split(":")[0]] = counts.get(error.split(":")[0], 0) + 1
    return counts


BROKEN = [
    ("bad0.jpg", tiny.jpeg(7)[:300]),
    ("bad0.txt", b"cut in the middle"),
    ("bad1.txt", b"no picture at all"),
    ("bad2.jpg", tiny.jpeg(8)),
    ("bad3.jpg", b""),
    ("bad3.txt", b"an empty picture"),
    ("bad4.jpg", tiny.jpeg(9)),
    ("bad4.png", tiny.jpeg(10)),
    ("bad4.txt", b"two pictures"),
    ("bad5.jpg", tiny.jpeg(11)),
    ("bad5.txt", b"\xff\xfe not text"),
]
