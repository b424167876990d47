"""What a scoring command asks for: which shards, how many rows of each, and how."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mmray.archive import rows
from mmray.archive.shards import check_columns, list_shards, read_shard
from mmray.bundle import Manifest
from mmray.config import Columns
from mmray.engine.guard import ROW_SECONDS
from mmray.engine.ingest import CHUNK_ROWS
from mmray.errors import ConfigError
from mmray.scoring_run import UNRAISED, Caps, Run
from mmray.targets import Target, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """How to score; everything has a working default."""

    limit: int | None = None  # score only the first so many rows: a trial
    shards: str | None = None  # only the first N shards, or those matching a glob
    max_errors: float | None = None  # set-aside share in [0, 1] past which the run stops
    embeddings: bool = False
    chunk_rows: int = CHUNK_ROWS
    actors: int | None = None  # scoring actors; None: one a GPU, else one a CPU
    decoders: int | None = None  # processes that decode beside them; None: where there are GPUs
    row_seconds: float = ROW_SECONDS  # that a row may take to prepare
    columns: Columns = Columns()
    caps: Caps = UNRAISED  # of pictures, where they are raised


def asked(bundle: str, manifest: Manifest, archive: str, options: ScoreOptions) -> Run:
    """The run that a command asks for. Raises ConfigError when there is nothing to score."""
    targets = _selected(archive, options.shards)
    model = manifest.spec["config"]
    used, missing = model["modalities"], model.get("missing", False)
    check_columns(
        archive,
        targets[0].shard,
        options.columns,
        image=used != "text" and not missing,
        caption=used != "image" and not missing,
    )
    if options.limit is not None:
        targets = Targets.of(_first_rows(archive, targets, options))
    return Run(
        archive=archive,
        bundle=bundle,
        fingerprint=manifest.fingerprint,
        labels=tuple(manifest.labels),
        targets=targets,
        chunk_rows=options.chunk_rows,
        embedding_dim=manifest.embedding_dim if options.embeddings else None,
        trial=None if options.limit is None else f"--limit {options.limit}",
        config={"columns": options.columns.model_dump(), "shards": options.shards},
    )


def _selected(archive: str, wanted: str | None) -> Targets:
    shards = list_shards(archive)
    if wanted is not None and wanted.isdecimal():
        shards = itertools.islice(shards, int(wanted))
    elif wanted is not None:
        shards = (shard for shard in shards if fnmatch.fnmatch(shard.path, wanted))
    targets = Targets.of(map(Target, shards))
    if not targets:
        which = f" matching {wanted!r}" if wanted else ""
        raise ConfigError(f"{archive}: no .tar, .tar.gz, .tgz or .parquet shards{which}")
    return targets


def _first_rows(archive: str, targets: Iterable[Target], options: ScoreOptions) -> Iterator[Target]:
    """The shards that hold the first ``limit`` rows; counted by walking their headers."""
    left = options.limit or 0
    for shard in (target.shard for target in targets):
        if left <= 0:
            return
        *_, end = read_shard(archive, shard, columns=options.columns, images=False, stop=left)
        assert isinstance(end, rows.ShardEnd)
        yield Target(shard, min(left, end.rows))
        left -= end.rows
