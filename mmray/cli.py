"""``mmray <verb>``: parse, call one function, print, exit code.

Exit codes: 0 done; 1 the job says no (verify failed, budget passed); 2 wrong use, configuration or
storage; 130 stopped by Ctrl-C. One line on error, a traceback only with ``--debug``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmray import __version__
from mmray.errors import MmrayError
from mmray.options import as_json, caps, columns, endpoint, reasons_asked, scoring, serving, share
from mmray.report.progress import Console, Tally

if TYPE_CHECKING:
    from mmray.scoring_run import Caps
    from mmray.serving.settings import ServeConfig

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--endpoint-url",
    metavar="URL",
    help="S3 endpoint, for servers other than AWS; same as AWS_ENDPOINT_URL.",
)
@click.version_option(__version__, prog_name="mmray")
def cli(debug: bool, endpoint_url: str | None) -> None:
    """Learn from image-text pairs and score archives of them, on Ray.

    ARCHIVE, OUT and BUNDLE are directories or s3:// prefixes.
    """
    if endpoint_url:
        os.environ["AWS_ENDPOINT_URL"] = endpoint_url


# --- archives ------------------------------------------------------------------------------------


@cli.command()
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
        _print_json(report.to_json())
    else:
        click.echo(str(report))


@cli.command()
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
        _print_json(found.to_json())
    else:
        click.echo(str(found))


# --- models --------------------------------------------------------------------------------------


@cli.command()
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
        _print_json(result.to_dict())
    else:
        click.echo(table(result.metrics["dev"]))


@cli.command()
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
        _print_json(metrics)
    else:
        click.echo(table(metrics))


# --- scoring -------------------------------------------------------------------------------------


@cli.command()
@click.argument("bundle")
@click.argument("archive")
@click.option("--out", required=True, metavar="OUT", help="Where scores/ and _run/ go.")
@click.option("--limit", type=click.IntRange(1), help="A trial: only the first so many rows.")
@click.option("--shards", metavar="N|GLOB", help="Only the first N shards, or those that match.")
@click.option("--embeddings", is_flag=True, help="Also write float16 embeddings.")
@scoring
@columns
@as_json
@endpoint
def score(
    bundle: str,
    archive: str,
    out: str,
    limit: int | None,
    shards: str | None,
    max_errors: str | None,
    embeddings: bool,
    actors: int | None,
    decoders: int | None,
    row_timeout: float,
    image_column: str | None,
    caption_column: str | None,
    to_json: bool,
) -> None:
    """Put a score on every pair of ARCHIVE, or the reason why not.

    Stopped for whatever reason, the same command goes on; repeated when done, it does nothing.
    """
    from mmray.config import Columns
    from mmray.engine import score as engine

    options = engine.ScoreOptions(
        limit=limit,
        shards=shards,
        max_errors=share(max_errors),
        embeddings=embeddings,
        actors=actors,
        decoders=decoders,
        row_seconds=row_timeout,
        columns=Columns(image=image_column, caption=caption_column),
    )
    summary = engine.score(bundle, archive, out, options, Console())
    if to_json:
        _print_json(summary)


@cli.command()
@click.argument("out")
@click.option("--deep", is_flag=True, help="Also read scores of some shards, and score rows again.")
@as_json
@endpoint
def verify(out: str, deep: bool, to_json: bool) -> int:
    """Prove OUT: every shard listed, every row once, rows = scored + set aside, one bundle."""
    from mmray.verify import verify as check

    tally = Tally(Console(), "score files checked")
    verdict = check(out, tally)
    tally.end()
    if deep:
        from mmray.rescore import rescore

        again, findings = rescore(out)
        verdict.findings += findings
        Console().say(f"{again:,} rows scored again")
    if to_json:
        _print_json(verdict.to_json())
    else:
        for finding in verdict.findings:
            click.echo(finding)
        word = "holds" if verdict.ok else f"FAILS, {len(verdict.findings):,} finding(s)"
        click.echo(
            f"{verdict.out}: {word}; {verdict.shards:,} shards, {verdict.rows:,} rows = "
            f"{verdict.scored:,} scored + {verdict.set_aside:,} set aside"
        )
    return 0 if verdict.ok else 1


@cli.command()
@click.argument("out")
@reasons_asked
@click.option("--examples", type=click.IntRange(0), default=3, help="Rows to show of each reason.")
@click.option("--export", "dest", metavar="DIR", help="Write the pairs and a manifest.csv there.")
@as_json
@endpoint
def rejects(
    out: str, reasons: Sequence[str], examples: int, dest: str | None, to_json: bool
) -> None:
    """List what OUT has set aside, by reason.

    With --export, hand out the pairs as the archive holds them: WebDataset tars, in which a pair is
    called <ordinal of its shard>-<row>, and manifest.csv, which says what each is.
    """
    from mmray.report.export import export
    from mmray.report.rejects import find

    found = find(out, reasons=reasons, examples=examples)
    handed = None
    if dest is not None:
        tally = Tally(Console(), "pairs exported")
        handed = export(out, dest, reasons=reasons, progress=tally)
        tally.end()
    if to_json:
        _print_json(found.to_json() | {"export": handed and handed.to_json()})
    else:
        click.echo("\n".join(str(part) for part in (found, handed) if part is not None))


@cli.command()
@click.argument("out")
@reasons_asked
@caps
@scoring
@as_json
@endpoint
def retry(
    out: str,
    reasons: Sequence[str],
    max_errors: str | None,
    actors: int | None,
    decoders: int | None,
    row_timeout: float,
    caps: Caps,
    to_json: bool,
) -> None:
    """Score again what OUT has set aside, with the bundle and the archive of its run.

    Rows that can be scored now get their scores, the others their new reason; all else stays as it
    is. Stopped for whatever reason, the same command goes on.
    """
    from mmray.engine.retry import retry as run_retry

    summary = run_retry(
        out,
        Console(),
        reasons=reasons,
        max_errors=share(max_errors),
        actors=actors,
        decoders=decoders,
        row_seconds=row_timeout,
        caps=caps,
    )
    if to_json:
        _print_json(summary)


# --- serving -------------------------------------------------------------------------------------


@cli.command()
@click.argument("bundle")
@serving
@click.option(
    "--emit-config", is_flag=True, help="Print what `serve deploy` takes, and serve nothing."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65535),
    help="Where Prometheus finds the figures of a server on this machine alone. [none]",
)
@endpoint
def serve(bundle: str, cfg: ServeConfig, emit_config: bool, metrics_port: int | None) -> None:
    """Answer HTTP requests with BUNDLE's scores, until Ctrl-C; a page to try it is at /."""
    from mmray.engine import cluster

    if emit_config and metrics_port is not None:
        raise click.UsageError("--metrics-port: a cluster has its own; not with --emit-config")
    if not emit_config:
        cluster.prepare_to_serve(counted=metrics_port is not None)
    from mmray.engine import serve as engine

    if emit_config:
        click.echo(engine.config_file(bundle, cfg), nl=False)
    else:
        engine.run(bundle, cfg, Console(), metrics_port)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), help="Output.")
def demo(out: Path) -> int:
    """The whole of mmray on generated pairs and an embedded S3 endpoint, in a few minutes."""
    from mmray.demo.run import demo as run_demo

    return run_demo(out, Console())


# --- plumbing ------------------------------------------------------------------------------------


def _print_json(result: Any) -> None:
    click.echo(json.dumps(result, indent=2, ensure_ascii=False))


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; never raises for a user's error."""
    try:
        result = cli.main(list(argv), prog_name="mmray", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nmmray: stopped; the same command goes on from here", err=True)
        return 130
    except MmrayError as error:
        if "--debug" in argv:
            raise
        click.echo(f"mmray: {error}", err=True)
        return error.exit_code
    return result if isinstance(result, int) else 0


def main() -> None:
    sys.exit(run(sys.argv[1:]))
