"""What Prometheus is told by the replicas of a server, beside what Serve tells it."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from ray.serve import metrics

from mmray.serving.responses import SUM_S

#: Upper bounds of what histograms count.
ROWS: list[float] = [1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256]
SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]


class Later:
    """Calls once a second what it is given: a call to Ray's metrics takes 6 us among others of its
    kind, and 70 by itself, while somebody waits for an answer."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def call(self, metric: Callable[..., None], *args: Any) -> None:
        if not self._calls:
            asyncio.get_running_loop().call_later(SUM_S, self._all)
        self._calls.append(functools.partial(metric, *args))

    def _all(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            call()


class ModelMeters:
    """What Prometheus is told of the model."""

    def __init__(self) -> None:
        self._rows = metrics.Histogram("mmray_batch_rows", "Pairs scored together.", ROWS)
        self._seconds = metrics.Histogram(
            "mmray_model_seconds", "A batch, from the call of the model to its scores.", SECONDS
        )
        self._later = Later()

    def scored(self, rows: int, seconds: float) -> None:
        self._later.call(self._rows.observe, rows)
        self._later.call(self._seconds.observe, seconds)


class Meters:
    """What Prometheus is told of requests."""

    def __init__(self) -> None:
        by: Any = ("path", "status")  # which Ray takes for one name
        self._requests = metrics.Counter("mmray_requests", "Requests answered.", tag_keys=by)
        self._request = metrics.Histogram(
            "mmray_request_seconds", "From head to answer, of those not told 503.", SECONDS,
            tag_keys=("path",),
        )  # fmt: skip
        self._decode = metrics.Histogram(
            "mmray_decode_seconds", "Pictures and captions of a request.", SECONDS
        )
        self._wait = metrics.Histogram(
            "mmray_wait_seconds", "Until a group of decoded pairs is sent to be scored.", SECONDS
        )
        self._later = Later()
        self._answered: Counter[tuple[str, int]] = Counter()

    def answered(self, path: str, status: int, seconds: float) -> None:
        if not self._answered:  # in an overload there are a thousand a second
            self._later.call(self._count)
        self._answered[path, status] += 1
        if status != HTTPStatus.SERVICE_UNAVAILABLE:
            self._later.call(self._request.observe, seconds, {"path": path})

    def _count(self) -> None:
        for (path, status), count in self._answered.items():
            self._requests.inc(count, tags={"path": path, "status": str(status)})
        self._answered.clear()

    def waited(self, seconds: float) -> None:
        self._later.call(self._wait.observe, seconds)

    def decoded(self, seconds: float) -> None:
        self._later.call(self._decode.observe, seconds)
