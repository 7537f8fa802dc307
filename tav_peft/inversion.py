"""DDIM inversion: the latents from which a deterministic sampler would have made the clip."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tav_peft.errors import AdapterError
from tav_peft.finite import check_finite
from tav_peft.recipe import InversionMethod
from tav_peft.shapes import Latents
from tav_peft.tensor_file import check_hashes, read_tensors, write_tensors

Predict = Callable[[Latents, int], Latents]  # the model's output for latents at a timestep
TimestepPair = tuple[int, float, float]  # a timestep, alpha before it, alpha at it

ITERATIONS = 5
TOLERANCE = 0.01  # root mean square, of latents whose standard deviation is near 1

_MADE_WITH = {
    "base_fingerprint": "another base",
    "prediction_type": "another prediction type",
    "model": "another attention or GroupNorm",
    "adapters": "another adapter, or at another strength",
    "controls": "other controls",
    "clip": "another clip",
}


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

    def noted(self, **more: Any) -> Inversion:
        """Return it with more to say about itself; `save` keeps what JSON can."""
        return dataclasses.replace(self, info={**self.info, **more})

    def check_made_with(self, wanted: Mapping[str, Any]) -> None:
        """Refuse to be used with another base, other adapters or another clip than it was made with.

        `wanted` is `pipe.inverted_with()`, and the fingerprint of the clip.

        Raises:
            AdapterError: naming what is other, and what to do.

        """
        wrong = [
            what for key, what in _MADE_WITH.items() if (self.info.get(key) or None) != (wanted[key] or None)
        ]
        if wrong:
            own = f"base {self.info.get('base')}, clip {self.info.get('name') or 'without a name'}"
            raise AdapterError(
                f"The inversion ({own}) was made with {', '.join(wrong)}. Make it again with `tav invert`, "
                "or edit with what it was made with."
            )

    def save(self, path: str | Path) -> Path:
        """Write the whole trajectory to one safetensors file."""
        header = {
            "tav_peft_inversion": json.dumps({"steps": self.num_inference_steps, **self.info}, sort_keys=True)
        }
        return write_tensors(path, {"trajectory": self.trajectory}, header, hashed=True)

    @property
    def depth(self) -> float:
        """How far the clip was inverted, in (0, 1]."""
        return (len(self.trajectory) - 1) / self.num_inference_steps

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Read a file that `save` wrote.

        Raises:
            AdapterError: when the file is damaged, has changed since, or is something else.

        """
        tensors, metadata = read_tensors(Path(path))
        if "tav_peft_inversion" not in metadata or "trajectory" not in tensors:
            raise AdapterError(f"{path} is no inversion. Make one with `tav invert`.")
        try:
            info = json.loads(metadata["tav_peft_inversion"])
            made = cls(tensors["trajectory"], int(info.pop("steps")), info)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise AdapterError(
                f"{path}: its header is not that of an inversion. Make it again with `tav invert`."
            ) from None
        check_hashes(tensors, metadata, Path(path).name)
        if made.trajectory.ndim != 5 or not 1 < len(made.trajectory) <= made.num_inference_steps + 1:
            raise AdapterError(
                f"{path}: latents of shape {tuple(made.trajectory.shape)} are no inversion of {made.num_inference_steps} "
                "steps. Make it again with `tav invert`."
            )
        return made


