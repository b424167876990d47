"""Scoring on three nodes while its processes are killed: is the outcome the undisturbed one?

    python benchmarks/chaos.py [--rounds 10] [--rows 4800] [--seed 0] [--json]

A cluster of three nodes runs on this machine. Every round scores the same archive into a new place
and kills, with -9, at random moments: the driver (the same command is then run again), a scoring
actor, a reader, a whole node (another takes its place). Afterwards the content must be that of an
undisturbed run, to the last bit of every score, `mmray verify` must hold, and no more rows may have
been scored again than what was in flight; else it exits with 1. ``rescored``: rows that were scored
a second time although their part was written; ``most``: how many that may be, see ``IN_FLIGHT_AT``.
Without ``--json`` a line a round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from _corpus import pictures, write_bundle, write_tars
from ray.cluster_utils import Cluster

from mmray.engine.ingest import CHUNK_ROWS
from mmray.verify import verify

KINDS = ("driver", "scorer", "reader", "node")
NODES, SHARDS, COMMANDS, SECONDS = 3, 12, 12, 600
SCRIPT = Path(__file__).with_name("_chaos.py")
#: Rows whose scores may be written, or be on the way, when a process is killed, and unknown to who
#: goes on: a chunk at every actor (a node has one) when the driver dies, as they outlive it for a
#: moment; at one else, as an actor scores one after the other. What a reader held was not scored.
IN_FLIGHT_AT = {
    "driver": NODES * CHUNK_ROWS,
    "scorer": CHUNK_ROWS,
    "reader": 0,
    "node": CHUNK_ROWS,
}
#: In the names that Ray gives its workers.
SCORER, READER = "Scorer", "ReadPieces"


class Bench:
    """The cluster, the archive and what an undisturbed run makes of it."""

    def __init__(self, root: Path, rows: int) -> None:
        self.root, self.rows = root, rows // SHARDS * SHARDS
        self.bundle = write_bundle(root / "bundle", "mobilenet_v3_small")
        self.archive = write_tars(root / "archive", [rows // SHARDS] * SHARDS, pictures(512))
        node = {"num_cpus": 1, "object_store_memory": 1 << 29}
        self._node_args = node
        self.cluster = Cluster(
            initialize_head=True, head_node_args={**node, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(**node) for _ in range(NODES - 1)]
        self.environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        began = time.monotonic()
        notes = self._notes("whole")
        assert self.start("whole", notes).wait(SECONDS) == 0, self.said("whole")
        self.seconds = time.monotonic() - began
        self.whole = self.content("whole")

    def start(self, name: str, notes: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, SCRIPT, notes, self.bundle, self.archive, self.root / name]
        with open(self.root / f"{name}.log", "ab") as log:
            return subprocess.Popen(line, env=self.environment, stdout=log, stderr=log)

    def said(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()[-3000:]

    def content(self, name: str) -> dict[str, Any]:
        scores = self.root / name / "scores"
        return {
            str(path.relative_to(scores)): pq.read_table(path).replace_schema_metadata(None)
            for path in scores.rglob("*.parquet")
        }

    def round(self, name: str, chance: random.Random) -> dict[str, Any]:
        notes, began = self._notes(name), time.monotonic()
        killed: Counter[str] = Counter()
        process, commands = self.start(name, notes), 1
        pending = chance.sample([*KINDS, chance.choice(KINDS)], k=len(KINDS) + 1)
        pending.sort(key=lambda kind: kind != "reader")  # theirs is the first turn: they end first
        while (code := process.poll()) is None or code != 0:
            assert time.monotonic() - began < SECONDS, f"no end in sight\n{self.said(name)}"
            if code is not None:
                assert code == -signal.SIGKILL, f"it ended with {code}\n{self.said(name)}"
                assert commands < COMMANDS, f"{commands} commands\n{self.said(name)}"
                process, commands = self.start(name, notes), commands + 1
            time.sleep(chance.uniform(0.5, 2))
            if not any(notes.iterdir()):
                continue
            # What is not there now, as a reader at the end, waits for its turn.
            kind = next((kind for kind in pending if self._kill(kind, process)), None)
            if kind is not None:
                pending.remove(kind)
                killed[kind] += 1
        verdict = verify(str(self.root / name))
        scored, found = self._scored(notes), self.content(name)
        return {
            "killed": dict(killed),
            "commands": commands,
            "seconds": round(time.monotonic() - began, 1),
            "rescored": sum(scored.values()) - len(scored),
            "most": sum(IN_FLIGHT_AT[kind] * count for kind, count in killed.items()),
            "same": found == self.whole,
            "verified": verdict.ok and verdict.rows == self.rows,
        }

    def close(self) -> None:
        self.cluster.shutdown()

    def _notes(self, name: str) -> Path:
        folder = self.root / f"{name}.notes"
        folder.mkdir()
        return folder

    def _scored(self, notes: Path) -> Counter[tuple[str, int]]:
        lines = [line.split() for path in notes.iterdir() for line in path.open()]
        return Counter((shard, row) for shard, a, b in lines for row in range(int(a), int(b)))

    def _kill(self, kind: str, driver: subprocess.Popen[bytes]) -> bool:
        ways: dict[str, Callable[[], bool]] = {
            "driver": lambda: _kill(driver),
            "scorer": lambda: self._kill_worker(SCORER),
            "reader": lambda: self._kill_worker(READER),
            "node": self._kill_node,
        }
        return ways[kind]()

    def _kill_worker(self, name: str) -> bool:
        for node in self.cluster.list_all_nodes():
            raylet = node.all_processes["raylet"][0].process.pid
            for child in psutil.Process(raylet).children(recursive=True):
                try:
                    if name in "".join(child.cmdline()):
                        child.kill()
                        return True
                except psutil.NoSuchProcess:  # a zombie, too: it ended since it was listed
                    continue
        return False

    def _kill_node(self) -> bool:
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(**self._node_args))
        return True


def _kill(driver: subprocess.Popen[bytes]) -> bool:
    if driver.poll() is not None:
        return False
    driver.kill()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="(default 10)")
    parser.add_argument("--rows", type=int, default=4800, help="pairs (default 4800)")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()
    chance, rounds = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.rows)
        try:
            for number in range(args.rounds):
                rounds.append(bench.round(f"round{number}", chance))
                print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
        finally:
            bench.close()
    held = all(
        found["same"] and found["verified"] and found["rescored"] <= found["most"]
        for found in rounds
    )
    result = {
        "benchmark": "chaos",
        "rows": bench.rows,
        "undisturbed_s": round(bench.seconds, 1),
        "rounds": rounds,
        "killed": dict(sum((Counter(found["killed"]) for found in rounds), Counter())),
        "held": held,
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
