"""Serve a bundle: the application, here in the foreground or as a Serve config file.

    HTTP -> Ingress (parse, decode) -> uint8 -> Scorer (batches, model) -> Ingress -> JSON

Both kinds of replicas scale by themselves within their bounds and refuse what their queues do not
hold. A new bundle comes in by rolling update: new replicas first, old ones go when those are ready.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray
import yaml
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.config import (
    AutoscalingConfig,
    BackpressureConfig,
    HTTPOptions,
    RequestRouterConfig,
)
from ray.serve.context import _get_global_client  # what serves already is not told in public

from mmray import config, golden, storage
from mmray.bundle import read_manifest
from mmray.engine import cluster
from mmray.engine.one_machine import is_own
from mmray.engine.replicas import Ingress, Scorer, loaded
from mmray.engine.routing import FewestOut
from mmray.engine.turns import wait_for_turns
from mmray.errors import ConfigError, MmrayError, RunError, one_line
from mmray.memory import HEAP
from mmray.report.progress import Console
from mmray.serving import card
from mmray.serving.settings import Replicas, ServeConfig

NAME = "mmray"
IMPORT_PATH = f"{__name__}:application"
SURGE_PERCENT = 100  # of the replicas; new ones start before old ones stop
MARGIN_S = 5.0  # after our own deadline, before Serve's
PROBES = 32  # requests a replica takes above those it scores: refusals, probes, pages
TELL_S = 30.0  # between lines while replicas start
LOOK_S = 0.5  # for a signal
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 10.0, 30.0
WATCH = """
import psutil, sys
sys.stdin.read()  # ends when its parent does
for process in psutil.process_iter(["name", "cmdline"]):
    if process.info["name"] == "haproxy" and sys.argv[1] in " ".join(process.info["cmdline"] or ()):
        process.kill()
