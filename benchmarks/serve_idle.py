"""What a server takes at rest, process by process: what Ray and Serve do whatever is asked of it.

    python benchmarks/serve_idle.py [--encoder mobilenet_v3_small] [--seconds 30] [--json]

CPU time and wake-ups of every thread, by the kernel's count, while no request comes, ``--seconds``
long, after ``SETTLING_S``. What wakes seldom finds its memory gone from the caches: a thing that
takes microseconds in a loop takes a millisecond then, and more so beside a model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from _contest import server
from _corpus import write_bundle
from serve_load import CORES

SETTLING_S = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", default="mobilenet_v3_small")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder, args.encoder), args.encoder)
        with server("mmray", bundle, CORES) as served:
            time.sleep(SETTLING_S)
            process = served.process
            there = [process, *process.children(recursive=True)]
            names = {each: name(each) for each in there}
            before = {each: spent(each) for each in there}
            time.sleep(args.seconds)
            took, woke = Counter[str](), Counter[str]()
            for each in there:
                (ms, wakes), (ms_before, wakes_before) = spent(each), before[each]
                took[names[each]] += (ms - ms_before) / args.seconds
                woke[names[each]] += (wakes - wakes_before) / args.seconds
    processes = {
        name: {"ms_a_second": round(ms, 1), "wakes_a_second": round(woke[name])}
        for name, ms in took.most_common()
    }
    total = round(took.total(), 1)
    if args.json:
        found = {"benchmark": "serve_idle", "cores": CORES, "ms_a_second": total}
        print(json.dumps(found | {"processes": processes}))
        return
    for name_, row in processes.items():
        print(f"{row['ms_a_second']:8.1f} ms/s {row['wakes_a_second']:6} wakes/s  {name_}")
    print(f"{total:8.1f} ms/s of {CORES * 1000}")


def name(process: psutil.Process) -> str:
    """``ray::ServeController``, ``raylet``, ``haproxy``, ``mmray serve`` ..."""
    line = [part.strip().partition("\n")[0] for part in process.cmdline()]
    if line[0].startswith("ray::"):
        return line[0].removesuffix(".listen_for_change")
    words = [Path(line[0]).name, *(Path(part).name for part in line[1:3])]
    return " ".join(words) if "python" in words[0] else words[0]


def spent(process: psutil.Process) -> tuple[float, int]:
    """CPU time in ms and wake-ups, of all threads that are there now."""
    ms, wakes = 0.0, 0
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        ms += int((thread / "schedstat").read_text().split()[0]) / 1e6
        status = (thread / "status").read_text()
        wakes += int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return ms, wakes


if __name__ == "__main__":
    main()
