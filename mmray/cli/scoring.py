"""What scores archives, and what looks after the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mmray.cli.options import (
    as_json,
    caps,
    columns,
    endpoint,
    print_json,
    reasons_asked,
    scoring,
    share,
)
from mmray.report.progress import Console, Tally

if TYPE_CHECKING:
    from mmray.scoring_run import Caps


@click.command()
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
        print_json(summary)


@click.command()
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
        print_json(verdict.to_json())
    else:
        for finding in verdict.findings:
            click.echo(finding)
        word = "holds" if verdict.ok else f"FAILS, {len(verdict.findings):,} finding(s)"
        click.echo(
            f"{verdict.out}: {word}; {verdict.shards:,} shards, {verdict.rows:,} rows = "
            f"{verdict.scored:,} scored + {verdict.set_aside:,} set aside"
        )
    return 0 if verdict.ok else 1


@click.command()
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
        print_json(found.to_json() | {"export": handed and handed.to_json()})
    else:
        click.echo("\n".join(str(part) for part in (found, handed) if part is not None))


@click.command()
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
        print_json(summary)
