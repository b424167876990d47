"""What a scoring run came to: ``_run/summary.json`` for scripts, ``report.html`` for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mmray import ledger, storage
from mmray.report.progress import Meter, duration


def write_summary(out: str, run: ledger.Run, meter: Meter | None) -> dict[str, Any]:
    """Add up the records of all committed shards; write and return the summary.

    The ``meter`` of this command gives its own ``seconds``, after how many of them the first rows
    were scored, the rows a second from then on, and its workers' seconds by stage. A command that
    found nothing to do has none, and keeps the times of the one before it.
    """
    summary = _tally(run, records(out, run))
    uri = storage.join(out, ledger.SUMMARY)
    if meter is not None:
        summary |= _times(meter)
    elif storage.exists(uri):
        before = json.loads(storage.read_bytes(uri))
        summary |= {name: before[name] for name in TIMES if name in before}
    else:
        summary |= dict.fromkeys(TIMES) | {"stages": {}}
    storage.write_bytes(uri, json.dumps(summary, indent=2, ensure_ascii=False).encode())
    storage.write_bytes(storage.join(out, ledger.REPORT), render(summary).encode())
    return summary


TIMES = ("seconds", "first_rows_s", "rows_per_second", "stages")


def _times(meter: Meter) -> dict[str, Any]:
    values = (
        round(meter.seconds, 3),
        None if meter.first_rows_s is None else round(meter.first_rows_s, 3),
        round(meter.rate, 3),
        {stage: round(spent, 3) for stage, spent in meter.stages.items()},
    )
    return dict(zip(TIMES, values, strict=True))


def records(out: str, run: ledger.Run) -> Iterator[ledger.ShardRecord]:
    """The record of every committed shard of the run, read from its footer, in order."""
    done = run.targets.take(run.targets.among(ledger.done_shards(out)))
    for record, _ in ledger.each(
        lambda target: ledger.read_record(ledger.scores_uri(out, target.shard.path)), done
    ):
        yield record


def _tally(run: ledger.Run, done: Iterator[ledger.ShardRecord]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    problems = []
    for record in done:
        totals.update(shards=1, rows=record.rows, scored=record.scored, aside=record.set_aside)
        totals.update(bytes=record.input_size)
        reasons.update(record.reasons)
        labels.update(record.labels)
        if record.problem:
            problems.append({"shard": record.shard, "problem": record.problem})
    return {
        "run_id": run.run_id,
        "archive": run.archive,
        "bundle": run.bundle,
        "fingerprint": run.fingerprint,
        "trial": run.trial,
        "shards": len(run.targets),
        "shards_done": totals["shards"],
        "bytes": totals["bytes"],
        "rows": totals["rows"],
        "scored": totals["scored"],
        "set_aside": totals["aside"],
        "reasons": dict(reasons.most_common()),
        "labels": {label: labels[label] for label in run.labels},
        "problems": problems,
    }


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
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>mmray scoring run</title>",
        f"<style>{_STYLE}</style><h1>Scoring run</h1><div class=facts>",
        *(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in facts),
        "</div>",
        _bars("Labels", summary["labels"], "label"),
        _bars("Set aside, by reason", summary["reasons"], "aside"),
        _bars("Worker seconds, by stage", summary["stages"], "stage"),
        _problems(summary["problems"]),
        "<h2>Run</h2><dl>",
        *(
            f"<dt>{name}</dt><dd><code>{escape(str(summary[name]))}</code></dd>"
            for name in ("archive", "bundle", "fingerprint", "run_id")
        ),
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


def _problems(problems: Sequence[Mapping[str, str]]) -> str:
    if not problems:
        return ""
    lines = [
        f"<tr><td><code>{escape(p['shard'])}</code><td>{escape(p['problem'])}" for p in problems
    ]
    return f"<h2>Shards with a problem</h2><table>{''.join(lines)}</table>"
