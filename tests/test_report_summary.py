"""What a person watches and keeps of a run: the line, the plain log, the page."""

from __future__ import annotations

import io

from mmray.report.progress import Console, Meter, duration
from mmray.report.summary import render


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_durations_are_short_and_readable() -> None:
    assert [duration(s) for s in (0, 59.4, 60, 75, 3600, 7325)] == [
        "0s", "59s", "1m00s", "1m15s", "1h00m", "2h02m",
    ]  # fmt: skip


def test_a_log_gets_whole_lines_and_a_terminal_one_live_line() -> None:
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        console = Console(stream)
        console.show(lambda: "10%", force=True)
        console.show(lambda: "20%", force=True)
        console.say("a shard is cut")
    assert log.getvalue() == "10%\n20%\na shard is cut\n"
    assert terminal.getvalue().endswith("20%\r\x1b[2Ka shard is cut\n")
    assert terminal.getvalue().count("\n") == 1


def test_a_log_is_not_flooded() -> None:
    log = io.StringIO()
    console = Console(log)
    for _ in range(1000):
        console.show(lambda: "line")
    assert log.getvalue().count("\n") <= 1


def test_the_meter_counts_only_this_commands_work_into_its_rate() -> None:
    meter = Meter(total_bytes=1000, total_shards=4, done_bytes=500, resumed_bytes=500)
    meter.started -= 10
    meter.rows, meter.done_bytes, meter.set_aside = 100, 750, 3
    meter.spend("decode", 3.0)
    meter.spend("predict", 1.0)
    line = meter.line()
    for part in ("75%", "rows 100 of ~200", "10 rows/s", "ETA 10s", "set aside 3", "decode (75%)"):
        assert part in line, line


def test_the_page_shows_what_was_set_aside_and_runs_nothing() -> None:
    page = render(
        {
            "seconds": 75, "rows": 1200, "scored": 1100, "set_aside": 100, "shards": 2,
            "shards_done": 2, "labels": {"<b>": 1100}, "reasons": {"no image": 100},
            "stages": {"decode": 2.0}, "problems": [{"shard": "a.tar", "problem": "cut <here>"}],
            "archive": "s3://a", "bundle": "b", "fingerprint": "f", "run_id": "r",
        }
    )  # fmt: skip
    for part in ("1,200", "no image", "&lt;b&gt;", "cut &lt;here&gt;", "1m15s"):
        assert part in page
    assert "<script" not in page and "http" not in page
