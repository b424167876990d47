"""What a scoring command asks for: which shards, how many rows of each, and how."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmray import ledger
from mmray.archive import rows
from mmray.archive.shards import Shard, check_columns, list_shards, read_shard
from mmray.bundle import Manifest
from mmray.config import Columns
from mmray.engine.ingest import CHUNK_ROWS
from mmray.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """How to score; everything has a working default."""

    limit: int | None = None  # score only the first so many rows: a trial
    shards: str | None = None  # only the first N shards, or those matching a glob
    max_errors: float | None = None  # set-aside share in [0, 1] past which the run stops
    embeddings: bool = False
    chunk_rows: int = CHUNK_ROWS
    actors: int | None = None  # scoring actors; None: one a GPU, else one a CPU
    columns: Columns = Columns()


def asked(bundle: str, manifest: Manifest, archive: str, options: ScoreOptions) -> ledger.Run:
    """The run that a command asks for. Raises ConfigError when there is nothing to score."""
    shards = _selected(archive, options.shards)
    used = manifest.spec["config"]["modalities"]
    check_columns(
        archive, shards[0], options.columns, image=used != "text", caption=used != "image"
    )
    targets = [ledger.Target(shard) for shard in shards]
    if options.limit is not None:
        targets = list(_first_rows(archive, shards, options))
    return ledger.Run(
        archive=archive,
        bundle=bundle,
        fingerprint=manifest.fingerprint,
        labels=tuple(manifest.labels),
        targets=tuple(targets),
        chunk_rows=options.chunk_rows,
        embedding_dim=manifest.embedding_dim if options.embeddings else None,
        trial=None if options.limit is None else f"--limit {options.limit}",
        config={"columns": options.columns.model_dump(), "shards": options.shards},
    )


def _selected(archive: str, wanted: str | None) -> list[Shard]:
    shards = list(list_shards(archive))
    if wanted is not None:
        by_count = wanted.isdecimal()
        shards = (
            shards[: int(wanted)]
            if by_count
            else [shard for shard in shards if fnmatch.fnmatch(shard.path, wanted)]
        )
    if not shards:
        which = f" matching {wanted!r}" if wanted else ""
        raise ConfigError(f"{archive}: no .tar, .tar.gz, .tgz or .parquet shards{which}")
    return shards


def _first_rows(
    archive: str, shards: Sequence[Shard], options: ScoreOptions
) -> Iterator[ledger.Target]:
    """The shards that hold the first ``limit`` rows; counted by walking their headers."""
    left = options.limit or 0
    for shard in shards:
        if left <= 0:
            return
        *_, end = read_shard(archive, shard, columns=options.columns, images=False, stop=left)
        assert isinstance(end, rows.ShardEnd)
        yield ledger.Target(shard, min(left, end.rows))
        left -= end.rows