"""
#: The ingress logs requests itself; Serve would make up a line of each before it drops that.
LOGGING = {"enable_access_log": False, "encoding": "TEXT", "log_level": "WARNING"}


def application(args: dict[str, Any]) -> serve.Application:
    """What Serve runs; ``args``: ``bundle``, and ``config`` as a ServeConfig has it. Named by
    ``import_path`` in a Serve config file. Raises ConfigError, BundleError: what cannot serve is
    refused here, as Serve would not go back to what served before."""
    uri = args["bundle"]
    cfg = config.validate(ServeConfig, args.get("config") or {}, "args.config")
    fingerprint = read_manifest(uri).fingerprint
    try:
        ray.get(_checked.remote(uri, fingerprint, cfg))
    except RayTaskError as error:
        raise error.cause from None
    score, decode = cfg.score, cfg.decode
    scorer = _deployment(Scorer, score, cfg, num_gpus=score.gpus).options(
        request_router_config=RequestRouterConfig(
            request_router_class=FewestOut  # type: ignore[arg-type]  # mypy sees another field
        )
    )
    ingress = _deployment(serve.ingress()(Ingress), decode, cfg, extra=PROBES)
    return ingress.bind(uri, fingerprint, cfg, scorer.bind(uri, fingerprint, cfg))


@ray.remote(num_cpus=0, max_calls=1)  # its process ends, and gives its memory back
def _checked(uri: str, fingerprint: str, cfg: ServeConfig) -> None:
    """Raises BundleError where golden pairs score wrong, ConfigError where limits allow none."""
    from mmray.predict import Predictor

    bundle = loaded(uri, fingerprint)
    assert bundle.golden is not None
    Predictor(bundle, "cpu").check_golden()
    card.needs(card.preprocessor_of(bundle, cfg), golden.inputs(bundle.golden))


def _deployment(
    kind: type, replicas: Replicas, cfg: ServeConfig, *, num_gpus: float = 0, extra: int = 0
) -> serve.Deployment:
    seen_s = min(30.0, max(5.0, replicas.downscale_delay_s))  # over which requests are averaged
    made = serve.deployment(
        name=kind.__name__,
        max_ongoing_requests=replicas.max_ongoing + extra,
        max_queued_requests=replicas.max_queued,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            target_ongoing_requests=replicas.target_ongoing,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            look_back_period_s=seen_s,
            metrics_interval_s=seen_s / 3,
        ),
        backpressure_config=BackpressureConfig(
            status_code=503, retry_after_s=cfg.deadlines.retry_after_s
        ),
        graceful_shutdown_timeout_s=cfg.deadlines.request_s + MARGIN_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_surge_percent=SURGE_PERCENT,
        rolling_update_percentage=1.0,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": num_gpus},
        logging_config=LOGGING,
    )
    deployment: serve.Deployment = made(kind)
    return deployment


def _http(cfg: ServeConfig) -> dict[str, Any]:
    return {
        "host": cfg.host,
        "port": cfg.port,
        "request_timeout_s": cfg.deadlines.request_s + MARGIN_S,
    }


def config_file(bundle: str, cfg: ServeConfig) -> str:
    """The YAML that `serve deploy` takes; every value that is not its default is in it."""
    read_manifest(bundle)  # a bundle that is not there is found now
    passed_on = {name: os.environ[name] for name in cluster.PASSED_ON if name in os.environ}
    environment = {"env_vars": HEAP | passed_on}
    tree = {
        "proxy_location": "EveryNode",
        "http_options": _http(cfg),
        "logging_config": LOGGING,
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "runtime_env": environment,
                "args": {
                    "bundle": storage.absolute(bundle),
                    "config": cfg.model_dump(mode="json", exclude_defaults=True),
                },
            }
        ],
    }
    return yaml.safe_dump(tree, sort_keys=False)


# --- in the foreground ---------------------------------------------------------------------------


def run(bundle: str, cfg: ServeConfig, console: Console, metrics_port: int | None = None) -> None:
    """Serve ``bundle`` until SIGINT or SIGTERM, then finish what is in work and end it.

    On this machine alone, or on the cluster that is there. ``metrics_port``: see ``cluster``.
    Raises BundleError, ConfigError, and RunError when the replicas do not start.
    """
    bundle = storage.absolute(bundle)
    manifest = read_manifest(bundle)
    if not cfg.on_loopback and not cfg.asks_for_token:
        console.say(f"listening on {cfg.host} without a token: whoever reaches it may use it")
    console.say(f"starting to serve {manifest.fingerprint[:12]}")
    wait_for_turns()  # all processes of a Ray that is started here inherit that
    has = cluster.connect(num_cpus=_cpus(cfg), metrics_port=metrics_port)
    try:
        _check_room(cfg, has)
        if is_own():
            _watch_over_proxy()
        with _telling(console):
            deployed = deploy(bundle, cfg)
        if metrics_port is not None:
            console.say(f"Prometheus's figures are at http://127.0.0.1:{metrics_port}/metrics")
        console.say(f"serving {manifest.fingerprint[:12]} at {url(cfg)} (Ctrl-C ends it)")
        _wait_for_signal()
        console.say("ending; requests in work are finished first")
        if _deployed() == deployed:  # else somebody has put another bundle in its place
            serve.delete(NAME)
    finally:
        cluster.disconnect()


def deploy(bundle: str, cfg: ServeConfig) -> float:
    """Put ``bundle`` in service on the connected cluster, in place of one that is; returns when
    every replica is ready, with the time at which it was asked for.

    Raises RunError when they do not start: those that were there then stay in service; BundleError
    and ConfigError for what is refused before: a bundle that scores wrong, an address that cannot
    be had.
    """
    _quiet()
    try:
        serve.start(http_options=HTTPOptions(**_http(cfg)), logging_config=LOGGING)
    except RuntimeError as error:
        raise _not_listening(cfg, error) from error
    _check_address(cfg)
    before = _deployed()
    tree = cfg.model_dump(mode="json", exclude_defaults=True)
    try:
        serve.run(application({"bundle": bundle, "config": tree}), name=NAME, route_prefix="/")
    except RuntimeError as error:
        why = _why() or one_line(error)
        if before is None:
            serve.delete(NAME)
        raise RunError(f"{bundle}: not served: {why}") from error
    deployed = _deployed()
    assert deployed is not None
    return deployed


def _check_address(cfg: ServeConfig) -> None:
    """A Serve that runs already keeps its address, whatever is asked for."""
    client = _get_global_client()
    assert client is not None  # it has just been started, where none was
    has = client.http_config
    if (has.host, has.port) != (cfg.host, cfg.port):
        raise ConfigError(
            f"{cfg.host}:{cfg.port}: this cluster's Serve listens at {has.host}:{has.port}; give "
            "that address (--host, --port), or end Serve first (serve shutdown)"
        )


def _check_room(cfg: ServeConfig, has: cluster.Resources) -> None:
    """Replicas that can never be placed would be waited for without end."""
    score, decode = cfg.score, cfg.decode
    cpus = score.cpus * score.min_replicas + decode.cpus * decode.min_replicas
    gpus = score.gpus * score.min_replicas
    for kind, asked, most in (("CPUs", cpus, has.max_cpus), ("GPUs", gpus, has.max_gpus)):
        if asked > most:
            raise ConfigError(
                f"score and decode: the least replicas need {asked:g} {kind}, and the cluster has "
                f"{most}; lower min_replicas, cpus or gpus"
            )


def _watch_over_proxy() -> None:
    """HAProxy outlives a server that is killed (SIGKILL), and keeps its port: a process that hears
    of that end ends it. It goes with this one however that ends."""
    config_of = f"/haproxy-serve/{ray.get_runtime_context().get_node_id()}/"
    subprocess.Popen(
        [sys.executable, "-c", WATCH, config_of],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    )


@contextlib.contextmanager
def _telling(console: Console) -> Iterator[None]:
    """Say now and then what is waited for, as Serve says it."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(TELL_S):
            found = serve.status().applications.get(NAME)
            waits = [] if found is None else [d.message for d in found.deployments.values()]
            console.say("waiting for replicas to start " + one_line(" ".join(waits)))

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _deployed() -> float | None:
    """When what is in service was asked for."""
    found = serve.status().applications.get(NAME)
    return None if found is None else found.last_deployed_time_s


