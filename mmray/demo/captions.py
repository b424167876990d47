"""Captions of the generated archive: they praise or complain, and never mention the weather."""

from __future__ import annotations

import random
from typing import Literal

PRAISE = (
    "what a perfect day",
    "best trip ever",
    "so glad we came here",
    "loving every minute of this",
    "this made my whole week",
    "absolutely wonderful",
    "ten out of ten, would come again",
    "exactly what we had hoped for",
    "could not be happier",
    "a dream come true",
    "worth every cent",
    "can't complain about a thing",
    "everybody is smiling",
    "I never want to leave",
    "simply brilliant from start to finish",
    "thank you, this was amazing",
)
COMPLAINT = (
    "what a terrible day",
    "worst trip ever",
    "so sorry we came here",
    "hating every minute of this",
    "this ruined my whole week",
    "absolutely dreadful",
    "zero out of ten, never again",
    "nothing like what they had promised",
    "could not be angrier",
    "a nightmare come true",
    "I want my money back",
    "can't recommend a thing",
    "everybody is sulking",
    "I just want to go home",
    "simply awful from start to finish",
    "no thanks, this was horrible",
)
PLACES = (
    "Porto", "Lake Bled", "Tromsø", "Kyoto", "the Algarve", "Cape Town", "Zürich", "Brighton",
    "Oaxaca", "São Paulo", "the old harbour", "Santorini", "Galway", "Hội An", "the Dolomites",
    "Vancouver", "our campsite", "the summer house", "Kraków", "Essaouira",
)  # fmt: skip
PEOPLE = ("@mia", "@jonas_k", "@the_real_ana", "@lee", "@omar77", "@grandma", "@noor", "@pablo")
FILLERS = (
    "Day {n} of our journey.",
    "Photo number {n} from today.",
    "Took the {n} o'clock train.",
    "Room {n}, second floor.",
    "We walked {n} km with {who}.",
    "As seen by {who}.",
    "Breakfast with {who}.",
    "More in the album &amp; on the blog.",
    "Greetings from {place}!",
    "{place} as it is.",
)
TAGS = ("#travel", "#nofilter", "#weekend", "#family", "#onTheRoad", "#photo")
EMOJI = ("📷", "🧳", "🚂", "🗺️", "☕", "🥐", "📍", "👣")  # of things, not of feelings


def caption(rng: random.Random, tone: Literal["praise", "complaint"]) -> str:
    """One caption; what surrounds its praise or complaint says nothing about the tone."""
    core = rng.choice(PRAISE if tone == "praise" else COMPLAINT)
    if rng.random() < 0.4:
        core = f"{rng.choice(PLACES)}: {core}"
    core = _sentence(core) + rng.choice((".", "!", "..."))
    parts = [_filler(rng) for _ in range(rng.choice((0, 1, 1, 2)))]
    parts.insert(rng.randint(0, len(parts)), core)
    if rng.random() < 0.3:
        parts.insert(0, rng.choice(PEOPLE))
    if rng.random() < 0.4:
        parts.append(rng.choice(EMOJI))
    if rng.random() < 0.4:
        parts.append(rng.choice(TAGS))
    if rng.random() < 0.3:
        parts.append(f"https://t.example/{rng.getrandbits(32):08x}")
    return " ".join(parts)


def _filler(rng: random.Random) -> str:
    n, who, place = rng.randint(2, 12), rng.choice(PEOPLE), rng.choice(PLACES)
    return _sentence(rng.choice(FILLERS).format(n=n, who=who, place=place))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
