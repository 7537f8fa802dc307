"""Train pocket's text encoder and UNet together on captioned scenes, in the latents of its trained VAE.

    torchrun --nproc-per-node 2 training/train_unet.py work/unet --vae work/vae/vae --steps 11000
    torchrun --nproc-per-node 2 training/train_unet.py work/on --base pocket --pairs 0.3 --steps 9000

The second form trains on from a base, its VAE included, with more scenes in which two objects overlap.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loop import join, train, trapezoid
from tav_peft.bases import locate
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, STYLES, Scene, held_out, random_scene, render

POSITIONS = 32
WIDTH = 96
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
START, END = "<|startoftext|>", "<|endoftext|>"


def make_merges(words: list[str]) -> list[tuple[str, str]]:
    """Choose byte-pair merges, in order of priority, that make each word one token.

    A word's first pair is merged until one piece is left; as later merges have lower priority, they leave the words
    before them whole. The same words give the same merges, which tokenizers' own trainer does not promise.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(pieces := split(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    return merges


def split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Split a word as CLIP's tokenizer does: the merge of highest priority first, wherever it occurs."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    for left, right in merges:
        joined: list[str] = []
        for piece in pieces:
            if joined and joined[-1] == left and piece == right:
                joined[-1] = left + right
            else:
                joined.append(piece)
        pieces = joined
    return pieces


def make_tokenizer(folder: Path, *, positions: int = POSITIONS) -> CLIPTokenizer:
    """Build a byte-level BPE in CLIP's layout in which every word of the world is one token."""
    text = " ".join([*OBJECTS, *BACKGROUNDS.values(), *STYLES.values(), "a an and is are moving with"])
    known = list(dict.fromkeys(text.replace(",", " ").split()))
    merges = make_merges(known)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=positions,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
    assert all(len(tokenizer(word).input_ids) == 3 for word in known)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build an untrained two-layer CLIP text encoder for the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Tokenise as the pipelines do: padded to the model's length."""
    return tokenizer(
        captions, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    ).input_ids


def overlapping_scene(rng: random.Random) -> Scene:
    """Draw a scene of two objects, each anywhere, the second before the first; neither held out from training."""
    while True:
        scene, other = random_scene(rng), random_scene(rng).actors[0]
        apart = other.name != scene.actors[0].name
        if apart and not held_out(other.name, scene.background, scene.style):
            return dataclasses.replace(scene, actors=(scene.actors[0], other))


@torch.no_grad()
def encode_scenes(
    file: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, count: int, pairs: float
) -> dict[str, Tensor]:
    """Draw scenes, encode them and keep latents (half precision) and caption tokens in `file`."""
    if not file.exists():
        rng, latents, tokens = random.Random(seed), [], []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count // 25):
            scenes = [
                overlapping_scene(rng) if pairs and rng.random() < pairs else random_scene(rng)
                for _ in range(25)
            ]
            x = (
                torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 127.5
                - 1
            )
            latents.append(vae.encode(x).latent_dist.sample(generator).half())
            tokens.append(tokens_of(tokenizer, [s.caption for s in scenes]))
        torch.save({"latents": torch.cat(latents), "tokens": torch.cat(tokens)}, file)
    return torch.load(file, weights_only=True)


class Denoiser(nn.Module):
    """The two parts that are trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET)
        self.text_encoder = make_text_encoder(tokenizer)

    def loss(self, latents: Tensor, tokens: Tensor, alphas: Tensor) -> Tensor:
        """Min-SNR-5 weighted error of the predicted noise (Hang et al. 2023)."""
        count = len(latents)
        timesteps = torch.randint(0, len(alphas), (count,))
        alpha = alphas[timesteps][:, None, None, None]
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=5) / snr
        return (weight * F.mse_loss(predicted, noise, reduction="none")).mean()


def main() -> None:
    """Train with the averaged weights saved as a diffusers folder at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    begin = parser.add_mutually_exclusive_group(required=True)
    begin.add_argument("--vae", type=Path, help="folder of the trained VAE, for new weights")
    begin.add_argument("--base", help="base to train on from, its VAE included")
    parser.add_argument("--pairs", type=float, default=0, help="share of scenes of two that may overlap")
    parser.add_argument("--seed", type=int, default=1, help="first seed of the scenes")
    parser.add_argument("--steps", type=int, default=11000)
    parser.add_argument("--batch", type=int, default=8, help="scenes a step for each process")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--scenes", type=int, default=24000, help="scenes drawn by each process")
    parser.add_argument("--minutes", type=float, default=1e9)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rank, _ = join()
    torch.manual_seed(0)
    tokenizer = make_tokenizer(options.folder / f"tokenizer-{rank}")
    start = Path(locate(options.base)) if options.base else None
    vae = AutoencoderKL.from_pretrained(start / "vae" if start else options.vae, torch_dtype=torch.float32)
    scenes_file, seed = options.folder / f"scenes-{rank}.pt", options.seed + rank
    data = encode_scenes(scenes_file, vae, tokenizer, seed, options.scenes, options.pairs)
    model = Denoiser(tokenizer)
    if start:
        model.unet = UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32)
        model.text_encoder = CLIPTextModel.from_pretrained(start / "text_encoder", torch_dtype=torch.float32)
    empty = tokens_of(tokenizer, [""])[0]
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod

    def step_loss(index: int) -> Tensor:
        picked = torch.randint(0, len(data["latents"]), (options.batch,))
        tokens = data["tokens"][picked].clone()
        tokens[torch.rand(options.batch) < 0.1] = empty
        return model.loss(data["latents"][picked].float(), tokens, alphas)

    started, log, mean = time.monotonic(), options.folder / "log.csv", 0.0
    for step, loss in train(
        model,
        step_loss,
        steps=options.steps,
        lr=options.lr,
        folder=options.folder,
        schedule=trapezoid,
        minutes=options.minutes,
    ):
        mean += loss / 100
        if rank == 0 and step % 100 == 0:
            with log.open("a") as file:
                file.write(f"{step},{mean:.5f},{time.monotonic() - started:.0f}\n")
        mean = 0.0 if step % 100 == 0 else mean


if __name__ == "__main__":
    main()
