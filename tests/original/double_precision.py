"""The same in float64, where our own rounding is gone: then we must be as far from the record as the original is.

The noise floor says how far the original in float64 is from its float32 record. That distance is all rounding of the
record; if our mathematics is the same, our float64 result has the very same distance, to many digits. This sees
differences a thousand times smaller than a comparison with the record itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .comparing import compare
from .recordings import Recording
from .trajectories import sampling
from .unet import calls


@dataclass(frozen=True)
class Distances:
    """The largest distance from one record: the original's in float64, as recorded, and ours in float64."""

    name: str
    theirs: float
    ours: float

    @property
    def apart(self) -> float:
        """Their difference, as a share of theirs."""
        return abs(self.ours / self.theirs - 1)


def tolerance(recording: Recording) -> float:
    """How much of a distance may differ.

    SD 2.x's upcast attention computes its scores in float32 whatever the rest is in, the original and ours alike, and
    rounds differently there; elsewhere what is left are the scheduler's float32 noise levels.
    """
    return 0.25 if recording.facts["config_3d"].get("upcast_attention") else 1e-3


@torch.no_grad()
def distances(recording: Recording) -> Iterator[Distances]:
    """Every distance that the recording gives for float64, beside ours."""
    measured = recording.noise_floor
    for name, call in calls(recording, torch.float64).items():
        if f"forward {name}" in measured:
            ours = compare(recording, "forward", name, call(), recording.take("forward", name)).largest
            yield Distances(name, measured[f"forward {name}"]["max_abs"], ours)
    sampled = {row.name: row.largest for row in sampling(recording, torch.float64)}
    for step, theirs in enumerate(measured["sampling per step max_abs"]):
        name = f"latents_per_step[{step}]"
        yield Distances(name, theirs, sampled[name])
    if "video" in sampled:
        yield Distances("video", measured["video"]["max_abs"], sampled["video"])
