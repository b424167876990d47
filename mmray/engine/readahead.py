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
#: Of large pictures, fewer chunks: while actors start, readers would fill the memory, and take the
#: time.
BYTES_A_READER = 192 << 20
_KEY = "mmray.read_ahead"


class ReadAhead(BackpressurePolicy):
    """Readers wait while so many chunks do, or so many bytes. Ray's own policies count bytes alone,
    up to a share of all its memory: of small chunks they let in as many as there are, at some
    kilobytes of the driver's memory each."""

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        state = self._topology[op]
        chunks = [state.total_enqueued_output_blocks()]
        sizes = [state.total_enqueued_output_blocks_bytes()]
        for following in map(self._topology.__getitem__, op.output_dependencies):
            chunks.append(following.total_enqueued_input_blocks())
            sizes.append(following.total_enqueued_input_blocks_bytes())
        readers = self._data_context.get_config(_KEY)
        full = max(chunks) >= readers * CHUNKS_A_READER or max(sizes) >= readers * BYTES_A_READER
        return 0 if full else None


def bound(dataset: ray.data.Dataset, readers: int) -> None:
    """Let each reader of ``dataset`` be a few chunks ahead of whoever takes them."""
    policies = [*ENABLED_BACKPRESSURE_POLICIES, ReadAhead]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    dataset.context.set_config(_KEY, readers)
