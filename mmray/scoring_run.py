"""What a scoring run was asked: run.json, written before the first row is read."""

from __future__ import annotations

import datetime
import io
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from mmray import storage
from mmray.archive import rows
from mmray.errors import ConfigError, Conflict, NotFound
from mmray.targets import SCHEMA, Targets

FORMAT = 1
RUN = "_run/run.json"
#: Columns of the targets -> their names below "archive" in run.json.
COLUMNS = {"path": "paths", "size": "sizes", "etag": "etags", "stop": "stops"}


@dataclass(frozen=True, slots=True)
class Caps:
    """What a picture may come to, where that is more than the bundle and the reader allow."""

    max_pixels: int = 0
    max_image_bytes: int = rows.MAX_IMAGE_BYTES

    def raised(self, other: Caps) -> Caps:
        """The higher of both."""
        return Caps(
            max(self.max_pixels, other.max_pixels),
            max(self.max_image_bytes, other.max_image_bytes),
        )


UNRAISED = Caps()


@dataclass(frozen=True, slots=True)
class Run:
    """``run.json``: everything a later command needs to go on, or to check."""

    archive: str
    bundle: str
    fingerprint: str
    labels: tuple[str, ...]
    targets: Targets
    chunk_rows: int
    embedding_dim: int | None = None
    trial: str | None = None  # the --limit it was made with; null: whole shards
    config: Mapping[str, Any] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    @property
    def caps(self) -> Caps:
        """The highest with which rows of this run were tried again."""
        return Caps(**self.config.get("caps", {}))

    def schema(self) -> pa.Schema:
        return rows.scores_schema(self.labels, self.embedding_dim)

    def to_json(self) -> bytes:
        tree = {
            "format": FORMAT,
            "run_id": self.run_id,
            "started": self.started,
            "bundle": {"uri": self.bundle, "fingerprint": self.fingerprint},
            "labels": list(self.labels),
            "embedding_dim": self.embedding_dim,
            "chunk_rows": self.chunk_rows,
            "trial": self.trial,
            "config": dict(self.config),
            "archive": {"uri": self.archive},
        }
        # The listing as columns, a batch at a time: a million shards stay a few tens of megabytes.
        text = io.BytesIO()
        text.write(_json(tree)[:-2])
        for name, key in COLUMNS.items():
            text.write(b', "%s": [' % key.encode())
            for i, chunk in enumerate(self.targets.table.column(name).chunks):
                text.write(b", " * (i > 0) + _json(chunk.to_pylist())[1:-1])
            text.write(b"]")
        text.write(b"}}")
        return text.getvalue()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Run:
        try:
            tree = json.loads(text)
            if tree["format"] != FORMAT:
                raise ConfigError(
                    f"{where}: run format {tree['format']}, this version writes {FORMAT}"
                )
            listed = tree["archive"]
            columns = [
                pa.array(listed.pop(key), SCHEMA.field(n).type) for n, key in COLUMNS.items()
            ]
            return cls(
                archive=listed["uri"],
                bundle=tree["bundle"]["uri"],
                fingerprint=tree["bundle"]["fingerprint"],
                labels=tuple(tree["labels"]),
                targets=Targets(pa.table(columns, names=list(COLUMNS))),
                chunk_rows=tree["chunk_rows"],
                embedding_dim=tree["embedding_dim"],
                trial=tree["trial"],
                config=tree["config"],
                run_id=tree["run_id"],
                started=tree["started"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{where}: not a run.json of mmray ({error!r})") from None


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def read_run(out: str) -> Run:
    """The run that OUT holds; raises NotFound when it holds none."""
    uri = storage.join(out, RUN)
    try:
        return Run.from_json(storage.read_bytes(uri), uri)
    except NotFound:
        raise NotFound(f"{out}: holds no scoring run (no {RUN})") from None


def open_run(out: str, asked: Run) -> tuple[Run, bool]:
    """Begin a run in OUT, or go on with the one it holds; says whether it goes on.

    Shards that are new in the archive join the run. Raises ConfigError, saying what differs, when
    OUT belongs to another bundle, another archive or other options, or when a shard has changed.
    """
    uri = storage.join(out, RUN)
    try:
        storage.write_bytes(uri, asked.to_json(), if_absent=True)
        return asked, False
    except Conflict:
        held = read_run(out)
    _refuse_differences(out, held, asked)
    new = ~asked.targets.among(held.targets.paths)
    if new.any():
        targets = held.targets.joined(asked.targets.take(new))
        held = replace(held, targets=targets, config={**held.config, **asked.config})
        storage.write_bytes(uri, held.to_json())
    return held, True


def record_caps(out: str, run: Run, caps: Caps) -> Run:
    """The run with these caps, written down before rows are tried with them."""
    raised = run.caps.raised(caps)
    if raised == run.caps:
        return run
    run = replace(run, config={**run.config, "caps": asdict(raised)})
    storage.write_bytes(storage.join(out, RUN), run.to_json())
    return run


def _refuse_differences(out: str, held: Run, asked: Run) -> None:
    pairs = {
        "bundle fingerprint": (held.fingerprint, asked.fingerprint),
        "archive": (held.archive, asked.archive),
        "trial (--limit)": (held.trial, asked.trial),
        "embedding width": (held.embedding_dim, asked.embedding_dim),
        "chunk rows": (held.chunk_rows, asked.chunk_rows),
    }
    for name, (had, wanted) in pairs.items():
        if had != wanted:
            raise ConfigError(
                f"{out}: holds scores of another run; {name}: it has {had or 'none'}, this command "
                f"asks for {wanted or 'none'}; choose another --out, or delete that one"
            )
    changed = held.targets.changed(asked.targets)
    if changed:
        raise ConfigError(
            f"{out}: {len(changed)} shard(s) changed in the archive since they were listed, first "
            f"{changed[0]}; score them into another --out"
        )
