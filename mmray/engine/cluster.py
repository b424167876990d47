"""Joining a Ray cluster, or starting one on this machine that ends with this process.

``connect`` joins the cluster it is asked to (``RAY_ADDRESS``, which a submitted job finds set) or
the one that ``ray start`` has left running on this machine; where there is none, it starts Ray
here: no dashboard, quiet, gone with this process however it ends. ``RAY_ADDRESS=local`` always
starts one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private import services, worker  # what is used of these is not to be had in public
from ray.exceptions import AuthenticationError

import mmray
from mmray.engine import one_machine, quiet
from mmray.engine.one_machine import UNWATCHED, is_own
from mmray.errors import ConfigError, MmrayError, one_line
from mmray.memory import HEAP

#: What workers on other machines must know to reach the same storage. Credentials stay at home:
#: nodes of a cluster have a role, or their own environment.
PASSED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
)
#: Of a Ray that is started to serve: HAProxy before replicas that speak HTTP themselves, gRPC among
#: them, one event loop in each; a request's line is written when it ends, not with 999 others.
#: https://docs.ray.io/en/master/kuberay/user-guides/serve-high-throughput.html
SERVING = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",  # not 4 MiB, of 16 rows
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mmray.serving.headers.middlewares",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    "RAY_SERVE_HAPROXY_LOG_TARGET": "/dev/null",  # not whoever is at UDP 514: it holds addresses
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # bytes; longer headers than that are its 400
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # for a caller who sends nothing
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # ten times a second takes 3 % of two cores
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # HAProxy hears of it in one
}
#: Of a Ray that serves and whose figures nobody asks for: HAProxy would tell of every request.
UNCOUNTED = {"RAY_SERVE_HAPROXY_METRICS_ENABLED": "0"}
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where a submitted job finds its runtime environment
AUTOSCALER = "~/ray_bootstrap_config.yaml"  # where `ray up` leaves what the cluster may grow to
PROBE_SECONDS = 5
LEAVING_S = 10.0  # that its processes have to end in
ATTEMPTS = 3  # Ray gives a node 30 s to start, which a busy machine can pass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the cluster has now; ``max_cpus`` and ``max_gpus`` are what it may grow to by itself."""

    cpus: int
    gpus: int
    nodes: int
    object_store_bytes: int
    max_cpus: int
    max_gpus: int


def connect(
    *,
    num_cpus: int | None = None,
    metrics_port: int | None = None,
) -> Resources:
    """Join or start Ray, once in a process, and say what there is to work with.

    ``num_cpus`` limits a Ray that is started here; a cluster that is joined has its own.
    ``metrics_port`` is where Prometheus finds the figures of a Ray that is started here, on every
    interface; it has none otherwise. Raises MmrayError when the cluster cannot be joined,
    ConfigError for a ``metrics_port`` that is taken or is asked of a cluster.
    """
    quiet.errors()
    if not ray.is_initialized():
        address = _find_cluster()
        if address and metrics_port is not None:
            raise ConfigError(
                f"metrics port {metrics_port}: the cluster at {address} has its own, from `ray "
                "start --metrics-export-port`; leave it out"
            )
        if address:
            _join(address)
        else:
            _start(num_cpus, metrics_port)
        logging.getLogger("ray").setLevel(logging.WARNING)
    quiet.datasets()
    one_machine.spare_datasets()
    return resources()


def resources() -> Resources:
    """What the connected cluster has now, and what its autoscaler may add."""
    now: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(now.get("CPU", 0)), int(now.get("GPU", 0))
    return Resources(
        cpus=cpus,
        gpus=gpus,
        nodes=sum(bool(node["Alive"]) for node in ray.nodes()),  # type: ignore[no-untyped-call]
        object_store_bytes=int(now.get("object_store_memory", 0)),
        max_cpus=max(cpus, _limit("CPU")),
        max_gpus=max(gpus, _limit("GPU")),
    )


def _limit(resource: str) -> int:
    """How much of ``resource`` the nodes may have that the autoscaler is allowed to start; 0 where
    there is none.

    The autoscaler of `ray up` tells nobody, but leaves its configuration on the head node, where
    jobs run.
    """
    config = Path(AUTOSCALER).expanduser()
    if is_own() or not config.is_file():  # a Ray of our own has no autoscaler
        return 0
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    kinds = [
        (kind["resources"].get(resource, 0), kind.get("max_workers", 0))
        for kind in tree["available_node_types"].values()
    ]
    limit, nodes = 0, int(tree["max_workers"])
    for each, count in sorted(kinds, reverse=True):
        limit += each * min(count, nodes)
        nodes -= min(count, nodes)
    return limit


def prepare_to_serve(*, counted: bool = False) -> None:
    """Set what ``ray.serve`` reads when it is imported, here and in the Ray that is started here;
    a cluster that is joined has its own environment. ``counted``: there is a metrics port."""
    if not ray.is_initialized() and _find_cluster() is None:
        ports = _ports_of_its_own()
        for name, value in (SERVING | ports | ({} if counted else UNCOUNTED)).items():
            os.environ.setdefault(name, value)


