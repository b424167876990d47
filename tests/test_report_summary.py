"""What a person keeps of a run: the page."""

from __future__ import annotations

from mmray.report.summary import render


def test_the_page_shows_what_was_set_aside_and_runs_nothing() -> None:
    page = render(
        {
            "seconds": 75, "rows_per_second": 17.4, "rows": 1200, "scored": 1100,
            "set_aside": 100, "shards": 2, "shards_done": 2, "labels": {"<b>": 1100},
            "reasons": {"no image": 100},
            "stages": {"decode": 2.0}, "start": {"ray": 4.5}, "retries": {"SlowDown": 1201},
            "problems": [{"shard": "a.tar", "problem": "cut <here>"}],
            "archive": "s3://a", "bundle": "b", "fingerprint": "f", "run_id": "r",
        }
    )  # fmt: skip
    for part in ("1,200", "no image", "4.5", "&lt;b&gt;", "1,201", "cut &lt;here&gt;", "1m15s"):
        assert part in page
    assert "<script" not in page and "http" not in page
