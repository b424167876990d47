"""What a person watches of long work: the live line, the plain log."""

from __future__ import annotations

import io

from mmray.report.progress import Console, Meter, Tally, duration


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
    meter.take(20, 3, 50)
    assert "ETA ?" in meter.line()
    meter.started -= 8
    meter.take(80, 0, 200)
    meter.spend("decode", 3.0)
    meter.spend("predict", 1.0)
    line = meter.line()
    for part in ("75%", "rows 100 of ~200", "10 rows/s", "ETA 10s", "set aside 3", "decode (75%)"):
        assert part in line, line


def test_the_time_until_the_first_rows_is_not_held_against_the_rest() -> None:
    meter = Meter(total_bytes=1000, total_shards=1)
    meter.started -= 20
    meter.take(10, 0, 100)
    meter.started -= 5
    meter.take(50, 0, 500)
    assert round(meter.first_rows_s or 0) == 20 and round(meter.rate) == 10
    assert "10 rows/s" in meter.line() and "ETA 4s" in meter.line()


def test_it_says_when_rows_in_doubt_are_what_makes_a_run_slow() -> None:
    meter = Meter(total_bytes=1000, total_shards=1)
    meter.take(100, 0, 100)
    meter.decided = 5
    assert "float32" not in meter.line()
    meter.decided = 60
    assert "in float32 60%" in meter.line()


def test_a_log_has_the_first_and_the_last_line_of_a_tally_and_few_between() -> None:
    log = io.StringIO()
    tally = Tally(Console(log), "pairs packed")
    for done in range(1, 1001):
        tally(done, 1000)
    tally.end()
    first, last = log.getvalue().splitlines()
    assert first.startswith("1 of 1,000 (0%) pairs packed") and "ETA" in first
    assert last.startswith("1,000 of 1,000 (100%) pairs packed") and last.endswith("ETA 0s")


def test_without_a_total_a_tally_counts() -> None:
    log = io.StringIO()
    tally = Tally(Console(log), "pairs packed")
    tally(7, None)
    tally.end()
    assert all(line.startswith("7 pairs packed") for line in log.getvalue().splitlines())
