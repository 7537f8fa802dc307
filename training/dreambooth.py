"""Teach pocket one subject from six pictures, by DreamBooth (Ruiz et al., CVPR 2023), and save it as a new base.

    python training/dreambooth.py work/dreambooth

The UNet is tuned whole on the subject's pictures with captions such as "a zwx robot is moving on the snow", and on
pictures that pocket itself draws ("a robot is moving on the beach"), so that it keeps what it knew (prior preservation).
The paper draws them of the class alone (`--prior robot`); all objects are kept better if all are drawn.
What comes out is a folder in diffusers layout that every command takes as `--base`. The folder dreambooth/ in it holds
the subject's sprite and pictures, samples of the tuned model and the settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from loop import train
from samples import draw, page
from subject import CLASS, draw_subject, subject_scenes
from tav_peft.bases import locate
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, Actor, Scene, render
from train_unet import tokens_of

GUIDANCE = 4.0


def captions_of(name: str, count: int) -> list[str]:
    """List captions of an object by its name, on the backgrounds in turns."""
    backgrounds = list(BACKGROUNDS)
    return [Scene((Actor(name, 0, 0, 0),), backgrounds[i % len(backgrounds)]).caption for i in range(count)]


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """Encode pictures to their posterior's mean and standard deviation, (count, 4, 16, 16) each."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    posterior = pipe.vae.encode(pixels.float() / 127.5 - 1).latent_dist
    return posterior.mean, posterior.std


class Pictures:
    """Pictures with captions, ready to be drawn from: their latents and tokens."""

    def __init__(self, pipe: StableDiffusionPipeline, images: list[Image.Image], captions: list[str]) -> None:
        self.mean, self.std = encode(pipe, images)
        self.tokens = tokens_of(pipe.tokenizer, captions)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw latents and tokens at random, with repetition."""
        picked = torch.randint(0, len(self.mean), (count,), generator=generator)
        noise = torch.randn(self.mean[picked].shape, generator=generator)
        return self.mean[picked] + self.std[picked] * noise, self.tokens[picked]


def denoising_loss(
    pipe: StableDiffusionPipeline, pictures: Pictures, count: int, generator: torch.Generator
) -> Tensor:
    """Draw pictures, noise and timesteps, and return the mean squared error of the predicted noise."""
    latents, tokens = pictures.draw(count, generator)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, schedule.config.num_train_timesteps, (count,), generator=generator)
    noisy = schedule.add_noise(latents, noise, timesteps)
    predicted = pipe.unet(noisy, timesteps, pipe.text_encoder(tokens)[0]).sample
    return F.mse_loss(predicted, noise)


def main() -> None:
    """Draw the pictures, tune, and save the model with its samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the new base is written")
    parser.add_argument("--identifier", default="zwx", help="a word that pocket never saw")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--lr", type=float, default=3e-4, help="the highest; it rises and falls as half a cosine"
    )
    parser.add_argument(
        "--batch", type=int, default=4, help="pictures of the subject, and of the prior, a step"
    )
    parser.add_argument(
        "--prior", nargs="+", default=list(OBJECTS), help="objects that pocket draws to keep them"
    )
    parser.add_argument("--prior-pictures", type=int, default=8, help="how many of each")
    parser.add_argument("--prior-weight", type=float, default=1.0, help="weight of their loss")
    parser.add_argument("--text-encoder", action="store_true", help="tune the text encoder as well")
    parser.add_argument(
        "--sampling-steps", type=int, default=25, help="of the prior's pictures and of the samples"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    name, started = f"{options.identifier} {CLASS}", time.monotonic()
    pipe = StableDiffusionPipeline.from_pretrained(locate("pocket"))
    scenes = subject_scenes(name)
    shown = [Image.fromarray(render(scene)) for scene in scenes]
    subject = Pictures(pipe, shown, [scene.caption for scene in scenes])
    captions = [caption for kept in options.prior for caption in captions_of(kept, options.prior_pictures)]
    drawn = draw(pipe, captions, guidance=GUIDANCE, steps=options.sampling_steps, seed=options.seed)
    prior = Pictures(pipe, drawn, captions)
    print(
        f"{len(shown)} pictures of the subject, {len(drawn)} of the prior, {time.monotonic() - started:.0f} s"
    )

    def step_loss(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + index)
        loss = denoising_loss(pipe, subject, options.batch, generator)
        return loss + options.prior_weight * denoising_loss(pipe, prior, options.batch, generator)

    pipe.text_encoder.requires_grad_(options.text_encoder)
    mean = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for step, loss in train(
            nn.ModuleList([pipe.unet, pipe.text_encoder]), step_loss, steps=options.steps, lr=options.lr,
            folder=Path(scratch),
        ):  # fmt: skip
            mean += loss / 50
            if step % 50 == 0:
                print(f"step {step}, loss {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True)
                mean = 0.0
    save(pipe, options, name, shown)
    print(f"{options.folder}: {time.monotonic() - started:.0f} s")


def save(
    pipe: StableDiffusionPipeline, options: argparse.Namespace, name: str, shown: list[Image.Image]
) -> None:
    """Write the base, and in dreambooth/ what it was made from and what it draws."""
    pipe.save_pretrained(options.folder)
    # transformers 5 writes one file; older versions read the tokenizer from pocket's others
    shutil.copytree(Path(locate("pocket")) / "tokenizer", options.folder / "tokenizer", dirs_exist_ok=True)
    about = options.folder / "dreambooth"
    about.mkdir(exist_ok=True)
    draw_subject().save(about / "subject.png")
    page(shown, len(shown)).save(about / "pictures.png")
    others = [captions_of(name, i + 1)[i] for i, name in enumerate(OBJECTS)]
    asked = captions_of(name, 2 * len(BACKGROUNDS)) + others
    samples = draw(pipe, asked, guidance=GUIDANCE, steps=options.sampling_steps)
    page(samples, 8).save(about / "samples.png")
    told = {**vars(options), "folder": options.folder.name, "class": CLASS, "name": name, "samples": asked}
    (about / "dreambooth.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
