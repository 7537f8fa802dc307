"""Train pocket's AutoencoderKL: pictures of 64x64 to latents of 4x16x16 and back.

torchrun --nproc-per-node 2 training/train_vae.py work/vae --steps 3600
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from loop import join, train
from tav_peft.pocket.world import random_scene, render

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (24, 48, 96),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "force_upcast": False,
}


def pictures(seed: int, count: int, crop: int) -> Tensor:
    """Draw training pictures, (count, 3, crop, crop) in [-1, 1]."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        picture = render(random_scene(rng))
        top, left = rng.randint(0, 64 - crop), rng.randint(0, 64 - crop)
        out.append(picture[top : top + crop, left : left + crop])
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


def slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and right."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss_of(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """L1 + 0.5 MSE + 0.5 L1 of the slopes + 1e-4 KL."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample
    edges = sum((a - b).abs().mean() for a, b in zip(slope(x), slope(y), strict=True))
    kl = posterior.kl().mean() / x[0].numel()
    return (x - y).abs().mean() + 0.5 * (x - y).square().mean() + 0.5 * edges + 1e-4 * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, count: int = 64) -> float:
    """Mean PSNR in dB over whole pictures not trained on, through the posterior's mean."""
    x = pictures(999_999_937, count, 64)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return (-10 * ((x - y) / 2).square().mean(dim=(1, 2, 3)).log10()).mean().item()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL) -> None:
    """Fold each latent channel's mean and spread into the quant convolutions, so that scaling_factor is 1.

    The posterior's log-variance shifts with the scale; `decode(encode(x))` is unchanged.
    """
    latents = torch.cat([vae.encode(pictures(s, 32, 64)).latent_dist.sample() for s in range(16)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    quant: nn.Conv2d = vae.quant_conv
    post: nn.Conv2d = vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight *= std[None, :, None, None]
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.bias[4:] -= 2 * std.log()


def main() -> None:
    """Train for the steps asked, whole pictures in the last tenth, and save the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=1e9)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rank, _ = join()
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)

    def step_loss(index: int) -> Tensor:
        whole = index >= 2 * 0.93 * options.steps
        count = options.batch // 4 if whole else options.batch
        return loss_of(vae, pictures(index, count, 64 if whole else 32))

    started, log = time.monotonic(), options.folder / "log.csv"
    for step, loss in train(
        vae, step_loss, steps=options.steps, lr=2e-3, folder=options.folder, minutes=options.minutes
    ):
        if rank == 0 and step % 100 == 0:
            with log.open("a") as file:
                file.write(f"{step},{loss:.5f},{time.monotonic() - started:.0f}\n")
    if rank == 0:
        state = torch.load(options.folder / "checkpoint.pt", weights_only=True)
        vae.load_state_dict({**state["module"], **state["average"]})
        print(f"PSNR before folding {psnr(vae):.2f} dB")
        normalise_latents(vae)
        print(f"PSNR {psnr(vae):.2f} dB")
        vae.save_pretrained(options.folder / "vae")


if __name__ == "__main__":
    main()