def predicted_noise(output: Latents, latents: Latents, alpha: float, prediction_type: str) -> Latents:
    """Turn the model's output at `latents`, whose cumulative product is `alpha` in (0, 1), into the noise it means.

    The output is noise (epsilon), velocity √alpha·noise - √(1-alpha)·clean (v_prediction; Salimans & Ho 2022), or clean
    latents (sample).
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * latents
    if prediction_type == "sample":
        return (latents - alpha**0.5 * output) / (1 - alpha) ** 0.5
    raise AdapterError(
        f"The scheduler predicts {prediction_type!r}. Use a base with epsilon or v_prediction."
    )


def inverse_step(latents: Latents, noise: Latents, alpha: float, alpha_next: float) -> Latents:
    """Undo a DDIM step: from `alpha` (cleaner) to `alpha_next` (noisier), with the noise a sampler would see there.

    Shapes are (batch, channels, frames, height, width); alphas are cumulative products in (0, 1]. Song et al. 2021,
    eq. 12 with eta 0, solved for its input.
    """
    scale = (alpha_next / alpha) ** 0.5
    return scale * latents + ((1 - alpha_next) ** 0.5 - scale * (1 - alpha) ** 0.5) * noise


def timestep_pairs(scheduler: DDIMScheduler, num_inference_steps: int) -> list[TimestepPair]:
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
    predict: Predict,
    latents: Latents,
    scheduler: DDIMScheduler,
    num_inference_steps: int,
    *,
    steps: int | None = None,
    method: InversionMethod = "ddim",
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Invert clean latents (1, channels, frames, height, width) and return the trajectory.

    `predict(latents, timestep)` is the model's output. With `steps` only the first (cleanest) ones are gone through.

    A sampler's step from y to x takes the noise that the model sees in y, which inversion looks for. `ddim` takes the
    noise seen in x instead (Song et al. 2021, section 4.3), one pass of the model a step. `fixed_point` solves
    y = inverse_step(x, noise(y)) by iteration (Pan et al. 2023; Meiri et al. 2023), from where the former step's noise
    leads, which costs no pass. A step ends after `iterations` passes, or when one moves y by no more than `tolerance`.
    """
    pairs = timestep_pairs(scheduler, num_inference_steps)[: steps or num_inference_steps]
    kind, passes = scheduler.config.prediction_type, iterations if method == "fixed_point" else 1
    # half precision would round away a part of what a step changes
    current = latents.to(torch.promote_types(latents.dtype, torch.float32))
    trajectory, noise = [latents], None

    def seen(x: Latents, timestep: int) -> Latents:
        return predict(x.to(latents.dtype), timestep).to(x.dtype)

    for done, pair in enumerate(pairs, start=1):
        improve = functools.partial(_improve, seen, kind, current, pair)
        start = current if method == "ddim" or noise is None else inverse_step(current, noise, *pair[1:])
        for _ in range(passes):
            current, noise = improve(start)
            if (current - start).square().mean().sqrt() <= tolerance:
                break
            start = current
        trajectory.append(current.to(latents.dtype))
        check_finite(trajectory[-1], done, len(pairs), "the inversion")
        if progress is not None:
            progress(done, len(pairs))
    return torch.cat(trajectory)


def _improve(
    predict: Predict, prediction_type: str, latents: Latents, pair: TimestepPair, guess: Latents
) -> tuple[Latents, Latents]:
    """Take an inverse step with the noise that the model sees in a guess of its result; return result and noise."""
    timestep, alpha, alpha_next = pair
    output = predict(guess, timestep)
    if prediction_type == "v_prediction":
        result = _undo_rotation(latents, output, alpha, alpha_next)
        return result, predicted_noise(output, result, alpha_next, prediction_type)
    if alpha_next > 0:
        noise = predicted_noise(output, guess, alpha_next, prediction_type)
    else:  # where no signal is left the output is the clean latents; what they do not explain is noise
        noise = (latents - alpha**0.5 * output) / (1 - alpha) ** 0.5
    return inverse_step(latents, noise, alpha, alpha_next), noise


def _undo_rotation(latents: Latents, velocity: Latents, alpha: float, alpha_next: float) -> Latents:
    """Take an inverse step with a velocity instead of a noise: both sides of a sampler's step mean the same one.

    The sampler's step from y is cos(d)·y - sin(d)·v with the angle d between the noise levels (Salimans & Ho 2022,
    appendix D). Solved for y, only v is that of a guess; a noise taken from v and the guess would be off twice.
    """
    cosine = (alpha * alpha_next) ** 0.5 + ((1 - alpha) * (1 - alpha_next)) ** 0.5
    sine = (alpha * (1 - alpha_next)) ** 0.5 - (alpha_next * (1 - alpha)) ** 0.5
    return (latents + sine * velocity) / cosine
