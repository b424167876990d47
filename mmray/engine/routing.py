"""Which replica a group of pairs goes to: one that has the fewest of this sender's.

Serve's own router goes by what replicas say of their queues. Over gRPC that comes with the answer
to the call it was said of, long after, and is then taken for the present: one replica had four
groups while the other had none.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


class FewestOut(RequestRouter):
    """Of the replicas that take calls, the one with the fewest that are not answered; of several,
    any. What other senders have out is not known here."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._out: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All of them, each a choice of its own, in the order in which they are tried."""
        if pending_request is not None:  # where none of them takes it, wait before the next try
            pending_request.routing_context.should_backoff = True

        def out(replica: RunningReplica) -> tuple[int, float]:
            return self._out[replica.replica_id], random.random()

        return [[replica] for replica in sorted(candidate_replicas, key=out)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._out[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Also where it failed."""
        super().on_request_completed(replica_id, internal_request_id)
        self._out[replica_id] -= 1
        if self._out[replica_id] <= 0:
            del self._out[replica_id]  # replicas come and go
