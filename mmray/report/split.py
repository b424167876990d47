"""What a person should know of a split before anything is trained on it."""

from __future__ import annotations

from mmray.splits import DEV, TRAIN, SplitReport, counted

#: Of all rows, and at least so many: a group that a person should hear of.
LARGE_SHARE, LARGE_GROUP = 0.1, 100


def notes(report: SplitReport) -> list[str]:
    """One line each."""
    lines = []
    for what, n in report.leaks.items():
        if n and what in report.left_out:
            lines.append(f"{n} held-out rows have the same {what} as training rows, now left out")
        elif n:
            lines.append(
                f"{n} held-out rows have a {what} that is in train too: "
                "figures over them will be too good"
            )
    if any(report.left_out.values()):
        left_out = counted(report.left_out)
        lines.append(f"left out of training, as held-out rows have the same: {left_out}")
    for what, found in report.duplicates.items():
        if found.conflicting:
            lines.append(
                f"labels conflict in {found.conflicting} of {found.sets} sets of rows with the "
                f"same {what} ({found.conflicting_rows} rows): {'; '.join(found.examples)}"
            )
    joined = report.train_rows + report.dev_rows + sum(report.left_out.values())
    if report.largest_group >= max(LARGE_GROUP, LARGE_SHARE * joined):
        lines.append(
            f"one group of duplicates has {report.largest_group:,} of {joined:,} rows; if they "
            "only look alike, lower data.near; if they share a placeholder, see data.duplicates"
        )
    for here, there, name in ((report.dev, report.train, DEV), (report.train, report.dev, TRAIN)):
        only = [label for label, n in here.items() if n and not there[label]]
        if only:
            lines.append(f"labels only in {name}: {', '.join(only)}")
    return lines + [f"set aside, {what}: {n} rows" for what, n in report.errors.items()]
