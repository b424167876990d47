"""What a scoring run came to: ``_run/summary.json`` for scripts, ``report.html`` for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmray import ledger, storage
from mmray.report.progress import Console, Meter, Tally, duration
from mmray.scoring_run import Run
from mmray.targets import Targets

MOST_SETS = 100  # of labels, that a summary names


class Totals:
    """What the records of committed shards add up to."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        self._problems: dict[str, str] = {}

    def add(self, record: ledger.ShardRecord) -> None:
        self._counts.update(
            shards_done=1,
            bytes=record.input_size,
            rows=record.rows,
            scored=record.scored,
            set_aside=record.set_aside,
            unreadable=int(record.problem is not None and not record.rows),
        )
        self._reasons.update(record.reasons)
        self._labels.update(record.labels)
        if record.problem:
            self._problems[record.shard] = record.problem

    @property
    def rows(self) -> int:
        return self._counts["rows"]

    @property
    def set_aside(self) -> int:
        return self._counts["set_aside"]

    @property
    def unreadable(self) -> int:
        """Shards of which no row can be read."""
        return self._counts["unreadable"]

    def read(self, out: str, targets: Targets, console: Console) -> None:
        """Add what lies in ``out`` of these committed shards: their records alone are read."""
        if not targets:
            return
        tally = Tally(console, "records of finished shards read")
        found = ledger.each(
            lambda target: ledger.read_record(ledger.scores_uri(out, target.shard.path)), targets
        )
        for number, record in enumerate(found, 1):
            self.add(record)
            tally(number, len(targets))
        tally.end()

    def summary(self, run: Run) -> dict[str, Any]:
        return {
            "run_id": run.run_id,
            "archive": run.archive,
            "bundle": run.bundle,
            "fingerprint": run.fingerprint,
            "trial": run.trial,
            "caps": run.config.get("caps"),
            "shards": len(run.targets),
            **{name: self._counts[name] for name in COUNTS},
            "reasons": dict(self._reasons.most_common()),
            # Where a row may have several labels, sets of them occur too.
            "labels": {label: self._labels[label] for label in run.labels}
            | {
                text: n for text, n in self._labels.most_common(MOST_SETS) if text not in run.labels
            },
            "problems": [
                {"shard": shard, "problem": problem}
                for shard, problem in sorted(self._problems.items())
            ],
        }


COUNTS = ("shards_done", "bytes", "rows", "scored", "set_aside", "unreadable")


def write_summary(out: str, run: Run, totals: Totals, meter: Meter) -> dict[str, Any]:
    """Write and return the summary of a run whose committed shards come to ``totals``.

    The ``meter`` of this command gives its ``seconds``, after how many of them the first rows were
    scored, and by which steps (``start``), the rows a second from then on, how many of its rows
    were decided in float32, its workers' seconds by stage, and the S3 requests that were asked
    again, by cause.
    """
    return _write(out, totals.summary(run) | _times(meter))


def finished_summary(out: str, run: Run, console: Console) -> dict[str, Any]:
    """The summary of a run with nothing left to do, as the last command wrote it; from the score
    files where that was killed before it did."""
    uri = storage.join(out, ledger.SUMMARY)
    before = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    whole = {"run_id": run.run_id, "shards": len(run.targets), "shards_done": len(run.targets)}
    if whole.items() <= before.items():
        return before
    totals = Totals()
    totals.read(out, run.targets.take(run.targets.among(ledger.done_shards(out))), console)
    times = {name: before.get(name) for name in TIMES} | {
        name: before.get(name, {}) for name in ("start", "stages", "retries")
    }
    return _write(out, totals.summary(run) | times)


