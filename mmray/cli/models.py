"""What makes bundles and measures them."""

from __future__ import annotations

from collections.abc import Sequence

import click

from mmray.cli.options import as_json, columns, endpoint, print_json
from mmray.report.progress import Console


@click.command()
@click.argument("config", type=click.Path())
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a config key.")
@as_json
@endpoint
def train(config: str, sets: Sequence[str], to_json: bool) -> None:
    """Train the model that CONFIG describes and write its bundle; goes on where it was stopped."""
    from mmray.config import load
    from mmray.engine.train import train as run_training
    from mmray.report.evaluation import table

    result = run_training(load(config, sets), progress=Console().say)
    if to_json:
        print_json(result.to_dict())
    else:
        click.echo(table(result.metrics["dev"]))


@click.command()
@click.argument("bundle")
@click.argument("archive")
@click.option("--out", required=True, metavar="DIR", help="Where metrics.json goes.")
@click.option(
    "--split",
    default="auto",
    help="Rows to count: a value of the split column, all, or auto: those not trained on.",
)
@click.option("--label", metavar="NAME", help="Label column or field. [the bundle's]")
@as_json
@endpoint
def evaluate(
    bundle: str, archive: str, out: str, split: str, label: str | None, to_json: bool
) -> None:
    """Count how well BUNDLE does on the labelled rows of ARCHIVE, every row once."""
    from mmray.engine.evaluate import evaluate as count
    from mmray.report.evaluation import table

    metrics = count(bundle, archive, out=out, split=split, label=label, progress=Console().say)
    if to_json:
        print_json(metrics)
    else:
        click.echo(table(metrics))


@click.command()
@click.argument("bundle")
@click.argument("archive")
@click.option("--out", required=True, metavar="DIR", help="Where the new bundle goes.")
@click.option(
    "--pairs",
    type=click.IntRange(2),
    default=512,
    help="Of ARCHIVE: half of them to look at, half to compare.",
)
@columns
@as_json
@endpoint
def quantize(
    bundle: str,
    archive: str,
    out: str,
    pairs: int,
    image_column: str | None,
    caption_column: str | None,
    to_json: bool,
) -> None:
    """Make of BUNDLE one that computes convolutions in 8 bits on CPUs, and say what that changes.

    ARCHIVE should be like what will be scored; its labels are not needed. On a GPU, and on a CPU
    without 8-bit multiplication, the new bundle computes as BUNDLE does.
    """
    from mmray.config import Columns
    from mmray.quantize import quantize as run_quantize

    found = run_quantize(
        bundle,
        archive,
        out,
        pairs=pairs,
        columns=Columns(image=image_column, caption=caption_column),
        progress=Console().say,
    )
    if to_json:
        print_json(found.to_json())
    else:
        click.echo(str(found))
