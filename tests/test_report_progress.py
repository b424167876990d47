"""What a log shows of long work: where it is, how fast, and in the end all of it."""

from __future__ import annotations

import io

from mmray.report.progress import Console, Tally, duration


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


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (4.4, 75, 7300)] == ["4s", "1m15s", "2h01m"]
