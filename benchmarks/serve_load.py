"""A server under load: `mmray serve` beside the bare Predictor, FastAPI, LitServe and Ray Serve.

    python benchmarks/serve_load.py [--encoders resnet18,mobilenet_v3_small] [--images small,large]
        [--rounds 9] [--turn 8] [--seconds 15] [--overload 60] [--changes 20]
        [--arms predictor,mmray,fastapi,litserve,rayserve] [--replicas N] [--json]

Requests are multipart, over loopback, from a second process on the same cores, which costs every
server the same, and the Predictor nothing. At saturation 64 callers, as many as mmray's Ingress
takes, each wait for their answer (rates are of the line through their number, see
``_load.slope``). All arms are up at once and take turns at that, ``--turn`` seconds each, while the
others are stopped, ``--rounds`` times, every other time backwards; ratios are the median over the
rounds, without those in which the other one answered nothing. Then the others end.

The other loads, of mmray alone, are open: requests come when they come, at 25, 50, 75 and 90 % of
that rate, then at three times of it for ``--overload`` seconds, with the server's memory looked at
every second, then at a quarter again: ``recovery_s`` is when that quarter was first answered in
full. Goodput in that overload is over what the server answered at saturation right before and
answers right after: the machine's own speed changes by a tenth within minutes. Light load is five
requests a second, so that they come one at a time, as those of the bare Predictor do right before;
a tenth of what batches make possible may be half of what single pairs do. ``added_p50_ms`` is
what a request takes less its own decoding and its own time in the model, as the server tells them;
``over_alone_p50_ms`` is the difference of the medians of the two, in which what these are slower by
in a server than by themselves counts, too.

Last, under half of the load, replicas are killed and bundles change, see ``_changes.py``:
``--changes`` is for how many seconds each is watched; 0: none of it.

``small`` pictures are JPEGs of about 50 KB, ``large`` ones of about 1 MB. Where several cases are
run, the JSON keys have the worst of them. LitServe: `pip install litserve`; without, that arm is
left out. mmray has a scoring replica a core, or ``--replicas`` of them; LitServe a worker a core.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from _changes import CHANGES, changes
from _contest import Contestant, contestant
from _corpus import caption, pictures, write_bundle
from _load import apart as load
from _load import write_bodies

ARMS = ("predictor", "mmray", "fastapi", "litserve", "rayserve")
ENCODERS = ("resnet18", "mobilenet_v3_small")
IMAGES = {"small": (512, 86, 32), "large": (2200, 91, 8)}  # px, JPEG quality, how many
LOADS = (0.25, 0.5, 0.75, 0.9)
LIGHT = 5.0  # requests a second
RECOVERY_S = 10.0
ANSWERED = 0.8  # of what is asked in a second: all, but for chance
CORES = os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoders", default=",".join(ENCODERS), help="by comma")
    parser.add_argument("--images", default=",".join(IMAGES), help="small, large")
    parser.add_argument("--arms", default=",".join(ARMS), help="which, by comma")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load (default 15)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every arm at saturation")
    parser.add_argument("--turn", type=float, default=8.0, help="seconds of each (default 8)")
    parser.add_argument("--overload", type=float, default=60.0, help="seconds; 0: none")
    parser.add_argument("--changes", type=float, default=20.0, help="seconds of each; 0: none")
    parser.add_argument("--replicas", type=int, default=CORES, help="of mmray that score")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    # Told to end, it ends those that it has started and stopped, as at Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    arms = [a for a in args.arms.split(",") if a != "litserve" or _there("litserve")]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.images.split(","):
            side, quality, count = IMAGES[kind]
            pairs = [(p, caption(i)) for i, p in enumerate(pictures(side, quality, count))]
            bodies = write_bodies(Path(folder, kind), pairs)
            for encoder in args.encoders.split(","):
                bundle = write_bundle(Path(folder, encoder), encoder)
                other = write_bundle(Path(folder, f"{encoder}-other"), encoder, seed=1)
                case = {"encoder": encoder, "images": kind, "kb": len(pairs[0][0]) // 1000}
                case |= run(arms, bundle, other, bodies, args)
                cases.append(case)
                told = sys.stderr if args.json else sys.stdout
                print(text(case), file=told, flush=True)  # now: the other cases take their time
    result = summary(cases)
    names = [name for name in result if name not in ("benchmark", "cores", "cases")]
    print(json.dumps(result) if args.json else "\n".join(f"{n}: {result[n]}" for n in names))


def _there(module: str) -> bool:
    found = importlib.util.find_spec(module) is not None
    if not found:
        _say(f"{module} is not installed: its arm is left out")
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- a case --------------------------------------------------------------------------------------


def run(
    arms: list[str], bundle: Path, other: Path, bodies: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Turns of all arms at saturation; then mmray, by itself, under all other loads."""
    found: dict[str, Any] = {arm: {"rates": []} for arm in arms}
    with ExitStack() as ours, ExitStack() as others:
        there = {
            arm: (ours if arm == "mmray" else others).enter_context(
                contestant(arm, bundle, bodies, args.replicas)
            )
            for arm in arms
        }
        for number in range(args.rounds):
            for arm in arms if number % 2 == 0 else arms[::-1]:
                with there[arm].on():
                    turn = there[arm].full(bodies, args.turn)
                found[arm]["rates"].append(turn.pop("goodput"))
                found[arm] |= turn
                _say(f"{bundle.name}, {bodies.name}: {arm} {found[arm]['rates'][-1]:.1f}/s")
        if "predictor" in arms:
            with there["predictor"].on():
                found["predictor"] |= there["predictor"].answer("alone")
        others.close()
        if "mmray" in arms:
            with there["mmray"].on():
                found["mmray"] |= by_itself(there["mmray"], bundle, other, bodies, args)
    for arm in arms:
        found[arm]["rate"] = statistics.median(found[arm]["rates"])
    return found


