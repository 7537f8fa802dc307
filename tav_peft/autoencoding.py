"""Clips to a VAE's latents and back, few frames at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL

from tav_peft.errors import TavError
from tav_peft.shapes import Latents
from tav_peft.video.clip import Clip

_PIXELS = 256 * 256


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, clip: Clip, device: torch.device) -> tuple[Latents, Latents]:
    """Encode a clip to its posterior's mean and standard deviation, unscaled latents.

    Raises:
        TavError: when the clip's size is none that the VAE can halve evenly.

    """
    _check_size(vae, clip)
    with _safe_precision(vae):
        frames = clip.tensor()[0].transpose(0, 1).to(device, vae.dtype).contiguous()  # f c h w
        posteriors = [
            vae.encode(part).latent_dist for part in frames.split(frames_at_once(clip.height, clip.width))
        ]
    mean = torch.cat([p.mean for p in posteriors]).transpose(0, 1)[None]
    std = torch.cat([p.std for p in posteriors]).transpose(0, 1)[None]
    return mean, std


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Latents, *, like: Clip | None = None, fps: float = 8.0) -> list[Clip]:
    """Decode each row of clean, scaled latents to a clip; `like` lends its frame rate and sound."""
    clips = []
    with _safe_precision(vae):
        for video in latents:
            frames = (video / vae.config.scaling_factor).transpose(0, 1).to(vae.dtype)  # f c h w
            frames = frames.contiguous()  # a convolution rounds otherwise for another layout in memory
            height, width = (side * pixels_per_latent(vae) for side in frames.shape[-2:])
            parts = frames.split(frames_at_once(height, width))
            decoded = torch.cat([vae.decode(part).sample.float().cpu() for part in parts])
            clips.append(Clip.from_tensor(decoded.transpose(0, 1), like=like, fps=fps))
    return clips


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """How many pixels one latent stands for along a side: 8 for Stable Diffusion."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def frames_at_once(height: int, width: int) -> int:
    """Tell how many frames go through a VAE together: one large one, or more of small ones, where a pass costs more."""
    return max(1, _PIXELS // (height * width))


def _check_size(vae: AutoencoderKL, clip: Clip) -> None:
    # the latents must halve evenly at every level for the skips to meet; the UNet itself pads odd sizes
    factor = pixels_per_latent(vae)
    if clip.height % factor or clip.width % factor:
        raise TavError(
            f"The clip is {clip.width}x{clip.height}, this base needs multiples of {factor}. "
            "Read it with a `size` that is."
        )


@contextlib.contextmanager
def _safe_precision(vae: AutoencoderKL) -> Iterator[None]:
    """Run a VAE in float32 where its config says that half precision overflows, as SDXL's does."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)
