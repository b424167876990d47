"""What several verbs take, and how they print."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import click

from mmray.errors import ConfigError

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
        help="Stop (exit 1, resumable) when more rows of all, or shards that cannot be read, are "
        "set aside: 0.001 or 0.1%. Opens what earlier commands finished, to count.",
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


def caps(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that raise caps of pictures; the command gets them as ``caps``."""

    @click.option(
        "--max-pixels", type=click.IntRange(1), help="Try larger pictures, up to so many pixels."
    )
    @click.option(
        "--max-image-bytes", type=click.IntRange(1), help="Try larger files, up to so many bytes."
    )
    @functools.wraps(command)
    def with_caps(max_pixels: int | None, max_image_bytes: int | None, **rest: Any) -> Any:
        from mmray.scoring_run import UNRAISED, Caps

        return command(caps=UNRAISED.raised(Caps(max_pixels or 0, max_image_bytes or 0)), **rest)

    return with_caps


def serving(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make a server's configuration; the command gets it as ``cfg``."""

    @click.option("--host", help="Address to listen on; 0.0.0.0: all. [127.0.0.1]")
    @click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on. [8000]")
    @click.option("--replicas", metavar="N|MIN-MAX", help="Processes with the model. [1]")
    @click.option("--token-env", metavar="NAME", help="Variable with the token callers must show.")
    @click.option("--token-file", metavar="FILE", help="Or a file with it.")
    @click.option("--config", type=click.Path(), metavar="FILE", help="YAML with this, and more.")
    @click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key of it.")
    @functools.wraps(command)
    def with_config(
        host: str | None,
        port: int | None,
        replicas: str | None,
        token_env: str | None,
        token_file: str | None,
        config: str | None,
        sets: Sequence[str],
        **rest: Any,
    ) -> Any:
        from mmray.config import read
        from mmray.serving.settings import ServeConfig, overrides

        flags = overrides(host, port, replicas, token_env, token_file)
        return command(cfg=read(ServeConfig, config, [*flags, *sets]), **rest)

    return with_config


reasons_asked = click.option(
    "--reason",
    "reasons",
    multiple=True,
    metavar="TEXT",
    help="Only rows whose reason begins with this; may be repeated. [all]",
)


def share(text: str | None) -> float | None:
    """``0.1%`` or ``0.001`` -> 0.001."""
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--max-errors: got {text!r}; a share such as 0.001 or 0.1%")
    return share


def print_json(result: Any) -> None:
    click.echo(json.dumps(result, indent=2, ensure_ascii=False))
