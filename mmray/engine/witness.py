"""Small actors beside the driver, which are told what is begun and outlive whoever tells them.

Imports nothing of Ray Data: such an actor's process would take a second of a core for that.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def called(kind: type) -> Any:
    """A new actor of this ``kind``, beside the driver as long as that node lives."""
    here = ray.get_runtime_context().get_node_id()
    beside = NodeAffinitySchedulingStrategy(here, soft=True)
    witness: Any = ray.remote(num_cpus=0)(kind)
    return witness.options(scheduling_strategy=beside).remote()


def acquaintance(actor: Any) -> Any:
    """A handle of ``actor`` that does not keep it alive, as all others do that are passed on."""
    state, _, _ = actor._serialization_helper()  # not to be had in public
    return ActorHandle._deserialization_helper(state, weak_ref=True)
