"""A long run meets every one of these: the short form of `make chaos`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "chaos.py"


def test_a_driver_a_scorer_a_reader_and_a_node_are_killed_and_no_row_is_lost() -> None:
    line = [sys.executable, SCRIPT, "--rounds", "1", "--rows", "4800", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    (found,) = result["rounds"]
    assert found["same"] and found["verified"] and found["commands"] >= 2
    assert found["rescored"] <= found["most"] < result["rows"]
    assert {"driver", "scorer", "reader", "node"} == found["killed"].keys()
