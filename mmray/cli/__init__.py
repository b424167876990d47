"""``mmray <verb>``: parse, call one function, print, exit code.

Exit codes: 0 done; 1 the job says no (verify failed, budget passed); 2 wrong use, configuration or
storage; 130 stopped by Ctrl-C. One line on error, a traceback only with ``--debug``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from mmray import __version__
from mmray.cli.archives import inspect, pack
from mmray.cli.models import evaluate, quantize, train
from mmray.cli.scoring import rejects, retry, score, verify
from mmray.cli.serving import serve
from mmray.errors import MmrayError
from mmray.report.progress import Console

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), help="Output.")
def demo(out: Path) -> int:
    """The whole of mmray on generated pairs and an embedded S3 endpoint, in a few minutes."""
    from mmray.demo.run import demo as run_demo

    return run_demo(out, Console())


VERBS = [pack, inspect, train, evaluate, quantize, score, verify, rejects, retry, serve, demo]


@click.group(context_settings=CONTEXT, commands=VERBS)
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
