"""``mmray demo``: the whole of mmray on generated pairs, in a few minutes on two cores.

An S3 endpoint on loopback; a generated archive packed into it; three trainings on one Ray; the
archive scored from S3 to S3, killed half-way, continued and verified.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmray import ledger, storage
from mmray.archive.pack import pack
from mmray.config import (
    Data,
    ImagePreprocess,
    Modalities,
    Model,
    Preprocess,
    TextModel,
    TextPreprocess,
    Train,
    TrainConfig,
    WorkerRange,
)
from mmray.demo import generate
from mmray.demo.child import Child
from mmray.demo.endpoint import environment, s3_endpoint
from mmray.errors import ConfigError
from mmray.report.progress import Console, duration
from mmray.verify import verify

BUCKET = "mmray-demo"
MARKER = ".mmray-demo"  # says that a folder is ours to start over in
MODELS: dict[str, Modalities] = {"fusion": "both", "image": "image", "text": "text"}
TITLES = {"fusion": "picture + text", "image": "picture only", "text": "text only"}
AHEAD = 0.1  # accuracy by which fusion must beat each single model
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Size:
    """How large a demo; ``pairs`` and ``odd`` are multiples of 20."""

    pairs: int = 3000
    broken: int = 24  # damaged pictures among them
    odd: int = 40  # pairs in a tar of their own, every second one broken
    shard_rows: int = 100
    epochs: int = 3
    workers: int = min(2, os.cpu_count() or 1)


class Story:
    """What the demo tells while it runs: every line with the time since its start."""

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, time.monotonic()

    def say(self, line: str) -> None:
        elapsed = duration(time.monotonic() - self._started)
        self._console.say(f"[{elapsed:>5}]  {line}")

    def step(self, title: str) -> None:
        self._console.say("")
        self.say(title)

    def within(self, name: str) -> Callable[[str], None]:
        """For the progress of something that speaks for itself."""
        return lambda line: self.say(f"  {name}: {line}")


def demo(out: Path, console: Console, size: Size = Size()) -> int:
    """Run the demo; what it made lies in ``out`` afterwards. Returns the exit code: 0 when fusion
    is ahead of both single models and the scores are proved complete, else 1.

    Raises ConfigError when ``out`` holds something else, or moto is not installed, and the errors
    of the jobs it runs. Whatever happens, nothing it started is left running.
    """
    story = Story(console)
    start_over(out, story)
    # A cluster that happens to run here has neither the endpoint nor its credentials.
    with ends_on_sigterm(), environment({"RAY_ADDRESS": "local"}), s3_endpoint(BUCKET) as url:
        root = f"s3://{BUCKET}"
        story.step(f"1/5  {size.pairs:,} generated pairs, packed to {root} at {url}")
        broken = make_archive(out / "source", f"{root}/archive", size, story)
        story.step("2/5  three models on the same pairs: picture + text, picture only, text only")
        metrics = train_models(root, size, story)
        ahead = tell_table(metrics, story)
        story.step("3/5  scoring from S3 to S3, to be killed half-way")
        command = ["score", f"{root}/models/fusion", f"{root}/archive", "--out", f"{root}/scored"]
        score_and_kill(command, root, story)
        story.step("4/5  the same command again")
        score_to_the_end(command, story)
        story.step("5/5  proving that no pair was lost")
        proved = tell_verdict(f"{root}/scored", broken, story)
        for name in ("archive", "models", "scored"):
            download(f"{root}/{name}", out / name)
    tell_where(out, story)
    return 0 if ahead and proved else 1


def start_over(out: Path, story: Story) -> None:
    """An empty ``out`` of our own: an older demo in it is removed, anything else is refused."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file()):
        raise ConfigError(f"{out}: holds something else; choose another --out for the demo")
    if out.exists():
        story.say(f"starting over: the earlier demo in {out} is removed")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that what was started is ended too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- archive -------------------------------------------------------------------------------------


def make_archive(source: Path, archive: str, size: Size, story: Story) -> int:
    """Generate, pack, add the tar of odd members; returns how many rows are broken on purpose."""
    generate.write_source(
        source,
        size.pairs,
        broken=size.broken,
        progress=lambda done: story.say(f"  {done:,} of {size.pairs:,} drawn"),
    )
    story.say(f"  drawn and written: {source}")
    story.say(f"  {pack(str(source), archive, shard_rows=size.shard_rows)}")
    with tempfile.TemporaryDirectory() as scratch:
        odd = Path(scratch, "odd.tar")
        broken = size.broken + generate.write_odd_tar(odd, size.odd)
        storage.write_file(f"{archive}/odd/odd.tar", odd)
    story.say(f"  broken on purpose: {broken} of {size.pairs + size.odd:,} pairs")
    story.say("  sunny + praise is happy, stormy + complaint is unhappy, a mismatch is sarcastic:")
    story.say("  who sees only the picture or only the text is right half of the time at best")
    return broken


# --- models --------------------------------------------------------------------------------------


