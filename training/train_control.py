"""Train a small ControlNet or T2I-Adapter for pocket, on the edges of the scenes that pocket was trained on.

    python training/train_control.py work/controlnet --kind controlnet
    python training/train_control.py work/t2i-adapter --kind t2i_adapter

With `--shipped` it goes on from the network in the package, for when pocket itself was trained on.
Only the new network is trained (Zhang et al. 2023; Mou et al. 2023). A stopped run goes on where it was; at the end the
averaged weights are saved in half precision in `FOLDER/model`, as diffusers keeps them.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, T2IAdapter
from torch import Tensor, nn

from loop import train, trapezoid
from tav_peft.bases import locate
from tav_peft.control.maps import canny
from tav_peft.control.networks import load_network
from tav_peft.pocket.world import random_scene, render
from train_unet import tokens_of

NO_CAPTION = 0.3  # share of scenes whose caption is left out, so that the map has to say what there is


@torch.no_grad()
def draw_scenes(file: Path, pipe: StableDiffusionPipeline, count: int) -> dict[str, Tensor]:
    """Draw scenes once and keep their latents, caption tokens and edges in `file`."""
    if not file.exists():
        vae: AutoencoderKL = pipe.vae
        rng, kept = random.Random(20_000), {"latents": [], "tokens": [], "edges": []}
        generator = torch.Generator().manual_seed(0)
        for _ in range(count // 25):
            scenes = [random_scene(rng) for _ in range(25)]
            pixels = np.stack([render(scene) for scene in scenes])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            kept["latents"].append(vae.encode(x).latent_dist.sample(generator).half())
            kept["tokens"].append(tokens_of(pipe.tokenizer, [scene.caption for scene in scenes]))
            kept["edges"].append(torch.from_numpy(canny(pixels)[..., 0]))
        torch.save({name: torch.cat(rows) for name, rows in kept.items()}, file)
    return torch.load(file, weights_only=True)


class Controlled(nn.Module):
    """Pocket with a control network, of which only the network has parameters here."""

    def __init__(self, pipe: StableDiffusionPipeline, kind: str) -> None:
        super().__init__()
        self.frozen = [pipe.unet.requires_grad_(False), pipe.text_encoder.requires_grad_(False)]
        widths = tuple(pipe.unet.config.block_out_channels)
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        if kind == "controlnet":
            # a stride of two between every two widths: edges come down by the VAE's factor
            self.network = ControlNetModel.from_unet(
                pipe.unet, conditioning_embedding_out_channels=(16, 32, 64)
            )
        else:
            self.network = T2IAdapter(channels=widths, num_res_blocks=2, downscale_factor=factor)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, edges: Tensor) -> Tensor:
        """Predict the noise in latents (batch, 4, 16, 16), told captions and edges (batch, 3, 64, 64) in [0, 1]."""
        unet, text_encoder = self.frozen
        text = text_encoder(tokens)[0]
        if isinstance(self.network, ControlNetModel):
            down, mid = self.network(noisy, timesteps, text, controlnet_cond=edges, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        else:
            residuals = {"down_intrablock_additional_residuals": list(self.network(edges))}
        return unet(noisy, timesteps, text, **residuals).sample


def draw_timesteps(kind: str, count: int, total: int) -> Tensor:
    """Draw timesteps, for a T2I-Adapter more of the noisy ones (its section 3.5): there the layout is decided."""
    uniform = torch.rand(count)
    if kind == "t2i_adapter":
        uniform = 1 - uniform**3
    return (uniform * total).long().clamp(max=total - 1)


def main() -> None:
    """Train with the averaged weights saved as a diffusers folder at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("controlnet", "t2i_adapter"), required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--shipped", action="store_true", help="begin with the weights in the package")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(locate("pocket"))
    data = draw_scenes(options.folder / "scenes.pt", pipe, options.scenes)
    torch.manual_seed(0)
    model = Controlled(pipe, options.kind)
    if options.shipped:
        shipped = load_network(f"pocket-{options.kind.replace('_', '-')}")
        model.network.load_state_dict(shipped.state_dict())
    empty, alphas = tokens_of(pipe.tokenizer, [""])[0], pipe.scheduler.alphas_cumprod

    def step_loss(index: int) -> Tensor:
        picked = torch.randint(0, len(data["latents"]), (options.batch,))
        tokens = data["tokens"][picked].clone()
        tokens[torch.rand(options.batch) < NO_CAPTION] = empty
        timesteps = draw_timesteps(options.kind, options.batch, len(alphas))
        alpha = alphas[timesteps][:, None, None, None]
        latents, edges = data["latents"][picked].float(), data["edges"][picked].float() / 255
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = model(noisy, timesteps, tokens, edges[:, None].expand(-1, 3, -1, -1))
        snr = alpha / (1 - alpha)
        return (snr.clamp(max=5) / snr * F.mse_loss(predicted, noise, reduction="none")).mean()

    started, mean = time.monotonic(), 0.0
    for step, loss in train(
        model, step_loss, steps=options.steps, lr=options.lr, folder=options.folder, schedule=trapezoid,
        minutes=options.minutes,
    ):  # fmt: skip
        mean += loss / 100
        if step % 100 == 0:
            print(f"step {step}, loss {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True)
            mean = 0.0
    average = torch.load(options.folder / "checkpoint.pt", weights_only=True)["average"]
    model.load_state_dict(average, strict=False)
    model.network.half().save_pretrained(options.folder / "model")


if __name__ == "__main__":
    main()
