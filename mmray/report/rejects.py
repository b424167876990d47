"""What a run set aside: counts by reason, and a few rows of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmray import ledger, rejects, storage
from mmray.archive import rows
from mmray.scoring_run import read_run


@dataclass(frozen=True, slots=True)
class Example:
    """One row set aside; ``error`` is its whole text."""

    shard: str
    row: int
    key: str
    error: str
    error_stage: str


@dataclass(slots=True)
class Rejects:
    """Rows set aside, of ``rows`` in ``shards`` that are committed; ``examples`` by reason."""

    out: str
    shards: int = 0
    rows: int = 0
    set_aside: int = 0
    shards_with_rejects: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {self.set_aside:,} of {self.rows:,} rows set aside, in "
            f"{self.shards_with_rejects:,} of {self.shards:,} shards"
        ]
        for reason, count in self.reasons.items():
            lines.append(f"{count:>9,}  {reason}")
            lines += [
                f"{'':11}{one.shard}[{one.row}] {one.key}: {one.error}"
                for one in self.examples[reason]
            ]
        return "\n".join(lines)


def find(out: str, *, reasons: Sequence[str] = (), examples: int = 3) -> Rejects:
    """What OUT has set aside for a reason that begins with one of ``reasons`` (none: for any), and
    ``examples`` rows of each.

    Counts come from the records in the footers of the score files; rows are read only of those
    that have an example to give. Raises NotFound when OUT holds no run, StorageError.
    """
    out = storage.absolute(out)
    run = read_run(out)
    found, counts = Rejects(out), Counter[str]()
    for _, _, record in ledger.committed(out, run, lambda record: record):
        found.shards += 1
        found.rows += record.rows
        counted = rejects.counted(record, reasons)
        found.shards_with_rejects += bool(counted)
        counts.update(counted)
        for reason in counted:
            found.examples.setdefault(reason, [])
        if any(len(found.examples[reason]) < examples for reason in counted):
            _take_examples(found, record.shard, examples)
    found.set_aside = counts.total()
    found.reasons = dict(counts.most_common())
    return found


def _take_examples(found: Rejects, shard: str, examples: int) -> None:
    for row in rejects.read(found.out, shard).to_pylist():
        held = found.examples.get(rows.reason(row[rows.ERROR]))
        if held is not None and len(held) < examples:
            held.append(Example(shard, **row))
