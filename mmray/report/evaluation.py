"""What was counted of a model, as text for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def table(metrics: Mapping[str, Any]) -> str:
    """A report, of an evaluation or of a bundle's dev rows."""
    several = metrics.get("task") == "multilabel"
    width = max(len("label"), *map(len, metrics["labels"]))
    head = "".join(f"  {name:>9}" for name in ("precision", "recall", "F1", "AUROC", "rows"))
    lines = [*_summary(metrics), f"{'label':<{width}}{head}  predicted" + ("" if several else ":")]
    cell = max(9, *map(len, metrics["labels"]))
    if not several:
        lines[-1] += "".join(f"  {label:>{cell}}" for label in metrics["labels"])
    for i, label in enumerate(metrics["labels"]):
        of = metrics["per_class"][label]
        numbers = "".join(f"  {of[name]:>9.4f}" for name in ("precision", "recall", "f1"))
        numbers += f"  {_number(of.get('auroc')):>9}  {of['support']:>9,}  "
        if several:
            predicted = f"{of['predicted']:>9,}"
        else:
            counts = metrics["confusion"][i]
            predicted = " " * 10 + "".join(f"  {n:>{cell},}" for n in counts)
        lines.append(f"{label:<{width}}{numbers}{predicted}")
    for which, report in metrics.get("availability", {}).items():
        lines += [f"{which}: {line}" for line in _summary(report)]
    return "\n".join([*lines, *_notes(metrics)])


def _summary(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The figures of all rows together, with their 95 % intervals."""
    right = "exact match" if metrics.get("task") == "multilabel" else "accuracy"
    yield (
        f"{metrics['rows']:,} rows  {right} {metrics['accuracy']:.4f}"
        f"{_interval(metrics, 'accuracy')}  macro-F1 {metrics['macro_f1']:.4f}"
        f"{_interval(metrics, 'macro_f1')}"
    )
    further = [f"weighted-F1 {metrics['weighted_f1']:.4f}"]
    if "micro_f1" in metrics:
        further.append(f"micro-F1 {metrics['micro_f1']:.4f}")
    if metrics.get("auroc") is not None:
        further.append(f"AUROC {metrics['auroc']:.4f}{_interval(metrics, 'auroc')}")
    if "ece" in metrics:
        further.append(f"calibration error {metrics['ece']:.4f}")
    yield "  ".join(further)


def _interval(metrics: Mapping[str, Any], name: str) -> str:
    found = metrics.get(f"{name}_interval")
    return f" (95 % {found[0]:.3f} to {found[1]:.3f})" if found else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _notes(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What was not counted, and why."""
    for reason, n in metrics.get("set_aside", {}).items():
        yield f"set aside, {reason}: {n:,}"
    for name, n in metrics.get("unknown_labels", {}).items():
        yield f"label unknown to the bundle, {name}: {n:,}"
    if metrics.get("unlabelled"):
        yield f"unlabelled: {metrics['unlabelled']:,}"
    if metrics.get("without_negative"):
        yield f"without any other caption to be shown with: {metrics['without_negative']:,}"