def _write(out: str, summary: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    storage.write_bytes(storage.join(out, ledger.SUMMARY), text.encode())
    storage.write_bytes(storage.join(out, ledger.REPORT), render(summary).encode())
    return summary


TIMES = (
    "seconds",
    "first_rows_s",
    "recovery_s",
    "rows_per_second",
    "decided_in_float32",
    "start",
    "stages",
    "retries",
)


def _times(meter: Meter) -> dict[str, Any]:
    values = (
        round(meter.seconds, 3),
        None if meter.first_rows_s is None else round(meter.first_rows_s, 3),
        round(meter.recovery_s, 3),
        round(meter.rate, 3),
        meter.decided,
        {step: round(spent, 3) for step, spent in meter.start.items()},
        {stage: round(spent, 3) for stage, spent in meter.stages.items()},
        dict(meter.retries.most_common()),
    )
    return dict(zip(TIMES, values, strict=True))


# --- the page ------------------------------------------------------------------------------------

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}
body{color:#1c2733}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.facts{display:flex;gap:2.5rem;flex-wrap:wrap;margin:1.5rem 0}
.facts b{display:block;font-size:1.7rem;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%}td{padding:.25rem .5rem;vertical-align:middle}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.bar{width:50%}.bar div{height:.9rem;background:#3b7dd8;border-radius:2px;min-width:1px}
.aside .bar div{background:#d88a3b}code{overflow-wrap:anywhere}dt{color:#5b6b7b}dd{margin:0 0 .5rem}
"""


def render(summary: Mapping[str, Any]) -> str:
    """The summary as one HTML page without scripts or outside assets."""
    seconds, rate = summary["seconds"], summary["rows_per_second"]
    facts = [
        ("rows", f"{summary['rows']:,}"),
        ("scored", f"{summary['scored']:,}"),
        ("set aside", f"{summary['set_aside']:,}"),
        ("shards", f"{summary['shards_done']:,} of {summary['shards']:,}"),
        ("last command took", "?" if seconds is None else duration(seconds)),
        ("rows a second", "?" if rate is None else f"{rate:,.0f}"),
    ]
    if lost := summary.get("recovery_s"):
        facts.append(("of it for what lost its worker", duration(lost)))
    if decided := summary.get("decided_in_float32"):
        facts.append(("rows decided in float32", f"{decided:,}"))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>mmray scoring run</title>",
        f"<style>{_STYLE}</style><h1>Scoring run</h1><div class=facts>",
        *(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in facts),
        "</div>",
        _bars("Labels", summary["labels"], "label"),
        _bars("Set aside, by reason", summary["reasons"], "aside"),
        _bars("Worker seconds, by stage", summary["stages"], "stage"),
        _bars("Seconds to the first rows, by step", summary["start"], "stage"),
        _bars("S3 requests asked again, by cause", summary["retries"], "aside"),
        _problems(summary["problems"]),
        "<h2>Run</h2><dl>",
        *(
            f"<dt>{name}</dt><dd><code>{escape(str(summary[name]))}</code></dd>"
            for name in ("archive", "bundle", "fingerprint", "run_id")
        ),
        _caps(summary.get("caps") or {}),
        "</dl></html>",
    ]
    return "\n".join(parts)


def _bars(title: str, counts: Mapping[str, float], kind: str) -> str:
    if not counts:
        return ""
    total = sum(counts.values()) or 1
    largest = max(counts.values()) or 1
    lines = [
        f"<tr><td>{escape(name)}<td class=n>{count:,}<td class=n>{count / total:.1%}"
        f"<td class=bar><div style='width:{100 * count / largest:.1f}%'></div>"
        for name, count in counts.items()
    ]
    return f"<h2>{title}</h2><table class={kind}>{''.join(lines)}</table>"


def _caps(caps: Mapping[str, int]) -> str:
    """Those that a retry raised."""
    raised = ", ".join(f"{name} {value:,}" for name, value in caps.items() if value)
    return f"<dt>caps raised by a retry</dt><dd>{escape(raised)}</dd>" if raised else ""


def _problems(problems: Sequence[Mapping[str, str]]) -> str:
    if not problems:
        return ""
    lines = [
        f"<tr><td><code>{escape(p['shard'])}</code><td>{escape(p['problem'])}" for p in problems
    ]
    return f"<h2>Shards with a problem</h2><table>{''.join(lines)}</table>"
