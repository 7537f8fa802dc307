"""Sixteen clips of objects on backgrounds that pocket never saw together, four of them with an occlusion."""

from __future__ import annotations

import dataclasses
import random

from tav_peft.pocket.clips import MOTIONS, PocketClip, moving
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, STYLES, Actor
from tav_peft.suite.cases import Case

GROUP = "pocket"
_SEED = 20_000_000  # far from the seeds of all trainings
_ALONE = (
    ("rabbit", "grass"), ("fox", "grass"), ("fox", "moon"), ("penguin", "moon"), ("pig", "snow"), ("pig", "moon"),
    ("duck", "grass"), ("frog", "water"), ("car", "water"), ("bus", "forest"), ("man", "snow"), ("man", "desert"),
)  # fmt: skip
_BEHIND = (  # the first passes behind the second
    ("fox", "moon", "robot"), ("penguin", "moon", "watermelon"), ("frog", "water", "car"), ("man", "snow", "tractor"),
)  # fmt: skip
QUICK = ("fox-grass", "pig-snow", "car-water", "frog-water-behind-car")


def pocket_cases() -> list[Case]:
    """List the sixteen, each with its four edits; the last four have a second object in the way."""
    motions = list(MOTIONS)
    alone = [_case(number, *pair, motions[number % len(motions)]) for number, pair in enumerate(_ALONE)]
    return alone + [
        _case(number, name, background, ("left", "right")[number % 2], other)
        for number, (name, background, other) in enumerate(_BEHIND, start=len(_ALONE))
    ]


def _case(number: int, name: str, background: str, motion: str, other: str | None = None) -> Case:
    rng = random.Random(_SEED + number)
    clip = moving(name, background, motion, size=26 + rng.random() * 6, detail=_SEED + number)
    if other is not None:
        clip = _behind(clip, other)
    taken = [actor.name for actor in clip.scene.actors]
    new = rng.choice([each for each in OBJECTS if each not in taken])
    elsewhere = rng.choice([each for each in BACKGROUNDS if each != background])
    style = rng.choice([each for each in STYLES if each != "plain"])
    ideals = {
        "style": clip.edited(style=style),
        "object": clip.edited(name=new),
        "background": clip.edited(background=elsewhere),
        "multiple": clip.edited(name=new, background=elsewhere),
    }
    prompts = {kind: ideal.caption for kind, ideal in ideals.items()}
    return Case(GROUP, clip.name, clip.caption, prompts, truth=clip)


def _behind(clip: PocketClip, other: str) -> PocketClip:
    """Put a second object, drawn after the first and so before it, into the middle of its path."""
    first = clip.scene.actors[0]
    middle = Actor(other, 32, first.y + 3, 0.9 * first.size)
    scene = dataclasses.replace(clip.scene, actors=(first, middle))
    return dataclasses.replace(clip, name=f"{clip.name}-behind-{other}", scene=scene)