def _ports_of_its_own() -> dict[str, str]:
    """Those that Serve has beside the one asked for, else the same for all servers of a machine:
    HAProxy's counters, the proxy HAProxy asks where no replica is up (two servers would listen
    there together, each to requests of the other) and the first of the replicas' own (one that is
    killed leaves its port to whoever comes next, and HAProxy hears of it later)."""
    names = ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in names]
        free = {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
    free["DIRECT_INGRESS_MIN_HTTP"] = random.randrange(20_000, 30_000)  # below what clients get
    return {f"RAY_SERVE_{name}_PORT": str(port) for name, port in free.items()}


def disconnect() -> None:
    """Leave the cluster; one that ``connect`` started ends, to its last process."""
    workers = _workers()
    ray.shutdown()
    # Of Ray 2.60's, one now and then waits for ever on its way out, and keeps its memory.
    for process in psutil.wait_procs(workers, timeout=LEAVING_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just gone by itself
            process.kill()


def _workers() -> list[psutil.Process]:
    """What the raylet has started, of a Ray that was started here."""
    node = worker.global_worker.node  # what Ray has started here; None where it was joined
    raylets = [] if node is None else node.all_processes.get("raylet", [])
    found: list[psutil.Process] = []
    for raylet in raylets:
        with contextlib.suppress(psutil.NoSuchProcess):  # then its workers end, too
            found += psutil.Process(raylet.process.pid).children(recursive=True)
    return found


# --- starting ------------------------------------------------------------------------------------


def _start(num_cpus: int | None, metrics_port: int | None) -> None:
    """Start Ray here; its workers inherit this process's environment and import path."""
    for name, value in HEAP.items():
        os.environ.setdefault(name, value)
    if metrics_port is None:
        for name, value in UNWATCHED.items():
            os.environ.setdefault(name, value)
    else:
        _check_free(metrics_port)
        for name in UNWATCHED:  # of a Ray that this process, or its parent, had before
            os.environ.pop(name, None)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with one_machine.starting():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,  # not its note that the cluster has a token
                    _metrics_export_port=metrics_port,
                )
        except OSError as error:
            raise MmrayError(
                f"Ray did not start on this machine: {error}; it needs a temporary directory to "
                "write to (RAY_TMPDIR), and ~/.ray for its access token (or RAY_AUTH_TOKEN)"
            ) from error
        # Ray raises a bare Exception here, and tells "slow" from "broken" only in its text.
        except Exception as error:
            ray.shutdown()
            if attempt == ATTEMPTS or "timed out" not in str(error):
                raise MmrayError(f"Ray did not start on this machine: {one_line(error)}") from error
            log.warning("Ray took too long to start; trying again")
        else:
            atexit.register(disconnect)
            return


def _check_free(port: int) -> None:
    """Ray starts without its figures where the port for them is taken, and says so in a log."""
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"metrics port {port}: cannot be had: {error.strerror}; give another"
        ) from error


# --- joining -------------------------------------------------------------------------------------


def _find_cluster() -> str | None:
    """The cluster to join, as host:port; None to start one here."""
    asked = os.environ.get("RAY_ADDRESS", "")
    if asked == "local":
        return None
    if "://" in asked:
        raise MmrayError(
            f"RAY_ADDRESS={asked}: mmray does not drive a cluster through Ray Client; run it as a "
            "job: ray job submit --working-dir . -- python jobs/score.py ..."
        )
    if asked and asked != "auto":
        if not _answers(asked):
            raise MmrayError(
                f"no Ray cluster answers at {asked} (RAY_ADDRESS); start it, or unset RAY_ADDRESS "
                "to run on this machine alone"
            )
        return asked
    # Only a cluster that `ray start` announced: "auto" would also join a private one, which goes
    # when the process that started it does.
    found: str | None = services.find_bootstrap_address(None)
    if found and _answers(found):
        return found
    if asked:
        raise MmrayError("RAY_ADDRESS=auto: no Ray cluster runs on this machine; start it first")
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def _join(address: str) -> None:
    # A job may have been submitted with some of these variables; what this command says wins.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    # Asked for a cluster that it finds itself, Ray also finds the token.
    found = os.environ.get("RAY_ADDRESS", "") in ("", "auto")
    try:
        ray.init(
            address=None if found else address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=_runtime_env(),
        )
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()
        if _wants_token(error):
            raise MmrayError(
                f"the Ray cluster at {address} refuses the access token of this process, or found "
                "none; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to what "
                "`ray get-auth-token` prints on its head node"
            ) from error
        raise MmrayError(f"cannot join the Ray cluster at {address}: {one_line(error)}") from error


def _wants_token(error: Exception) -> bool:
    """Ray finds out on the way in, and names the reason in the text of the cause at best."""
    return isinstance(error, AuthenticationError) or "AuthToken" in str(error.__cause__)


def _runtime_env() -> dict[str, Any]:
    """What workers elsewhere need of this process: where storage is, and this very mmray."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment: dict[str, Any] = {"env_vars": HEAP | passed_on}
    job = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    if "working_dir" not in job:  # else Ray has brought it
        environment["py_modules"] = [str(Path(mmray.__file__).parent)]
    return environment
