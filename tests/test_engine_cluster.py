"""Starting Ray here, or not joining the wrong cluster; tests/test_jobs.py joins a real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]

START = """
import json, time
from mmray.engine import cluster
cluster.connect(num_cpus=2)
found = cluster.connect()
print(json.dumps([found.cpus, found.nodes, found.object_store_bytes > 0]), flush=True)
time.sleep(600)
"""

LEFT_BEHIND = """
import subprocess
import ray
from mmray.engine import cluster
cluster.LEAVING_S = 1.0
cluster.connect(num_cpus=1)
@ray.remote
def start():
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid
print(ray.get(start.remote()), flush=True)
"""

HOLDING = """
import ray
from pathlib import Path
from mmray.engine import cluster
cluster.connect(num_cpus=1)
@ray.remote
def in_large_pages():
    held = bytearray(b"x") * (64 << 20)
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("AnonHugePages"))
print(ray.get(in_large_pages.remote()), flush=True)
"""

LOSING = """
import contextlib, io, json, os, time
import ray
from mmray.engine import cluster
cluster.connect(num_cpus=1)
@ray.remote(max_retries=0)
def die():
    os._exit(1)
out, err, deadline = io.StringIO(), io.StringIO(), time.monotonic() + 60
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    with contextlib.suppress(ray.exceptions.WorkerCrashedError):
        ray.get(die.remote())
    while "worker died" not in out.getvalue() + err.getvalue() and time.monotonic() < deadline:
        time.sleep(0.1)
print(json.dumps([out.getvalue(), err.getvalue()]))
"""

REFUSED = """
import json, os, sys
from mmray.engine import cluster
from mmray.errors import MmrayError
said = []
for address in json.loads(sys.argv[1]):
    os.environ["RAY_ADDRESS"] = address
    try:
        cluster.connect()
    except MmrayError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """Ray's temporary directory and home, empty; short, as sockets live below it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(place: Path) -> dict[str, str]:
    others = ("RAY_", "GLIBC_TUNABLES")  # which a Ray that was started before has left
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return {**kept, "HOME": str(place), "RAY_TMPDIR": str(place)}


def said(script: str, place: Path, *words: str) -> str:
    """What ``script`` prints; it has to succeed."""
    line, env = [sys.executable, "-c", script, *words], environment(place)
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def processes(place: Path) -> list[str]:
    """Command lines of the running processes that name ``place``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        line = b" ".join(words).decode(errors="replace")
        if str(place) in line:
            found.append(line)
    return found


def test_a_ray_started_here_ends_with_the_process_that_started_it(place: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", START],
        cwd=ROOT,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None and driver.stderr is not None
    try:
        line = driver.stdout.readline()
        assert line, driver.stderr.read()
        assert json.loads(line) == [2, 1, True]
        assert any("raylet" in process for process in processes(place))
    finally:
        driver.kill()
    assert "token" not in driver.stderr.read(), "that there is one is no news to a user"
    driver.wait()
    deadline = time.monotonic() + 60
    while (left := processes(place)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, "killed, it leaves Ray behind"


def test_what_its_workers_hold_lies_in_large_pages(place: Path) -> None:
    large = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not large.exists() or "[never]" in large.read_text():
        pytest.skip("this kernel gives no large pages")
    assert int(said(HOLDING, place)) > 32 << 10, "KiB; in small ones a network is slower"


def test_a_cluster_that_cannot_be_joined_is_an_error_and_starts_none(place: Path) -> None:
    asked = ["ray://head:10001", "127.0.0.1:1", "auto", "nonsense"]
    client, dead, none, nonsense = json.loads(said(REFUSED, place, json.dumps(asked)))
    assert "ray job submit" in client
    assert "127.0.0.1:1 (RAY_ADDRESS)" in dead
    assert "RAY_ADDRESS=auto: no Ray cluster runs on this machine" in none
    assert "nonsense" in nonsense
    assert not processes(place)


def test_what_ray_tells_of_a_lost_worker_is_not_among_the_results(place: Path) -> None:
    out, err = json.loads(said(LOSING, place))
    assert (out, "worker died" in err) == ("", True)


def running(pid: int) -> bool:
    """Whether it is there and not just waiting for its new parent to notice that it has ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_its_workers_leave_behind_ends_with_it(place: Path) -> None:
    left = int(said(LEFT_BEHIND, place))
    deadline = time.monotonic() + 30
    while is_left := running(left):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert not is_left