def by_itself(
    mmray: Contestant, bundle: Path, other: Path, bodies: Path, args: argparse.Namespace
) -> dict[str, Any]:
    asked, process = mmray.asked(bodies), mmray.process
    before = mmray.full(bodies, args.seconds)["goodput"]
    found = under_loads(asked, before, args, process)
    if args.overload:
        found["rates_around"] = [before, mmray.full(bodies, args.seconds)["goodput"]]
    if args.changes:
        found |= changes(asked, before, args.changes, process, bundle, other)
    return found


def under_loads(
    asked: dict[str, Any], most: float, args: argparse.Namespace, process: psutil.Process
) -> dict[str, Any]:
    light = load({**asked, "rate": LIGHT, "seconds": args.seconds})
    loads = {
        f"{share:.0%}": load({**asked, "rate": share * most, "seconds": args.seconds})
        for share in LOADS
    }
    found: dict[str, Any] = {"light": light, "loads": loads}
    if args.overload:
        before, sizes = _memory(process), []
        with ThreadPoolExecutor(1) as pool:
            plan = {**asked, "rate": 3 * most, "seconds": args.overload}
            loaded = pool.submit(load, plan)
            while not loaded.done():
                sizes.append(_memory(process))
                time.sleep(1)
        found["overload"] = loaded.result()
        found["memory_mib"] = [before, max(sizes), _memory(process)]
        found["recovery"] = load({**asked, "rate": 0.25 * most, "seconds": RECOVERY_S})
        by_second = enumerate(found["recovery"]["by_second"], 1)
        found["recovery_s"] = next((s for s, n in by_second if n >= ANSWERED * 0.25 * most), None)
    return found


