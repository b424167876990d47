"""Load on an HTTP server, from a process of its own: requests as bytes, answers by their status.

    python benchmarks/_load.py < PLAN.json

A plan: ``host``, ``port``, ``path``, ``bodies`` (a file of length-prefixed multipart bodies),
``seconds``, and either ``rate`` (open loop: requests come when they come, as Poisson says, answered
or not) or ``in_flight`` (closed loop: so many callers, each waiting for its answer). One line of
JSON comes back, with latencies in ms from when a request was due (or was sent, where this process
was late by no more than its own clock is coarse), refused ones apart; and what is left of them
without decoding and the model, where the server tells how long those took.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

BOUNDARY = "b0undary"
PATIENCE_S = 60.0  # for answers still out when the load ends
MOST_OPEN = 2048  # connections
TIMING = b"server-timing: "  # its own parts of a request's time, in ms
PART = re.compile(rb"(?:decode|model);dur=([0-9.]+)")
STEPS = 1000  # in which a load is looked at for its slope
TICK_S = 0.002  # by which whoever asks may be late by itself
SETTLING = 0.25  # of the time of a load, in which the first answers come; not counted in rates


class Connection(asyncio.Protocol):
    """One request at a time; its answer is a status, read no further than its length, and how many
    seconds its decoding took and the model, where the server tells."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.answer: asyncio.Future[tuple[int, float]] | None = None
        self.buffer = b""
        self.closed = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.answer is None or self.answer.done():
            return
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        at = lower.find(b"content-length:")
        length = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        self.closed |= at < 0  # its body ends with the connection
        if len(body) < length:
            return
        self.buffer = b""
        if b"connection: close" in lower:
            self.closed = True
        _, _, timing = lower.partition(TIMING)
        own_s = sum(map(float, PART.findall(timing.split(b"\r\n", 1)[0]))) / 1e3
        self.answer.set_result((int(head[9:12]), own_s))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError("closed before its answer"))


class Load:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.requests = [self._request(body) for body in read_bodies(Path(plan["bodies"]))]
        self.idle: list[Connection] = []
        # Due, ended, status (0: no answer), seconds of decoding and in the model.
        self.results: list[tuple[float, float, int, float]] = []
        self.open = 0

    def _request(self, body: bytes) -> bytes:
        return (
            f"POST {self.plan['path']} HTTP/1.1\r\nHost: {self.plan['host']}\r\n"
            f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    async def one(self, number: int, due: float) -> None:
        status, own_s = 0, 0.0
        try:
            while self.idle and self.idle[-1].closed:
                self.idle.pop()
            if self.idle:
                connection = self.idle.pop()
            else:
                loop = asyncio.get_running_loop()
                where = self.plan["host"], self.plan["port"]
                _, connection = await loop.create_connection(Connection, *where)
            connection.answer = asyncio.get_running_loop().create_future()
            connection.transport.write(self.requests[number % len(self.requests)])
            status, own_s = await connection.answer
            if connection.closed:
                connection.transport.close()
            else:
                self.idle.append(connection)
        except OSError:
            pass  # counted: its status stays 0
        self.results.append((due, time.perf_counter(), status, own_s))

    async def open_loop(self, rate: float, seconds: float) -> None:
        random.seed(int(rate * 1000))
        tasks, due, number = set(), time.perf_counter(), 0
        end = due + seconds
        while (due := due + random.expovariate(rate)) < end:
            while (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            # The event loop's clock ticks in ms: by what it wakes late, nobody was slow.
            since = now if (now := time.perf_counter()) - due < TICK_S else due
            if len(tasks) >= MOST_OPEN:
                self.results.append((since, since, -1, 0.0))  # we could not even ask
                continue
            task = asyncio.create_task(self.one(number, since))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE_S)

    async def closed_loop(self, in_flight: int, seconds: float) -> None:
        end = time.perf_counter() + seconds

        async def caller(number: int) -> None:
            while (now := time.perf_counter()) < end:
                await self.one(number, now)
                number += in_flight

        await asyncio.gather(*(caller(n) for n in range(in_flight)))

    def report(self, began: float) -> dict[str, Any]:
        seconds = self.plan["seconds"]
        latencies = np.array([e - d for d, e, s, _ in self.results if s == 200]) * 1e3
        around = np.array([e - d - own for d, e, s, own in self.results if s == 200 and own]) * 1e3
        refused = np.array([e - d for d, e, s, _ in self.results if s in (429, 503)]) * 1e3
        settled, end = began + SETTLING * seconds, began + seconds
        inside = sorted(e for _, e, s, _ in self.results if s == 200 and settled <= e <= end)
        goodput = len(inside) / (end - settled)
        if "in_flight" in self.plan and len(inside) > 1:
            goodput = slope(inside, settled, end)
        return {
            "sent": len(self.results),
            "statuses": dict(Counter(str(status) for _, _, status, _ in self.results)),
            "goodput": goodput,
            "ms": percentiles(latencies),
            "added_ms": percentiles(around),
            "refused_ms": percentiles(refused),
            # Of the answers, by the second they came in: to see a server recover.
            "by_second": np.bincount(
                [int(e - began) for _, e, s, _ in self.results if s == 200 and e >= began]
            ).tolist() if len(latencies) else [],
        }  # fmt: skip


def slope(times: list[float], start: float, end: float) -> float:
    """Answers a second between ``start`` and ``end``, of the line that fits their number over time
    best; ``times`` are sorted. Callers that wait for their answers get them in waves, one for every
    batch, and a count would depend on how many waves just fit in. Looked at in even steps, a time
    without answers counts, too."""
    at = np.linspace(start, end, STEPS)
    return float(np.polyfit(at - start, np.searchsorted(times, at), 1)[0])


def percentiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.percentile(values, (50, 95, 99))
    return {name: round(float(v), 2) for name, v in zip(("p50", "p95", "p99"), found, strict=True)}


def write_bodies(path: Path, pairs: list[tuple[bytes, str]]) -> Path:
    """Multipart bodies of pictures and captions, as ``read_bodies`` reads them."""
    with path.open("wb") as file:
        for image, caption in pairs:
            body = (
                f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="caption"\r\n\r\n{caption}'
                f"\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; "
                'name="image"; filename="i.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
            ).encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()  # fmt: skip
            file.write(struct.pack("<I", len(body)) + body)
    return path


def read_bodies(path: Path) -> list[bytes]:
    data, found, at = path.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return found


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    load = Load(plan)
    began = time.perf_counter()
    if "rate" in plan:
        await load.open_loop(plan["rate"], plan["seconds"])
    else:
        await load.closed_loop(plan["in_flight"], plan["seconds"])
    return load.report(began)


def apart(plan: dict[str, Any]) -> dict[str, Any]:
    """``run``, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(plan),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    import uvloop

    print(json.dumps(uvloop.run(run(json.load(sys.stdin)))))
