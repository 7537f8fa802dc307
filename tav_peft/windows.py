"""Long clips in windows of frames: the UNet sees a few at a time, and what it says of each frame is averaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tav_peft.conditions import Conditions
from tav_peft.errors import TavError
from tav_peft.shapes import Latents

OVERLAP = 4
_GOLDEN = (5**0.5 - 1) / 2  # whose multiples are spread evenly over [0, 1) whatever the step between them


class Window(NamedTuple):
    """Frames that the UNet sees together, and how much its word counts for each of them."""

    frames: list[int]
    weights: list[float]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of `size` frames: the clip's first, which ST-Attn attends to from everywhere, and a run of others.

    Neighbouring runs share `overlap` frames, over which the weight goes from one to the other (Bar-Tal et al. 2023,
    eq. 5; Qiu et al. 2024, section 3.3). A run's first frame, whose former one the UNet does not see, has the least.
    Where runs begin changes with the timestep, so that no frame is a border in every step.

    Raises:
        TavError: when windows do not leave room for the anchor, a frame of their own, and the overlap.

    """

    size: int
    overlap: int = OVERLAP

    def __post_init__(self) -> None:
        if self.overlap < 1 or self.size < self.overlap + 2:
            raise TavError(
                f"Windows of {self.size} frames that share {self.overlap}: give an overlap of at least 1, and windows of "
                "at least 2 frames more than it, of which one is the clip's first."
            )

    def of(self, frames: int, shift: int = 0) -> list[Window]:
        """List the windows of a clip; a clip that fits into one has one, where every frame counts in full.

        All runs but the first and the last begin `shift` frames later.
        """
        if frames <= self.size:
            return [Window(list(range(frames)), [1.0] * frames)]
        run = self.size - 1
        last = frames - run
        starts = [1, *range(1 + (shift % self._stride or self._stride), last, self._stride), last]
        windows = []
        for number, start in enumerate(starts):
            end = start + run
            shared_before = starts[number - 1] + run - start if number else 0
            shared_after = end - starts[number + 1] if start != last else 0
            weights = [_ramp(i + 1, shared_before) * _ramp(run - i, shared_after) for i in range(run)]
            windows.append(Window([0, *range(start, end)], [0.0 if number else 1.0, *weights]))
        return windows

    def predict(
        self,
        predict: Callable[..., Latents],
        latents: Latents,
        timestep: Tensor | int,
        conditions: Conditions,
        **residuals: Any,
    ) -> Latents:
        """Predict a window at a time by `predict`, and average; `residuals` are for all frames, folded."""
        frames = latents.shape[2]
        windows = self.of(frames, self.shift(int(timestep)))
        if len(windows) == 1:
            return predict(latents, timestep, conditions, **residuals)
        total = torch.zeros_like(latents, dtype=torch.float32)
        counted = torch.zeros(frames, device=latents.device)
        for seen, weights in windows:
            index = torch.tensor(seen, device=latents.device)
            weight = torch.tensor(weights, device=latents.device)
            part = {name: _of_frames(each, index, frames) for name, each in residuals.items()}
            output = predict(latents[:, :, index], timestep, conditions, **part)
            total.index_add_(2, index, output.float() * weight[:, None, None])
            counted.index_add_(0, index, weight)
        return (total / counted[:, None, None]).to(latents.dtype)

    @property
    def _stride(self) -> int:
        return self.size - 1 - self.overlap

    def shift(self, timestep: int) -> int:
        """Give the shift of a timestep: one that neighbouring timesteps do not share, and an inversion and an edit do."""
        return int(timestep * _GOLDEN % 1 * self._stride)


def drawn_window(frames: int, size: int, generator: torch.Generator) -> list[int]:
    """Draw a window to tune on: the clip's first frame and `size` - 1 others in a row; every run is as likely."""
    start = int(torch.randint(1, frames - size + 2, (1,), generator=generator))
    return [0, *range(start, start + size - 1)]


def _ramp(place: int, shared: int) -> float:
    """Give the weight of the n-th frame from a border, behind which `shared` frames belong to a neighbour too."""
    return min(1.0, place / (shared + 1))


def _of_frames(residual: Any, index: Tensor, frames: int) -> Any:
    """Take some frames of tensors (batch·frames, …), alone or in a list."""
    if isinstance(residual, Tensor):
        return residual.unflatten(0, (-1, frames))[:, index].flatten(0, 1)
    return [_of_frames(each, index, frames) for each in residual]
