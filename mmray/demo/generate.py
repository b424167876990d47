"""A generated archive whose labels need both the picture and the text.

Each pair is a holiday snapshot, sunny or stormy, with a caption that praises or complains and never
mentions the weather. Where they agree the post is meant (``happy``, ``unhappy``); where they do not
it is ``sarcastic``. All four combinations are equally frequent within each split, so whoever sees
only the picture, or only the caption, is right exactly half of the time whatever they answer.
"""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from mmray.demo.captions import caption
from mmray.demo.scenes import SIZE, snapshot
from mmray.splits import normal_caption

Weather = Literal["sunny", "stormy"]
Tone = Literal["praise", "complaint"]
LABELS = ("happy", "sarcastic", "unhappy")
QUADRANTS: tuple[tuple[Weather, Tone], ...] = (
    ("sunny", "praise"),
    ("sunny", "complaint"),
    ("stormy", "praise"),
    ("stormy", "complaint"),
)
TABLE = "pairs.csv"  # in the source folder, beside images/
DEV_SHARE = 5  # every fifth quartet of pairs is held out
BAD_IMAGES = ("truncated", "zero-byte", "not an image", "broken header")
BAD_MEMBERS = ("no caption", "no image", "two images", "not UTF-8", "blank caption")


@dataclass(frozen=True, slots=True)
class Pair:
    """One generated pair: ``image`` is JPEG bytes, 112 x 112 RGB."""

    key: str
    image: bytes
    caption: str
    label: str
    split: str  # train or dev
    weather: Weather
    tone: Tone


def label_of(weather: Weather, tone: Tone) -> str:
    if (weather == "sunny") != (tone == "praise"):
        return "sarcastic"
    return "happy" if weather == "sunny" else "unhappy"


def pairs(count: int, seed: int = 0) -> Iterator[Pair]:
    """``count`` pairs (a multiple of 20, so that all four combinations come out equal in both
    splits), in shuffled order; the same seed gives the same bytes. No caption comes twice, not
    even one that differs only in its URL or mentions."""
    if count <= 0 or count % (4 * DEV_SHARE):
        raise ValueError(f"count: got {count}; must be a positive multiple of {4 * DEV_SHARE}")
    rng = random.Random(seed)
    order = list(range(count))
    rng.shuffle(order)
    said: set[str] = set()
    for number, slot in enumerate(order):
        weather, tone = QUADRANTS[slot % 4]
        text = caption(rng, tone)
        while normal_caption(text) in said:
            text = caption(rng, tone)
        said.add(normal_caption(text))
        yield Pair(
            key=f"{number:06d}",
            image=snapshot(rng, weather),
            caption=text,
            label=label_of(weather, tone),
            split="dev" if slot // 4 % DEV_SHARE == 0 else "train",
            weather=weather,
            tone=tone,
        )


def write_source(
    folder: Path,
    count: int,
    broken: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """``folder/images/*.jpg`` and ``folder/pairs.csv`` (image, caption, label, split), as
    ``mmray pack`` takes them. The first ``broken`` pictures of the training split are damaged.
    ``progress`` gets the number of pairs so far, now and then."""
    (folder / "images").mkdir(parents=True)
    damaged = 0
    with open(folder / TABLE, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "caption", "label", "split"])
        for number, pair in enumerate(pairs(count, seed)):
            if progress is not None and number and number % 1000 == 0:
                progress(number)
            image = pair.image
            if pair.split == "train" and damaged < broken:
                image = damage(image, BAD_IMAGES[damaged % len(BAD_IMAGES)])
                damaged += 1
            name = f"images/{pair.key}.jpg"
            (folder / name).write_bytes(image)
            writer.writerow([name, pair.caption, pair.label, pair.split])


def damage(image: bytes, how: str) -> bytes:
    """Image bytes as they come out of real crawls, broken in one of the ``BAD_IMAGES`` ways."""
    if how == "truncated":
        return image[: len(image) // 3]
    if how == "zero-byte":
        return b""
    if how == "not an image":
        return b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"
    return b"\x00" * 64 + image[64:]


def write_odd_tar(path: Path, count: int, seed: int = 0) -> int:
    """A tar of ``count`` pairs of which every second is broken in a way that a table of image
    paths and captions cannot express (``BAD_MEMBERS``). Returns how many are."""
    broken = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, pair in enumerate(pairs(count, seed + 1)):
            how = ""
            if number % 2:
                how = BAD_MEMBERS[broken % len(BAD_MEMBERS)]
                broken += 1
            for extension, data in members(pair, how):
                info = tarfile.TarInfo(f"odd-{pair.key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return broken


def members(pair: Pair, how: str = "") -> list[tuple[str, bytes]]:
    """(extension, bytes) of a pair's tar members, broken as ``how`` (of ``BAD_MEMBERS``) says. It
    is of no split: scored, and neither trained on nor held out."""
    fields = {"label": pair.label}
    text = pair.caption.encode()
    found = [("jpg", pair.image), ("txt", text), ("json", json.dumps(fields).encode())]
    if how == "no caption":
        del found[1]
    elif how == "no image":
        del found[0]
    elif how == "two images":
        found.insert(1, ("jpeg", pair.image))
    elif how == "not UTF-8":
        found[1] = ("txt", b"caf\xe9 " + text)
    elif how == "blank caption":
        found[1] = ("txt", b" \n")
    return found


__all__ = ["BAD_IMAGES", "BAD_MEMBERS", "LABELS", "SIZE", "Pair", "pairs", "write_source"]


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--pairs", "count", type=click.IntRange(20), default=400, help="A multiple of 20.")
@click.option("--broken", type=click.IntRange(0), default=0, help="Damaged pictures among them.")
@click.option("--seed", default=0)
def main(folder: Path, count: int, broken: int, seed: int) -> None:
    """Write generated pairs into FOLDER: images/ and the table pairs.csv."""
    if count % 20:
        raise click.BadParameter(f"{count} is no multiple of 20", param_hint="--pairs")
    if (folder / TABLE).exists():
        raise click.UsageError(f"{folder / TABLE} is there already; choose another folder")
    write_source(folder, count, broken, seed)
    click.echo(f"{count:,} pairs, {broken:,} of them broken: {folder}")


if __name__ == "__main__":
    main()
