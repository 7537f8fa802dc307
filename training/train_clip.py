"""Train pocket's small CLIP, which `tav score` uses offline, on pictures and captions of the same renderer.

    python training/train_clip.py work/clip --steps 1800 --seen
    python training/train_clip.py work/clip --steps 2600 --groups 7000
    python training/train_clip.py work/clip2 --steps 3000 --groups 20000 --others 320 --lr 8e-4 --objects --shipped

Its scenes have other seeds than those pocket was trained on. With `--seen` it is shown only combinations that pocket has
seen: an edit to one that was held out is then new to both, and its accuracy there, printed at the end, says how far to
trust it on what it never saw. With `--objects` every picture of a group shows another object, the hardest to tell apart;
with `--shipped` it goes on from the one in the package. A stopped run goes on where it was; at the end the averaged
weights are written in half precision as transformers keeps a CLIPModel.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from loop import train
from tav_peft.pocket.world import (
    BACKGROUNDS, OBJECTS, PIXELS, STYLES, Actor, Scene, held_out, random_scene, render,
)  # fmt: skip
from train_unet import make_tokenizer

SHIPPED = Path(__file__).parent.parent / "tav_peft" / "pocket" / "clip"
FIRST_SEED = 8_000_000  # of training; pocket's scenes are drawn from 1 and 2, the judge's from 7,000,000 on
TEST_SEED = 9_000_000
POSITIONS = 24  # the longest caption, of two objects in a style, takes 18 tokens
MEAN, STD = [0.5] * 3, [0.25] * 3
VISION = {
    "image_size": PIXELS, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
GROUP = 4  # a scene, and the same one with another object, background or style


def is_held_out(scene: Scene) -> bool:
    """Tell whether the scene shows a combination that pocket is not trained on."""
    return any(held_out(actor.name, scene.background, scene.style) for actor in scene.actors)


def caption_of(name: str, background: str, style: str) -> str:
    """Say a scene of one object."""
    return Scene((Actor(name, 0, 0, 0),), background, style).caption


def captions(*, seen: bool) -> list[str]:
    """Say all scenes of one object, or those that pocket has seen."""
    every = itertools.product(OBJECTS, BACKGROUNDS, STYLES)
    return [caption_of(*each) for each in every if not (seen and held_out(*each))]


def random_group(rng: random.Random, *, seen: bool, objects: bool = False) -> list[Scene]:
    """Draw a scene and three edits of it, the hardest pictures to tell from it; all of them seen, if asked.

    They have another object, another background and another style; or each another object, one with another
    background and one with another style too.
    """
    while True:
        scene = random_scene(rng, training=False)
        taken = [actor.name for actor in scene.actors]
        names = rng.sample([o for o in OBJECTS if o not in taken], 3)
        background = {"background": rng.choice([b for b in BACKGROUNDS if b != scene.background])}
        style = {"style": rng.choice([s for s in STYLES if s != scene.style])}
        if objects:
            changes = [{"name": names[0]}, {"name": names[1], **background}, {"name": names[2], **style}]
        else:
            changes = [{"name": names[0]}, background, style]
        group = [scene, *(scene.edited(**change) for change in changes)]
        if not (seen and any(map(is_held_out, group))):
            return group


def draw_groups(file: Path, count: int, *, seen: bool, objects: bool) -> tuple[Tensor, list[str]]:
    """Draw groups once and keep their pictures, uint8 (4·count, 64, 64, 3), and captions in `file`."""
    if not file.exists():
        rng = random.Random(FIRST_SEED + seen + 2 * objects)
        scenes = [scene for _ in range(count) for scene in random_group(rng, seen=seen, objects=objects)]
        pictures = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
        torch.save({"pictures": pictures, "captions": [scene.caption for scene in scenes]}, file)
    kept = torch.load(file, weights_only=True)
    return kept["pictures"], kept["captions"]


def normalised(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures (count, 64, 64, 3) into what the model sees, (count, 3, 64, 64)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std


def worsened(pixels: Tensor) -> Tensor:
    """Mirror, blur and add noise at random, as no edited frame is as crisp as a rendered one."""
    count = len(pixels)
    pixels = torch.where(torch.rand(count, 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.lerp(pixels, blurred, torch.rand(count, 1, 1, 1)) + 0.1 * torch.randn_like(pixels)


class Contrast(nn.Module):
    """A CLIP and its loss."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer(folder, positions=POSITIONS)
        marks = {
            f"{mark}_token_id": getattr(self.tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")
        }
        text = CLIPTextConfig(vocab_size=len(self.tokenizer), projection_dim=64, **TEXT, **marks)
        vision = CLIPVisionConfig(projection_dim=64, **VISION)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
        self.clip = CLIPModel(config)

    def tokens(self, captions: list[str]) -> Tensor:
        """Tokenise, padded to the longest."""
        return self.tokenizer(captions, padding=True, return_tensors="pt").input_ids

    def similarities(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Give cosines of pictures and captions times the learnt scale, (pictures, captions)."""
        images = self.clip.get_image_features(pixels).pooler_output
        texts = self.clip.get_text_features(tokens).pooler_output
        images, texts = (F.normalize(each, dim=-1) for each in (images, texts))
        return self.clip.logit_scale.clamp(max=4.6).exp() * images @ texts.T

    def loss(self, pixels: Tensor, captions: list[str], others: list[str]) -> Tensor:
        """InfoNCE both ways (Radford et al. 2021), a picture's captions to choose from being the batch's and `others`.

        Pictures of the same caption are all right for it.
        """
        asked = list(dict.fromkeys(captions))
        right = torch.tensor([asked.index(caption) for caption in captions])
        logits = self.similarities(pixels, self.tokens(list(dict.fromkeys([*asked, *others]))))
        fitting = torch.arange(len(asked))[:, None] == right
        to_image = logits[:, : len(asked)].T
        of_text = torch.logsumexp(to_image, 1) - torch.logsumexp(to_image.masked_fill(~fitting, -1e4), 1)
        return F.cross_entropy(logits, right) + of_text.mean()


@torch.no_grad()
def accuracies(model: Contrast, scenes: list[Scene]) -> dict[str, float]:
    """Share of scenes whose own caption fits best among those with another object, background or style, or any."""
    model.eval()
    pixels = normalised(torch.from_numpy(np.stack([render(scene) for scene in scenes])))
    everything = list(itertools.product(OBJECTS, BACKGROUNDS, STYLES))
    cosines = model.similarities(pixels, model.tokens([caption_of(*each) for each in everything]))
    own = [(scene.actors[0].name, scene.background, scene.style) for scene in scenes]
    kinds: dict[str, Callable[[tuple[str, ...], tuple[str, ...]], bool]] = {
        "object": lambda a, b: a[1:] == b[1:],
        "background": lambda a, b: a[::2] == b[::2],
        "style": lambda a, b: a[:2] == b[:2],
        "all 640": lambda *_: True,
    }
    told = {}
    for kind, comparable in kinds.items():
        rows = [[comparable(a, b) for b in everything] for a in own]
        best = cosines.masked_fill(~torch.tensor(rows), -1e4).argmax(1).tolist()
        told[kind] = round(float(np.mean([everything[i] == a for i, a in zip(best, own, strict=True)])), 4)
    return told


def test_scenes(count: int, *, new: bool) -> list[Scene]:
    """Draw scenes of one object, of held-out combinations only or of none of them."""
    rng, scenes = random.Random(TEST_SEED + new), []
    while len(scenes) < count:
        scene = random_scene(rng, training=False)
        if len(scene.actors) == 1 and is_held_out(scene) == new:
            scenes.append(scene)
    return scenes


def save(model: Contrast, folder: Path) -> None:
    """Write model, tokenizer and image processor in half precision; float32 is what they are computed in."""
    model.clip.half().save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    CLIPImageProcessor(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=MEAN,
        image_std=STD,
    ).save_pretrained(folder)
    make_tokenizer(folder, positions=POSITIONS)


def main() -> None:
    """Train, say how good it is on new pictures, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seen", action="store_true", help="only combinations that pocket has seen")
    parser.add_argument("--objects", action="store_true", help="another object in every picture of a group")
    parser.add_argument("--shipped", action="store_true", help="begin with the weights in the package")
    parser.add_argument("--groups", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=24, help="groups of four pictures a step")
    parser.add_argument("--others", type=int, default=160, help="captions of other pictures a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--output", type=Path, default=SHIPPED)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Contrast(options.folder / "tokenizer")
    if options.shipped:
        model.clip.load_state_dict(CLIPModel.from_pretrained(SHIPPED, dtype=torch.float32).state_dict())
    file = options.folder / f"groups-{'seen' if options.seen else 'all'}.pt"
    pictures, own = draw_groups(file, options.groups, seen=options.seen, objects=options.objects)
    every = captions(seen=options.seen)

    def step_loss(_: int) -> Tensor:
        first = GROUP * torch.randint(0, len(own) // GROUP, (options.batch,))
        picked = (first[:, None] + torch.arange(GROUP)).flatten()
        others = [every[i] for i in torch.randperm(len(every))[: options.others].tolist()]
        pixels = worsened(normalised(pictures[picked]))
        return model.loss(pixels, [own[i] for i in picked.tolist()], others)

    started, mean = time.monotonic(), 0.0
    for step, loss in train(
        model, step_loss, steps=options.steps, lr=options.lr, folder=options.folder, ema_decay=0.998
    ):
        mean += loss / 100
        if step % 100 == 0:
            print(f"{step},{mean:.4f},{time.monotonic() - started:.0f}", flush=True)
            mean = 0.0
    state = torch.load(options.folder / "checkpoint.pt", weights_only=True)
    model.load_state_dict({**state["module"], **state["average"]})
    for title, new in (("combinations pocket has seen", False), ("those held out from it", True)):
        print(f"{title}, 1000 new pictures:", accuracies(model, test_scenes(1000, new=new)))
    save(model, options.output)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: {state['step']} steps, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
