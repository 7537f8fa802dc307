"""Whether a tuning repeats on this machine: its first steps, taken twice from the same start and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tav_peft.optimizing import TuningStep
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip


@dataclasses.dataclass(frozen=True)
class Repetition:
    """What came of taking some steps twice: the losses of both, and the tensors that differ, each by how much at most."""

    steps: int
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    tensors: int
    differing: dict[str, float]

    @property
    def repeats(self) -> bool:
        """Tell whether every loss and every bit of every tensor is the same."""
        return self.losses[0] == self.losses[1] and not self.differing

    def __str__(self) -> str:
        if self.repeats:
            return f"{self.steps} steps taken twice gave the same losses, and {self.tensors} tensors of the same bytes."
        pairs = zip(*self.losses, strict=True)
        first = next((n for n, (one, other) in enumerate(pairs, start=1) if one != other), None)
        losses = "the losses are the same" if first is None else f"the losses differ from step {first} on"
        worst = max(self.differing, key=lambda name: self.differing[name], default="")
        most = f", {worst} by {self.differing[worst]:.1e}" if worst else ""
        return (
            f"{self.steps} steps taken twice differ: {losses}, and {len(self.differing)} of {self.tensors} "
            f"tensors{most}. Some operations of this device add up in another order each time; the CPU repeats "
            "(--device cpu)."
        )


def repeat(
    pipe: TuneAVideoPipeline,
    clip: Clip,
    prompt: str,
    recipe: Recipe,
    steps: int,
    also: Sequence[tuple[Clip, str]] = (),
) -> Repetition:
    """Take the first `steps` of a tuning twice, as `tune` does, and compare; nothing is written.

    The adapters are compared in float32, whatever the recipe saves them in.

    Raises:
        TuningError: when the tuning itself cannot start or go on.

    """
    short = recipe.override([f"training.steps={steps}", "adapter.dtype=fp32"])
    losses: list[tuple[float, ...]] = []
    tensors: list[Mapping[str, Tensor]] = []
    for _ in range(2):
        told: list[TuningStep] = []
        tensors.append(tune(pipe, clip, prompt, short, also=also, progress=told.append).tensors)
        losses.append(tuple(step.loss for step in told))
    one, other = tensors
    differing = {name: _apart(one[name], other[name]) for name in one if not _same(one[name], other[name])}
    return Repetition(steps, (losses[0], losses[1]), len(one), differing)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))  # bits: 0 and -0 are not the same


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
