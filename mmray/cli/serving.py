"""What answers HTTP requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mmray.cli.options import endpoint, serving
from mmray.report.progress import Console

if TYPE_CHECKING:
    from mmray.serving.settings import ServeConfig


@click.command()
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