def config(root: str, name: str, size: Size) -> TrainConfig:
    """Training of one of ``MODELS`` on the generated archive below ``root``."""
    return TrainConfig(
        data=Data(archive=f"{root}/archive"),
        out=f"{root}/models/{name}",
        preprocess=Preprocess(
            image=ImagePreprocess(size=48),
            text=TextPreprocess(lowercase=True, vocab_size=1000, max_tokens=48),
        ),
        model=Model(modalities=MODELS[name], text=TextModel(dim=64, layers=1), hidden=128),
        train=Train(
            epochs=size.epochs,
            lr=1.5e-3,
            num_workers=WorkerRange(min=size.workers, max=size.workers),
            use_gpu=False,
        ),
    )


def train_models(root: str, size: Size, story: Story) -> dict[str, Mapping[str, Any]]:
    """Train and evaluate all ``MODELS`` on one Ray; each one's metrics on the held-out pairs."""
    from mmray.engine import cluster
    from mmray.engine.evaluate import evaluate
    from mmray.engine.train import train

    metrics: dict[str, Mapping[str, Any]] = {}
    try:
        for name in MODELS:
            cfg, tell = config(root, name, size), story.within(name)
            train(cfg, progress=tell)
            metrics[name] = evaluate(
                cfg.out, cfg.data.archive, out=f"{root}/models/{name}-dev", progress=tell
            )
    finally:
        cluster.disconnect()
    return metrics


def tell_table(metrics: Mapping[str, Mapping[str, Any]], story: Story) -> bool:
    """Print the three models side by side; whether fusion is clearly ahead of both others."""
    fusion = metrics["fusion"]
    support = [of["support"] for of in fusion["per_class"].values()]
    story.say(f"  on {fusion['rows']:,} held-out pairs   accuracy   macro-F1")
    for name, title in TITLES.items():
        of = metrics[name]
        story.say(f"  {title:<22} {of['accuracy']:10.3f} {of['macro_f1']:10.3f}")
    story.say(f"  {'most frequent label':<22} {max(support) / fusion['rows']:10.3f}")
    best = max(metrics[name]["accuracy"] for name in MODELS if name != "fusion")
    lead: float = fusion["accuracy"] - best
    verdict = "ahead of" if lead >= AHEAD else "NOT clearly ahead of"
    story.say(f"  fusion is {verdict} the better single model: {lead:+.3f} accuracy")
    return lead >= AHEAD


# --- scores --------------------------------------------------------------------------------------


def score_and_kill(command: list[str], root: str, story: Story) -> None:
    """Start scoring, and end it with SIGKILL once half of the shards are committed."""
    total = sum(1 for _ in storage.list_objects(f"{root}/archive"))
    story.say(f"  $ mmray {' '.join(command)}")
    with Child(command, story.within("score")) as child:
        done = 0
        while child.running() and done < total // 2:
            time.sleep(POLL_S)
            done = len(ledger.done_shards(f"{root}/scored"))
        if not child.running():
            child.check()
            story.say("  it was done before it could be killed")
            return
        child.kill()
    story.say(f"  kill -9 with {done} of {total} shards committed")


def score_to_the_end(command: list[str], story: Story) -> None:
    story.say(f"  $ mmray {' '.join(command)}")
    with Child(command, story.within("score")) as child:
        child.check()


def tell_verdict(scored: str, broken: int, story: Story) -> bool:
    """Verify; whether the run holds and set aside exactly the pairs broken on purpose."""
    verdict = verify(scored)
    for finding in verdict.findings:
        story.say(f"  {finding}")
    story.say(
        f"  {verdict.rows:,} rows = {verdict.scored:,} scored + {verdict.set_aside:,} set aside, "
        f"in {verdict.shards} shards: {'every row once' if verdict.ok else 'FAILED'}"
    )
    summary = json.loads(storage.read_bytes(f"{scored}/{ledger.SUMMARY}"))
    for reason, count in Counter(summary["reasons"]).most_common():
        story.say(f"  set aside: {count:3}  {reason}")
    if verdict.set_aside != broken:
        story.say(f"  FAILED: {broken} pairs were broken on purpose")
    return verdict.ok and verdict.set_aside == broken


# --- the end -------------------------------------------------------------------------------------


def download(root: str, folder: Path) -> None:
    """Copy what the endpoint holds below ``root``: it is gone when the demo ends."""
    for item in storage.list_objects(root):
        data = storage.read_bytes(storage.join(root, item.path))
        storage.write_bytes(str(folder / item.path), data)


def tell_where(out: Path, story: Story) -> None:
    story.step(f"Everything lies in {out}, as it was in S3:")
    for name, what in {
        "source": "the pictures and pairs.csv, as generated",
        "archive": "the shards",
        "models": "three bundles, and beside each what evaluation counted on the held-out pairs",
        "scored/scores": "a Parquet file of scores for each shard",
        "scored/_run/report.html": "the scoring run, to look at",
    }.items():
        story.say(f"  {out / name}: {what}")
    again = f"mmray score {out / 'models/fusion'} {out / 'archive'} --out {out / 'again'}"
    story.say(f"  the same without S3: {again}")
