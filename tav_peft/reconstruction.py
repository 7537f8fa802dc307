"""How well an inversion comes back: its clip, sampled again without text, against the best the VAE allows."""

from __future__ import annotations

import dataclasses
import math

from tav_peft.inversion import Inversion
from tav_peft.pipeline import Progress, TuneAVideoPipeline
from tav_peft.scoring.pixels import psnr
from tav_peft.video.clip import Clip


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Two PSNRs to the source clip, in decibels: of the clip sampled back, and of its latents decoded at once."""

    psnr: float
    ceiling: float

    @property
    def gap(self) -> float:
        """What the inversion loses of what the VAE keeps; negative where its errors happen to make good the VAE's."""
        return 0.0 if self.psnr == self.ceiling else self.ceiling - self.psnr

    def in_json(self) -> dict[str, float | None]:
        """Give the three numbers for JSON, which has no infinity: None where there is no error at all."""
        numbers = {"psnr": self.psnr, "ceiling": self.ceiling, "gap": self.gap}
        return {name: round(x, 3) if math.isfinite(x) else None for name, x in numbers.items()}


def reconstruct(pipe: TuneAVideoPipeline, inversion: Inversion, *, progress: Progress | None = None) -> Clip:
    """Sample back from where an inversion ended, without text and guidance: one UNet pass a step.

    With the adapters it was made with, and a deterministic sampler, this is the clip again but for the inversion's and
    the VAE's errors.
    """
    windows = {name: inversion.info[name] for name in ("window", "overlap") if name in inversion.info}
    (clip,) = pipe(
        "", inversion=inversion, guidance_scale=1, depth=inversion.depth, progress=progress, **windows
    ).clips
    return clip


def measure(
    pipe: TuneAVideoPipeline, clip: Clip, inversion: Inversion, *, progress: Progress | None = None
) -> Reconstruction:
    """Compare a clip with its reconstruction, and with what the VAE alone makes of its latents.

    Costs one UNet pass a step of the inversion, and decoding twice.

    Raises:
        TavError: when the inversion is of a clip of another size or length.

    """
    ceiling = psnr(clip, pipe.decode_latents(inversion.clean)[0])
    return Reconstruction(psnr(clip, reconstruct(pipe, inversion, progress=progress)), ceiling)
