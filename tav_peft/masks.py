"""Keeping what should not change: where a mask is 0, the source's latents stand at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tav_peft.errors import TavError
from tav_peft.inversion import Inversion
from tav_peft.shapes import LatentMask, Latents
from tav_peft.video.clip import Clip


def brightness(mask: Clip) -> Tensor:
    """Read a mask from pictures, (frames, height, width) in [0, 1]: white is edited, black is kept."""
    return mask.tensor()[0].mean(dim=0).add(1).div(2)


def to_latents(mask: Tensor, latents: Latents) -> LatentMask:
    """Bring a mask (frames, height, width) to the latents' size by area, (1, 1, frames, height, width).

    One frame is meant for all of them. A latent that is covered in part is blended in part.

    Raises:
        TavError: when it has another number of frames, or values outside of [0, 1].

    """
    frames, size = latents.shape[2], latents.shape[-2:]
    if mask.ndim != 3 or len(mask) not in (1, frames):
        raise TavError(f"A mask of shape {tuple(mask.shape)}: give (1 or {frames} frames, height, width).")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise TavError(
            "The mask has values outside of 0 to 1. Give 1 where the clip is edited, 0 where it is kept."
        )
    small = F.interpolate(mask[:, None].float(), size, mode="area")  # f 1 h w
    return small.transpose(0, 1)[None].expand(1, 1, frames, *size).to(latents.device, latents.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class KeptSource:
    """The source on its way to noise, to be put back outside of a mask (Avrahami et al. 2022; Qi et al. 2023).

    `mask` is (1, 1, frames, height, width), 1 where the clip is edited. `trajectory` has a row for clean, and one for
    each of `timesteps`, from the cleanest on.
    """

    mask: LatentMask
    trajectory: Tensor
    timesteps: Sequence[int]

    @classmethod
    def of(
        cls, mask: Clip | Tensor, inversion: Inversion, timesteps: Sequence[int], latents: Latents
    ) -> KeptSource:
        """Keep an inversion's source outside of a mask; `timesteps` are the inversion's, the cleanest first."""
        given = brightness(mask) if isinstance(mask, Clip) else mask
        trajectory = inversion.trajectory.to(latents.device, latents.dtype)
        return cls(to_latents(given, latents), trajectory, timesteps)

    def blend(self, latents: Latents, timestep: int | None, scale: float) -> Latents:
        """Put the source back in latents that stand at a timestep, or are clean (None), held at a scale.

        Raises:
            TavError: when the inversion has no latents at that noise level.

        """
        row = 0 if timestep is None else self._row(timestep)
        source = scale * self.trajectory[row][None]
        return torch.where(self.mask == 1, latents, self.mask * latents + (1 - self.mask) * source)

    def _row(self, timestep: int) -> int:
        if timestep not in self.timesteps:
            raise TavError(
                f"With a mask the sampler must walk the inversion's timesteps, and {timestep} is none of them. "
                "Use DDIM, Euler or DPM-Solver++ without noise levels of its own."
            )
        return self.timesteps.index(timestep) + 1
