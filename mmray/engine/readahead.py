"""How far reading may run ahead of scoring."""

from __future__ import annotations

import ray.data
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator

CHUNKS_A_READER = 16
_KEY = "mmray.read_ahead"


class ReadAhead(BackpressurePolicy):
    """Readers wait while so many chunks do. Ray's own policies count bytes alone: of small chunks
    they let in as many as there are, at some kilobytes of the driver's memory each."""

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        waiting = self._topology[op].total_enqueued_output_blocks()
        for following in op.output_dependencies:
            waiting = max(waiting, self._topology[following].total_enqueued_input_blocks())
        most = self._data_context.get_config(_KEY)
        return 0 if waiting >= most else None


def bound(dataset: ray.data.Dataset, readers: int) -> None:
    """Let each reader of ``dataset`` be a few chunks ahead of whoever takes them."""
    policies = [*ENABLED_BACKPRESSURE_POLICIES, ReadAhead]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    dataset.context.set_config(_KEY, readers * CHUNKS_A_READER)
