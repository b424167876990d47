"""What makes archives and looks at them."""

from __future__ import annotations

import click

from mmray.cli.options import as_json, columns, endpoint, print_json
from mmray.report.progress import Console, Tally


@click.command()
@click.argument("source")
@click.argument("dest")
@click.option(
    "--format", "kind", type=click.Choice(["tar", "parquet"]), default="tar", help="Of shards."
)
@click.option("--shard-rows", type=click.IntRange(1), default=1000, help="Pairs a shard.")
@click.option("--image-column", metavar="NAME", help="Column with the image's path. [guessed]")
@click.option("--caption-column", metavar="NAME", help="Column with the caption. [guessed]")
@click.option("--label-column", metavar="NAME", help="Column with the label. [label]")
@click.option("--overwrite", is_flag=True, help="Remove the shards that stand in DEST.")
@as_json
@endpoint
def pack(
    source: str,
    dest: str,
    kind: str,
    shard_rows: int,
    image_column: str | None,
    caption_column: str | None,
    label_column: str | None,
    overwrite: bool,
    to_json: bool,
) -> None:
    """Write SOURCE as shards into DEST.

    SOURCE is a .csv or .jsonl file with image path, caption and label, a folder that holds one, or
    an existing archive.
    """
    from mmray.archive.pack import pack as write
    from mmray.config import Columns

    tally = Tally(Console(), "pairs packed")
    report = write(
        source,
        dest,
        format="parquet" if kind == "parquet" else "tar",
        shard_rows=shard_rows,
        columns=Columns(image=image_column, caption=caption_column),
        label=label_column,
        overwrite=overwrite,
        progress=tally,
    )
    tally.end()
    if to_json:
        print_json(report.to_json())
    else:
        click.echo(str(report))


@click.command()
@click.argument("archive")
@click.option("--shards", "max_shards", type=click.IntRange(1), help="Look at so many. [all]")
@click.option("--examples", type=click.IntRange(0), default=3, help="Pairs to show.")
@click.option("--label", metavar="NAME", default="label", help="Label column or field.")
@columns
@as_json
@endpoint
def inspect(
    archive: str,
    max_shards: int | None,
    examples: int,
    label: str,
    image_column: str | None,
    caption_column: str | None,
    to_json: bool,
) -> None:
    """Say what ARCHIVE holds: shards, pairs, bytes, sizes, captions, labels, and what is broken."""
    from mmray.config import Columns
    from mmray.report.inspect import inspect as look

    tally = Tally(Console(), "shards read")
    found = look(
        archive,
        columns=Columns(image=image_column, caption=caption_column),
        label=label,
        max_shards=max_shards,
        examples=examples,
        progress=tally,
    )
    tally.end()
    if to_json:
        print_json(found.to_json())
    else:
        click.echo(str(found))
