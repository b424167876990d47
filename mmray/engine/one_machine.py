"""What Ray starts for the sake of many machines, and a Ray of one does without.

Each of these processes takes a second of a core to start, some 200 MiB, and wakes many times a
second while rows are scored. A cluster that is joined has all of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray._private import node as ray_node  # what is used of these is not to be had in public
from ray._private import services, worker
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.operators import actor_pool_map_operator

from mmray.engine import agent

AGENT = "--dashboard_agent_command="  # of a raylet
METRICS = "RAY_enable_metrics_collection"
#: Of a Ray that lives as long as this command, with no dashboard: nobody reads what each of its
#: processes would report every second, nor what the GCS gathers for that.
UNWATCHED = {
    METRICS: "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "60000",
}


def is_own() -> bool:
    """Whether the Ray that is connected was started here, and ends with this process."""
    node = worker.global_worker.node  # what Ray has started here; None where it was joined
    return node is not None and bool(node.is_head())


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Meanwhile ``ray.init`` starts a node of one machine."""
    before = ray_node.Node
    ray_node.Node = _OneMachine  # type: ignore[misc]
    try:
        yield
    finally:
        ray_node.Node = before  # type: ignore[misc]


class _OneMachine(ray_node.Node):
    """A head node without what only takes time and memory of a Ray that is one machine and ends
    with its driver: who tells new log lines to a driver that does not listen, ten times a second;
    who would start more machines; and what there is of a dashboard that was not asked for, for
    which the start waits two seconds."""

    def start_log_monitor(self) -> None: ...

    def start_monitor(self) -> None: ...

    def start_api_server(self, **_: Any) -> None: ...

    def start_raylet(self, *args: Any, **keys: Any) -> None:
        session = self.get_session_dir_path()  # type: ignore[no-untyped-call]
        with _no_agent(session) if _unread() else contextlib.nullcontext():
            super().start_raylet(*args, **keys)


def _unread() -> bool:
    """Whether nobody reads Ray's figures, if it is one that is started here."""
    return os.environ.get(METRICS) == UNWATCHED[METRICS]


@contextlib.contextmanager
def _no_agent(session: str) -> Iterator[None]:
    """Meanwhile a raylet is started with ``agent`` instead of Ray's own, which takes a second of a
    core to start and 73 MiB, and wakes 35 times a second for requests that nobody makes."""
    start = services.start_ray_process
    command = subprocess.list2cmdline([sys.executable, "-I", "-S", agent.__file__, session])

    def started(line: list[str], *args: Any, **keys: Any) -> Any:
        other = [AGENT + command if part.startswith(AGENT) else part for part in line]
        return start(other, *args, **keys)

    services.start_ray_process = started  # type: ignore[assignment]
    try:
        yield
    finally:
        services.start_ray_process = start


# --- of Ray Data ---------------------------------------------------------------------------------


@functools.cache  # once in a process
def spare_datasets() -> None:
    """Datasets of a Ray of one machine have no actor that shares the machines of a cluster among
    them, none that knows on which of them actors are and, where nobody reads Ray's figures, none
    that gathers those."""
    _instead(streaming_executor, "create_cluster_autoscaler", lambda *_, **__: _Autoscaler())
    _instead(actor_pool_map_operator, "get_or_create_actor_location_tracker", _Tracker)
    _instead(actor_pool_map_operator, "get_actor_locations", lambda _: {})
    manager = stats._StatsManager
    for name in (
        "register_dataset_to_stats_actor",
        "update_execution_metrics",
        "update_iteration_metrics",
    ):
        _instead(manager, name, lambda *_: None, when=_unwatched)
    _instead(manager, "gen_dataset_id_from_stats_actor", lambda: uuid.uuid4().hex, when=_unwatched)


def _unwatched() -> bool:
    return is_own() and _unread()


def _instead(
    owner: Any, name: str, function: Callable[..., Any], when: Callable[[], bool] = is_own
) -> None:
    """From now on ``owner.name`` is ``function`` while ``when``."""
    before = getattr(owner, name)

    def chosen(*args: Any, **keys: Any) -> Any:
        return (function if when() else before)(*args, **keys)

    setattr(owner, name, staticmethod(chosen) if isinstance(owner, type) else chosen)


class _Autoscaler(ClusterAutoscaler):
    """Has what the machine has, and asks for no more."""

    def __init__(self) -> None:
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._total: ExecutionResources = ExecutionResources.from_resource_dict(has)

    def try_trigger_scaling(self) -> None: ...

    def on_executor_shutdown(self) -> None: ...

    def get_total_resources(self) -> ExecutionResources:
        return self._total


class _Unheard:
    def remote(self, *_: Any) -> None: ...


class _Tracker:
    """What actors tell where they are."""

    def __init__(self) -> None:
        self.update_actor_location = _Unheard()
