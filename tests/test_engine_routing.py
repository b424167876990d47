"""Which replica a group goes to, on a real Serve: no replica waits while another has a queue."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from mmray.engine.routing import FewestOut

ROUNDS, HEARS_S = 5, 0.25


@pytest.fixture
def holders(ray_cluster: None) -> Iterator[DeploymentHandle[Any]]:
    class Holder:  # here, so that it travels as it is: replicas have no tests to import
        """Says who has a call, and keeps it until it is let go."""

        async def hold(self, path: str) -> None:
            replica = serve.get_replica_context().replica_id.unique_id
            Path(path).write_text(replica)
            while not Path(f"{path}.go").exists():
                await asyncio.sleep(0.01)

    app = serve.deployment(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(request_router_class=FewestOut),
    )(Holder)
    yield serve.run(app.bind(), name="routing", route_prefix=None).options(_by_reference=False)
    serve.delete("routing")
    serve.shutdown()


class Calls:
    def __init__(self, handle: DeploymentHandle[Any], folder: Path) -> None:
        self.handle, self.folder, self.out = handle, folder, {}  # type: ignore[var-annotated]

    def send(self) -> str:
        """A call; the replica that has it."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}"
        self.out[path] = self.handle.hold.remote(str(path))
        end = time.monotonic() + 20
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < end, "no replica took it"
            time.sleep(0.01)
        return path.read_text()

    def let_go(self, path: Path) -> None:
        Path(f"{path}.go").touch()
        self.out.pop(path).result(timeout_s=20)
        time.sleep(HEARS_S)  # the router does, in a thread of its own

    def of(self, replica: str) -> list[Path]:
        """The calls it has, as they came."""
        return [path for path in self.out if path.read_text() == replica]

    def each(self) -> list[int]:
        return sorted(Counter(path.read_text() for path in self.out).values())


def test_a_call_goes_to_the_replica_that_has_the_fewest(
    holders: DeploymentHandle[Any], tmp_path: Path
) -> None:
    """Serve's own router fails this: an answer brings what a replica had when it took the call."""
    calls = Calls(holders, tmp_path)
    for _ in range(ROUNDS):
        first = calls.send()
        second = calls.send()
        assert first != second
        calls.send(), calls.send()
        assert calls.each() == [2, 2]
        calls.let_go(calls.of(first)[0])  # the older one of its calls
        calls.let_go(calls.of(second)[1])
        calls.send(), calls.send()
        assert calls.each() == [2, 2]
        for path in list(calls.out):
            calls.let_go(path)


def test_a_replica_that_dies_has_nothing_out_any_more(
    holders: DeploymentHandle[Any], tmp_path: Path
) -> None:
    """It is not the one with the fewest: what it is given is taken by others, until it is back."""
    calls = Calls(holders, tmp_path)
    killed = calls.send()
    actor = next(
        ray.get_actor(each["name"], namespace="serve")
        for each in ray.util.list_named_actors(all_namespaces=True)
        if each["name"].endswith(killed)
    )
    ray.kill(actor, no_restart=True)
    with pytest.raises(Exception, match=r"(?i)died|unavailable|dead"):
        next(iter(calls.out.values())).result(timeout_s=20)
    calls.out.clear()
    found = [calls.send() for _ in range(4)]
    assert killed not in found
    for path in list(calls.out):
        calls.let_go(path)
