"""What control networks add to the UNet, frame by frame, at every step of a sampling or an inversion."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter
from torch import Tensor

from tav_peft.conditions import Conditions
from tav_peft.control.networks import Network, check_features, check_fit
from tav_peft.errors import BaseModelError, TavError
from tav_peft.shapes import Latents
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.video.clip import Clip

Residuals: TypeAlias = dict[str, Any]  # arguments of the UNet's forward; frames folded, (batch·frames, …)


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """A control network with the maps that it reads, one for each frame, and how it takes part.

    `network` is a diffusers ControlNetModel (Zhang et al. 2023) or T2IAdapter (Mou et al. 2023). `scale` multiplies what
    it adds. It acts from `start` to `end`, shares of the whole schedule from noise (0) to clean (1), whatever the depth.
    With `guess_mode` a ControlNet steers only the prompt's half of the guidance, weakest at the fine levels.
    """

    network: Network
    maps: Clip
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise TavError(f"A control from {self.start:g} to {self.end:g}: give 0 <= start < end <= 1.")
        if not abs(self.scale) < float("inf"):
            raise TavError(f"A control's scale of {self.scale:g}: give a number.")

    def acts(self, step: int, steps: int) -> bool:
        """Tell whether it takes part in a step, counted from the noise end, of a schedule; as diffusers counts."""
        return step / steps >= self.start and (step + 1) / steps <= self.end

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """Say what it is, for an inversion that it steered; every weight is read, once."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return {
            "network": digest.hexdigest(), "maps": self.maps.fingerprint, "scale": self.scale,
            "start": self.start, "end": self.end, "guess_mode": self.guess_mode,
        }  # fmt: skip


class Steering:
    """Controls made ready for clips of one size: maps as tensors, and the features of T2I-Adapters, which ask no step.

    Raises:
        BaseModelError: when a network does not fit the base.
        TavError: when maps have other frames or another size than the clip.

    """

    def __init__(
        self, controls: Sequence[Control], unet: InflatedUNet, vae: AutoencoderKL, latents: Latents, size: tuple[int, int]
    ) -> None:  # fmt: skip
        self._controls = tuple(controls)
        self._maps: list[Tensor] = []
        self._features: list[list[Tensor] | None] = []
        for control in controls:
            network = control.network.to(latents.device)
            if network.dtype != latents.dtype:
                network.to(latents.dtype)
            maps = _tensor_of(control.maps, latents.shape[2], size).to(latents.device, latents.dtype)
            self._maps.append(maps)
            if isinstance(network, ControlNetModel):
                check_fit(network, unet, vae)
                self._features.append(None)
            else:
                features = _features(network, maps)
                check_features(network, features, unet, latents)
                self._features.append(features)

    @torch.no_grad()
    def residuals(
        self, latents: Latents, timestep: Tensor | int, conditions: Conditions, step: int, steps: int
    ) -> Residuals:
        """Compute what is added to the UNet in a step; `step` of `steps` is counted from the noise end.

        Rows are videos, folded with frames running fastest: row r's frame f is at r·frames + f.
        """
        added: Residuals = {}
        for control, maps, features in zip(self._controls, self._maps, self._features, strict=True):
            if not control.acts(step, steps):
                continue
            if features is not None:
                rows = [control.scale * each.repeat(len(latents), 1, 1, 1) for each in features]
                _add(added, "down_intrablock_additional_residuals", rows)
            else:
                down, mid = _controlnet_residuals(control, maps, latents, timestep, conditions)
                _add(added, "down_block_additional_residuals", down)
                _add(added, "mid_block_additional_residual", [mid])
        if "mid_block_additional_residual" in added:
            (added["mid_block_additional_residual"],) = added["mid_block_additional_residual"]
        return added


def _add(added: Residuals, name: str, more: Sequence[Tensor]) -> None:
    """Sum residuals level by level, not in place: networks may share what they return."""
    there = added.get(name)
    if there is not None and len(there) != len(more):
        raise TavError(
            f"One T2I-Adapter has {len(there)} levels, another {len(more)}. Use adapters of one kind."
        )
    added[name] = list(more) if there is None else [a + b for a, b in zip(there, more, strict=True)]


def _controlnet_residuals(
    control: Control, maps: Tensor, latents: Latents, timestep: Tensor | int, conditions: Conditions
) -> tuple[list[Tensor], Tensor]:
    count, frames = len(latents), latents.shape[2]
    # of a guided step's rows the first half has no prompt
    guess_mode = control.guess_mode or control.network.config.global_pool_conditions
    first = count // 2 if guess_mode and count > 1 else 0
    chosen = conditions.rows(*range(first, count))

    def per_frame(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(frames, dim=0)

    added = None if chosen.added is None else {name: per_frame(rows) for name, rows in chosen.added.items()}
    down, mid = control.network(
        latents[first:].transpose(1, 2).flatten(0, 1),  # (b f) c h w
        timestep,
        per_frame(chosen.text),
        controlnet_cond=maps.repeat(count - first, 1, 1, 1),
        conditioning_scale=control.scale,
        guess_mode=guess_mode,
        added_cond_kwargs=added,
        return_dict=False,
    )
    unsteered = first * frames
    if unsteered:
        down = [torch.cat([each.new_zeros(unsteered, *each.shape[1:]), each]) for each in down]
        mid = torch.cat([mid.new_zeros(unsteered, *mid.shape[1:]), mid])
    return list(down), mid


@torch.no_grad()
def _features(adapter: T2IAdapter, maps: Tensor) -> list[Tensor]:
    try:
        return list(adapter(maps[:, : adapter.config.in_channels]))
    except RuntimeError as error:
        raise BaseModelError(
            f"This T2IAdapter takes no maps of {maps.shape[-1]}x{maps.shape[-2]}: {str(error).splitlines()[0]}. "
            f"Use sides that are multiples of {adapter.total_downscale_factor}."
        ) from None


def _tensor_of(maps: Clip, frames: int, size: tuple[int, int]) -> Tensor:
    """Give maps as (frames, 3, height, width) in [0, 1]."""
    if maps.frames != frames or (maps.height, maps.width) != size:
        raise TavError(
            f"The control has {maps.frames} frames of {maps.width}x{maps.height}, the clip {frames} of "
            f"{size[1]}x{size[0]}. Give maps of the clip's frames and size."
        )
    return (maps.tensor()[0].transpose(0, 1) + 1) / 2
