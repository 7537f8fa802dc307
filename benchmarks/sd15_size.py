"""The whole job on a model of Stable Diffusion 1.5's size with random weights: tune, invert, edit; time and memory.

    python benchmarks/sd15_size.py work/sd15 CLIP.mp4 --prompt "a man is skiing"

The model is written in the real layout once, and read back as a user's would be. What comes out is noise; what is
shown is that every stage runs at that size, and what it needs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from machine import memory
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tav_peft.bases import locate
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip

VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512, "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32,
}  # fmt: skip
UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # the rest is diffusers' default
TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip
SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def parts() -> dict[str, Any]:
    """Draw a random model of SD 1.5's size; the tokenizer is pocket's, whose ids fit."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(locate("pocket"), subfolder="tokenizer", model_max_length=77)
    return {
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(**UNET),
        "scheduler": DDIMScheduler(**SCHEDULER),
    }


def make_base(folder: Path) -> None:
    """Write a random model of SD 1.5's size."""
    StableDiffusionPipeline(
        **parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)


def main() -> None:
    """Make the base if needed, run the job, print a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--preset", default="lite")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    if not (options.folder / "model_index.json").exists():
        make_base(options.folder)

    def stage(name: str, began: float) -> None:
        print(
            f"| {name} | {time.perf_counter() - began:.1f} s | {memory('VmHWM') / 2**30:.2f} GiB |",
            flush=True,
        )

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.frames} frames {options.size}²"
    )
    print("| stage | wall | peak memory so far |\n|---|---|---|")
    began = time.perf_counter()
    pipe = TuneAVideoPipeline.from_pretrained(options.folder)
    clip = Clip.read(options.clip, frames=options.frames, size=(options.size, options.size), fit="crop")
    stage("load", began)
    recipe = Recipe.load("lite").override(
        [f"training.steps={options.steps}", f"adapter.preset={options.preset}",
         f"training.gradient_checkpointing={str(options.checkpointing).lower()}"]
    )  # fmt: skip
    began = time.perf_counter()
    output = options.folder / "adapter.safetensors"
    tune(pipe, clip, options.prompt, recipe, output=output, overwrite=True, restart=True)
    stage(f"tune {options.steps} steps, {options.preset}, {output.stat().st_size / 1e6:.2f} MB", began)
    began = time.perf_counter()
    pipe.load_adapter(output)
    stage("load the adapter", began)
    began = time.perf_counter()
    inversion = pipe.invert(clip, num_inference_steps=options.steps)
    stage(f"invert {options.steps} steps", began)
    began = time.perf_counter()
    (edit,) = pipe("a robot is moving", inversion=inversion, like=clip).clips
    stage(f"edit {options.steps} guided steps, decode", began)
    edit.write(options.folder / "edit.png")


if __name__ == "__main__":
    main()
