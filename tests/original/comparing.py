"""A number of ours beside its record."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .recordings import Recording
from .tolerances import RULES


@dataclass(frozen=True)
class Comparison:
    """How far our number is from its record.

    `largest` is the largest absolute difference; the others are in the unit of the kind's rule (see tolerances.py).
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    largest: float
    distance: float
    floor: float | None
    tolerance: float


def compare(
    recording: Recording, kind: str, name: str, ours: Tensor, theirs: Tensor, *, floor: float | None = None
) -> Comparison:
    """Compare a tensor with its record; a `floor` measured for this very tensor goes before the rule's."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    rule = RULES[kind]
    distance = largest = (ours.double() - theirs.double()).abs().max().item()
    if largest > 0 and rule.unit == "σ":
        spread = theirs.double().std().item()
        distance = largest / spread if spread > 0 else math.inf
    floor = rule.noise_floor(recording.noise_floor) if floor is None else floor
    return Comparison(kind, name, tuple(theirs.shape), largest, distance, floor, rule.tolerance(floor))


def assert_within(comparisons: Iterable[Comparison]) -> None:
    """Fail with every comparison that is beyond its tolerance, or when there is none at all."""
    every = list(comparisons)
    assert every, "nothing was compared"
    beyond = [
        f"{one.kind} {one.name}: {one.distance:.2e}, allowed {one.tolerance:.2e}"
        for one in every
        if not one.distance <= one.tolerance
    ]
    assert not beyond, "\n".join(beyond)
