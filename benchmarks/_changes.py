"""What happens under half of the load when a scoring replica is killed (SIGKILL), when one that
speaks HTTP is, and when another bundle takes the place of the first (a rolling update).

In the load nothing is asked again, so that failures are seen (status 0 is a connection that ended
without an answer). Beside it a few callers ask through mmray's client: ``client_lost`` of their
requests had no answer in the end, ``client_wrong`` had scores that the bundle they name does not
give.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from _load import apart
from _servers import samples_of

from mmray import bundle as bundles
from mmray.client import Client, ServeError
from mmray.predict import Predictor

CHANGES = ("killed Scorer", "killed Ingress", "update")
CLIENTS = 2
TOLERANCE = 0.02  # of a probability, of batches of all sizes in bfloat16
HERE = Path(__file__).parent


def changes(
    asked: dict[str, Any],
    most: float,
    seconds: float,
    process: psutil.Process,
    bundle: Path,
    other: Path,
) -> dict[str, Any]:
    """What happens under half of the load when replicas are killed, and when bundles change."""
    scores = {**_scores(bundle, asked["bodies"]), **_scores(other, asked["bodies"])}
    found: dict[str, Any] = {}
    steps = (
        lambda: _replica(process, "Scorer").kill(),
        lambda: _replica(process, "Ingress").kill(),
        lambda: _update(process, other, asked["port"]),
    )
    for name, change in zip(CHANGES, steps, strict=True):
        plan = {**asked, "rate": 0.5 * most, "seconds": seconds}
        ended = time.monotonic() + seconds
        with ThreadPoolExecutor(1 + CLIENTS) as pool:
            loaded = pool.submit(apart, plan)
            clients = [pool.submit(_ask, asked, i, ended, scores) for i in range(CLIENTS)]
            time.sleep(seconds / 4)
            change()
            told = [each.result() for each in clients]
            counts = (sum(column) for column in zip(*told, strict=True))
            names = ("client_asked", "client_lost", "client_wrong")
            found[name] = loaded.result() | dict(zip(names, counts, strict=True))
    return found


def _scores(bundle: Path, bodies: str) -> dict[tuple[str, int], dict[str, float]]:
    """By model and picture, what must come out."""
    predictor = Predictor(bundles.load(str(bundle)), "cpu")
    table = predictor.score_table(samples_of(bodies)).to_pylist()
    return {
        (predictor.fingerprint[:12], i): {k[2:]: v for k, v in row.items() if k.startswith("p_")}
        for i, row in enumerate(table)
    }


def _ask(
    asked: dict[str, Any], first: int, ended: float, scores: dict[tuple[str, int], dict[str, float]]
) -> tuple[int, int, int]:
    """As a caller with mmray's client: how many it asked, had no answer to, had a wrong one to."""
    samples, count, lost, wrong = samples_of(asked["bodies"]), 0, 0, 0
    with Client(f"http://{asked['host']}:{asked['port']}", attempts=20) as client:
        for number in itertools.count(first):
            if time.monotonic() > ended:
                return count, lost, wrong
            i = number % len(samples)
            count += 1
            try:
                score = client.score(samples[i].image, samples[i].caption)
            except ServeError:
                lost += 1
                continue
            right = scores.get((score.model, i), {})
            wrong += right.keys() != score.scores.keys() or any(
                abs(right[name] - value) > TOLERANCE for name, value in score.scores.items()
            )
    raise AssertionError


def _update(process: psutil.Process, bundle: Path, port: int) -> None:
    """Have ``bundle`` take the place of what is served, by the Ray that the server has started."""
    lines = (" ".join(each.cmdline()) for each in process.children(recursive=True))
    (address, *_) = (m[1] for line in lines if (m := re.search(r"--gcs-address=(\S+)", line)))
    subprocess.run(
        [sys.executable, HERE / "_servers.py", "update", bundle, str(port)],
        env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"},
        check=True,
    )


def _replica(server: psutil.Process, kind: str) -> psutil.Process:
    name = f"ray::ServeReplica:mmray:{kind}"
    children = server.children(recursive=True)
    return next(each for each in children if "".join(each.cmdline()).startswith(name))
