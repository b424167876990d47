"""Options that several verbs share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

as_json = click.option("--json", "to_json", is_flag=True, help="Print the result as JSON.")
endpoint = click.option(
    "--endpoint-url",
    metavar="URL",
    expose_value=False,
    help="S3 endpoint, as before the verb.",
    callback=lambda _context, _option, value: _set_endpoint(value),
)


def _set_endpoint(url: str | None) -> None:
    if url:
        os.environ["AWS_ENDPOINT_URL"] = url


def columns(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name an archive's columns."""
    image = click.option("--image-column", metavar="NAME", help="Parquet image column. [guessed]")
    caption = click.option(
        "--caption-column", metavar="NAME", help="Caption column or .json field. [guessed]"
    )
    return image(caption(command))


def scoring(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that scores."""
    budget = click.option(
        "--max-errors",
        metavar="SHARE",
        help="Stop (exit 1, resumable) when more rows than this are set aside: 0.001 or 0.1%.",
    )
    actors = click.option(
        "--actors", type=click.IntRange(1), help="Scoring actors. [two a GPU, or one a CPU]"
    )
    decoders = click.option(
        "--decoders",
        type=click.IntRange(0),
        help="Processes that decode beside them; 0: they decode. [beside GPUs, every CPU left; "
        "else 0]",
    )
    timeout = click.option(
        "--row-timeout",
        type=click.FloatRange(0.1),
        default=60.0,
        metavar="SECONDS",
        help="A picture that takes longer to decode is set aside.",
    )
    return budget(actors(decoders(timeout(command))))


reasons_asked = click.option(
    "--reason",
    "reasons",
    multiple=True,
    metavar="TEXT",
    help="Only rows whose reason begins with this; may be repeated. [all]",
)