def _memory(process: psutil.Process) -> int:
    """MiB that the server's processes hold, of what is theirs alone."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().uss
        except psutil.Error:  # it ended
            continue
    return total >> 20


# --- what comes out ------------------------------------------------------------------------------


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    def worst(values: list[float | None], pick: Any) -> float | None:
        known = [value for value in values if value is not None]
        return round(pick(known), 3) if known else None

    def over(arm: str) -> list[float | None]:
        return [ratio(c, arm) if arm in c and "mmray" in c else None for c in cases]

    def ratio(case: dict[str, Any], arm: str) -> float | None:
        """Of the turns in which the other one answered at all."""
        turns = zip(case["mmray"]["rates"], case[arm]["rates"], strict=True)
        each = [ours / theirs for ours, theirs in turns if theirs]
        return statistics.median(each) if each else None

    def added(case: dict[str, Any]) -> float | None:
        found = case.get("mmray")
        return None if found is None else float(found["light"]["added_ms"]["p50"])

    def over_alone(case: dict[str, Any]) -> float | None:
        if "mmray" not in case or "predictor" not in case:
            return None
        return float(case["mmray"]["light"]["ms"]["p50"] - case["predictor"]["alone_ms"])

    def recovered(case: dict[str, Any]) -> float | None:
        """Seconds; longer than was looked where it did not."""
        found = case.get("mmray", {})
        return found["recovery_s"] or 2 * RECOVERY_S if "recovery" in found else None

    def counted(name: str) -> int | None:
        """Over all changes."""
        rows = [row for case in cases for row in case.get("mmray", {}).values()
                if isinstance(row, dict) and name in row]  # fmt: skip
        return sum(row[name] for row in rows) if rows else None

    def kept(case: dict[str, Any]) -> float | None:
        found = case.get("mmray", {}).get("overload")
        if found is None:
            return None
        return float(found["goodput"] / statistics.mean(case["mmray"]["rates_around"]))

    return {
        "benchmark": "serve_load",
        "cores": CORES,
        "saturation_over_predictor": worst(over("predictor"), min),
        "saturation_over_fastapi": worst(over("fastapi"), min),
        "saturation_over_litserve": worst(over("litserve"), min),
        "saturation_over_rayserve": worst(over("rayserve"), min),
        "overload_goodput": worst([kept(case) for case in cases], min),
        "recovery_s": worst([recovered(case) for case in cases], max),
        "client_lost": counted("client_lost"),
        "client_wrong": counted("client_wrong"),
        "added_p50_ms": worst([added(case) for case in cases], max),
        "over_alone_p50_ms": worst([over_alone(case) for case in cases], max),
        "cases": cases,
    }


def text(case: dict[str, Any]) -> str:
    lines = [f"\n{case['encoder']}, pictures of {case['kb']} KB"]
    for arm in (arm for arm in ARMS if arm in case):
        each = ", ".join(f"{rate:.1f}" for rate in case[arm]["rates"])
        lines.append(f"  {arm:10}{case[arm]['rate']:8.1f} rows/s ({each})")
    if "predictor" in case:
        whole, decode = (case["predictor"][f"{name}_ms"] for name in ("alone", "decode"))
        lines.append(f"  one pair alone in a Predictor: {whole:.1f} ms, decoding {decode:.1f}")
    if "mmray" in case:
        lines += _loads(case["mmray"])
    return "\n".join([*lines, ""])


def _loads(found: dict[str, Any]) -> list[str]:
    named = {f"{LIGHT:g}/s": found["light"], **found["loads"]}
    more = ("overload", "recovery", *CHANGES)
    named |= {k: found[k] for k in more if k in found}
    lines = [f"  {'load':15}{'sent':>7}{'per s':>8}{'p50':>8}{'p95':>8}{'p99 ms':>8}  statuses"]
    for name, row in named.items():
        ms = [row["ms"].get(p, float("nan")) for p in ("p50", "p95", "p99")]
        ends = "".join(f"{value:8.1f}" for value in ms)
        lines.append(f"  {name:15}{row['sent']:7}{row['goodput']:8.1f}{ends}  {row['statuses']}")
    lines.append(f"  at {LIGHT:g}/s beside decoding and the model: {found['light']['added_ms']} ms")
    if "overload" in found:
        refused, (before, most, after) = found["overload"]["refused_ms"], found["memory_mib"]
        lines.append(f"  refused under overload after {refused} ms")
        lines.append(f"  MiB before {before}, at most {most}, after {after}")
        lines.append(f"  in full again after {found['recovery_s']} s")
        first, again = found["rates_around"]
        lines.append(f"  at saturation {first:.1f}/s before all that, {again:.1f}/s after")
    for name in CHANGES:
        if name in found:
            asked, lost, wrong = (found[name][f"client_{k}"] for k in ("asked", "lost", "wrong"))
            lines.append(f"  {name}: by the client {asked} asked, {lost} lost, {wrong} wrong")
    return lines


if __name__ == "__main__":
    main()
