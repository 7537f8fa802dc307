"""Teach pocket a style by an ordinary LoRA, or a subject by textual inversion, as people do with Stable Diffusion.

    python training/personalise.py work/blueprint --kind lora
    python training/personalise.py work/robot --kind textual_inversion --lr 1e-2

The LoRA (rank 4 on all projections of the attentions) learns a style that pocket never saw, blue ink on white. The word
`<zwx>` (Gal et al. 2023) learns the one-eyed robot of `training/dreambooth.py`. Both are written as diffusers does, with
a sheet of samples beside them, for `tav edit --lora` and `--textual-inversion`.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from dreambooth import Pictures, denoising_loss
from samples import draw, page
from subject import subject_scenes
from tav_peft.bases import locate
from tav_peft.pocket.world import BACKGROUNDS, Scene, random_scene, render

STYLE, WORD = "zwx style", "<zwx>"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def blueprint(picture: np.ndarray) -> np.ndarray:
    """Print a picture (64, 64, 3) in dark blue on white paper."""
    grey = (picture.astype(np.float32) @ np.array([0.3, 0.59, 0.11], np.float32))[..., None] / 255
    ink, paper = np.array([16, 32, 120], np.float32), np.array([250, 250, 245], np.float32)
    return np.clip(ink + (paper - ink) * grey, 0, 255).astype(np.uint8)


def styled_scenes(count: int) -> tuple[list[Image.Image], list[str]]:
    """Draw scenes in the style, with captions that name it."""
    rng, pictures, captions = random.Random(0), [], []
    while len(pictures) < count:
        scene = random_scene(rng)
        if scene.style != "plain":
            continue
        pictures.append(Image.fromarray(blueprint(render(scene))))
        captions.append(f"{scene.caption}, {STYLE}")
    return pictures, captions


def add_word(pipe: StableDiffusionPipeline, like: str) -> int:
    """Add the word to tokenizer and text encoder, starting as another word; return its token."""
    pipe.tokenizer.add_tokens([WORD])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    token, first = (pipe.tokenizer.convert_tokens_to_ids(each) for each in (WORD, f"{like}</w>"))
    embeddings = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[token] = embeddings[first]
    return token


def main() -> None:
    """Train, and write the file and its samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("lora", "textual_inversion"), required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--sampling-steps", type=int, default=25, help="of the samples")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(locate("pocket"))
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    token = None
    if options.kind == "lora":
        pictures = Pictures(pipe, *styled_scenes(240))
        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
        trained = [each for each in pipe.unet.parameters() if each.requires_grad]
        asked = [f"{Scene(s.actors, s.background).caption}, {STYLE}" for s in some_scenes(16)]
    else:
        token = add_word(pipe, like="robot")
        scenes = subject_scenes(WORD)
        shown = [Image.fromarray(render(scene)) for scene in scenes]
        pictures = Pictures(pipe, shown, [scene.caption for scene in scenes])
        trained = [pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)]
        asked = [f"a {WORD} is moving {place}" for place in BACKGROUNDS.values()] * 2
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    started, mean = time.monotonic(), 0.0
    for step in range(options.steps):
        loss = denoising_loss(pipe, pictures, options.batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        if token is not None:  # only the new word is learned
            keep = torch.zeros_like(trained[0].grad)
            keep[token] = 1
            trained[0].grad.mul_(keep)
        optimizer.step()
        schedule.step()
        mean += loss.item() / 50
        if step % 50 == 49:
            print(f"step {step + 1}, loss {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True)
            mean = 0.0
    if token is None:
        layers = get_peft_model_state_dict(pipe.unet)
        StableDiffusionPipeline.save_lora_weights(options.folder, unet_lora_layers=layers)
    else:
        learned = pipe.text_encoder.get_input_embeddings().weight[token].detach().clone()
        save_file({WORD: learned[None]}, options.folder / "learned_embeds.safetensors")
    pipe.text_encoder.requires_grad_(False)
    page(draw(pipe, asked, guidance=4.0, steps=options.sampling_steps), 8).save(
        options.folder / "samples.png"
    )


def some_scenes(count: int) -> list[Scene]:
    """Choose scenes of other seeds, to draw samples of."""
    rng = random.Random(1)
    return [random_scene(rng) for _ in range(count)]


if __name__ == "__main__":
    main()
