"""DDIM inversion: the latents from which a deterministic sampler would have made the clip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tav_peft.errors import AdapterError
from tav_peft.shapes import Latents
from tav_peft.tensor_file import read_tensors, write_tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Inversion:
    """A clip's way from its clean latents to noise.

    `trajectory` has num_inference_steps + 1 rows of (channels, frames, height, width); row 0 is clean, row k has
    gone through the k smallest timesteps. `info` says what it was made from.
    """

    trajectory: Tensor
    num_inference_steps: int
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def clean(self) -> Latents:
        """The clip's clean latents."""
        return self.trajectory[0][None]

    def at(self, depth: float) -> tuple[Latents, int]:
        """Return the latents at a depth in (0, 1] and how many of the sampling steps are left from there."""
        steps = max(1, round(depth * self.num_inference_steps))
        return self.trajectory[steps][None], steps

    def save(self, path: str | Path) -> Path:
        """Write the whole trajectory to one safetensors file."""
        header = {
            "tav_peft_inversion": json.dumps({"steps": self.num_inference_steps, **self.info}, sort_keys=True)
        }
        return write_tensors(path, {"trajectory": self.trajectory}, header)

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Read a file that `save` wrote."""
        tensors, metadata = read_tensors(Path(path))
        if "tav_peft_inversion" not in metadata or "trajectory" not in tensors:
            raise AdapterError(f"{path} is no inversion. Make one with `tav invert`.")
        try:
            info = json.loads(metadata["tav_peft_inversion"])
            return cls(tensors["trajectory"], int(info.pop("steps")), info)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise AdapterError(
                f"{path}: its header is not that of an inversion. Make it again with `tav invert`."
            ) from None


def ddim_coefficients(alpha: float, alpha_next: float, prediction_type: str) -> tuple[float, float]:
    """Coefficients (a, b) of one deterministic DDIM step, x_next = a·x + b·output (Song et al. 2021, eq. 12, eta 0).

    `alpha` and `alpha_next` are cumulative products in (0, 1]; the output is the predicted noise (epsilon), velocity
    (v_prediction; Salimans & Ho 2022, where the step is a rotation) or clean latents (sample).
    """
    sigma, sigma_next = (1 - alpha) ** 0.5, (1 - alpha_next) ** 0.5
    if prediction_type == "epsilon":
        a = (alpha_next / alpha) ** 0.5
        return a, sigma_next - a * sigma
    if prediction_type == "v_prediction":
        cosine = (alpha * alpha_next) ** 0.5 + sigma * sigma_next
        return cosine, sigma_next * alpha**0.5 - sigma * alpha_next**0.5
    if prediction_type == "sample":
        a = sigma_next / sigma
        return a, alpha_next**0.5 - a * alpha**0.5
    raise AdapterError(
        f"The scheduler predicts {prediction_type!r}. Use a base with epsilon or v_prediction."
    )


def inverse_step(
    latents: Latents, output: Latents, alpha: float, alpha_next: float, prediction_type: str
) -> Latents:
    """Undo a DDIM step: from `alpha` (cleaner) to `alpha_next` (noisier), with the output a sampler would use there.

    Shapes are (batch, channels, frames, height, width). Exact if `output` were the model's at the result; taking it
    at `latents` is the approximation of DDIM inversion.
    """
    a, b = ddim_coefficients(alpha_next, alpha, prediction_type)
    return (latents - b * output) / a


def timestep_pairs(scheduler: DDIMScheduler, num_inference_steps: int) -> list[tuple[int, float, float]]:
    """List (timestep, alpha before, alpha at it) from the cleanest to the noisiest sampling timestep.

    The timesteps are the sampler's own; the alpha before is the one its step ends on.
    """
    scheduler.set_timesteps(num_inference_steps)
    alphas = scheduler.alphas_cumprod.double()
    stride = scheduler.config.num_train_timesteps // num_inference_steps
    pairs = []
    for t in reversed(scheduler.timesteps.tolist()):
        before = alphas[t - stride] if t >= stride else torch.as_tensor(scheduler.final_alpha_cumprod)
        pairs.append((t, float(before), float(alphas[t])))
    return pairs


@torch.no_grad()
def invert(
    predict: Callable[[Latents, int], Latents],
    latents: Latents,
    scheduler: DDIMScheduler,
    num_inference_steps: int,
    *,
    steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Invert clean latents (1, channels, frames, height, width) and return the trajectory.

    `predict(latents, timestep)` is the model's output. With `steps` only the first (cleanest) ones are gone through.
    """
    pairs = timestep_pairs(scheduler, num_inference_steps)[: steps or num_inference_steps]
    trajectory = [latents]
    for done, (timestep, alpha, alpha_next) in enumerate(pairs, start=1):
        output = predict(latents, timestep)
        latents = inverse_step(latents, output, alpha, alpha_next, scheduler.config.prediction_type)
        trajectory.append(latents)
        if progress is not None:
            progress(done, len(pairs))
    return torch.cat(trajectory)