def url(cfg: ServeConfig) -> str:
    host = "127.0.0.1" if cfg.host in ("0.0.0.0", "::") else cfg.host
    return f"http://{host}:{cfg.port}"


def _cpus(cfg: ServeConfig) -> int:
    """Of a Ray that is started for this server alone: room for a second set of replicas, which
    stands beside the first while bundles change."""
    each = (cfg.score, cfg.decode)
    return 2 * round(sum(kind.cpus * kind.max_replicas for kind in each) + 0.5)


def _why() -> str | None:
    """What the replicas that do not start say, on one line."""
    found = serve.status().applications.get(NAME)
    if found is None:
        return None
    said = [d.message for d in found.deployments.values() if "Error" in d.message]
    for message in said:
        for line in reversed(message.splitlines()):
            if "Error: " in line:
                return one_line(line.partition("Error: ")[2])
    return one_line(found.message) or None


def _not_listening(cfg: ServeConfig, error: Exception) -> MmrayError:
    """Why the proxy does not start: of all it says, what HAProxy says of the socket."""
    found = re.search(r"cannot bind socket \((.*?)\) for \[(.*?)\]", str(error))
    if found is not None and not found[2].endswith(f":{cfg.port}"):
        return RunError(f"{found[2]}: HAProxy's counters cannot be there: {found[1]}; try again")
    return ConfigError(
        f"{cfg.host}:{cfg.port}: nothing can listen there: "
        f"{one_line(error) if found is None else found[1]}; give another address (--host, --port)"
    )


def _quiet() -> None:
    """Serve tells of every deployment on the terminal; mmray says what is served."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _wait_for_signal() -> None:
    """Until SIGINT or SIGTERM; Ray's handlers, which end the process at once, are put back.

    A signal that the kernel gives to another thread, as it may after a stop, wakes nobody: it is
    looked for."""
    told = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: told.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    while not told.wait(LOOK_S):
        pass
    for number, handler in before.items():
        signal.signal(number, handler)
