"""Train a small classifier of pocket's world and let it judge what pocket draws from prompts.

    python training/judge.py work/judge.pt --prompts 192

It sees other scenes than pocket did, held-out combinations too, and says object, background and style. It is a check
for the model card; it is not shipped. What pocket's own CLIP, which is, makes of the same pictures is printed too, and
of pictures of two objects, of which the second may hide the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from samples import draw
from tav_peft.bases import locate
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, STYLES, Scene, held_out, random_scene, render
from tav_peft.scoring.clip_model import ClipModel
from train_unet import overlapping_scene

CLASSES = (tuple(OBJECTS), tuple(BACKGROUNDS), tuple(STYLES))
FIRST_SEED = 7_000_000  # far from the seeds that pocket was trained on


class Judge(nn.Module):
    """Four convolutions, pooled over the picture, and one linear layer for each question."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 32, 64, 96, 128), []
        for left, right in itertools.pairwise(widths):
            layers += [nn.Conv2d(left, right, 4, 2, 1), nn.GroupNorm(8, right), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(2 * widths[-1], len(names)) for names in CLASSES)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Score the classes of each question for pictures (count, 3, 64, 64) in [-1, 1]."""
        features = self.body(pictures).flatten(2)
        pooled = torch.cat([features.mean(dim=2), features.amax(dim=2)], dim=1)
        return [head(pooled) for head in self.heads]


def scenes_of(seed: int, count: int) -> list[Scene]:
    """Draw scenes of one object, any combination."""
    rng, scenes = random.Random(seed), []
    while len(scenes) < count:
        scene = random_scene(rng, training=False)
        if len(scene.actors) == 1:
            scenes.append(scene)
    return scenes


def tensor_of(pictures: list[np.ndarray]) -> Tensor:
    """Stack uint8 pictures to (count, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def labels_of(scenes: list[Scene]) -> list[Tensor]:
    """Give the right class of each question."""
    rows = [(s.actors[0].name, s.background, s.style) for s in scenes]
    return [torch.tensor([names.index(row[i]) for row in rows]) for i, names in enumerate(CLASSES)]


def train_judge(steps: int) -> Judge:
    """Train on fresh scenes, with a little blur and noise so that it does not live on single pixels."""
    torch.manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        scenes = scenes_of(FIRST_SEED + step, 32)
        pictures = tensor_of([render(s) for s in scenes])
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = torch.lerp(pictures, blurred, torch.rand(32, 1, 1, 1)) + 0.05 * torch.randn_like(pictures)
        answers = judge(pictures)
        loss = sum(F.cross_entropy(a, y) for a, y in zip(answers, labels_of(scenes), strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def accuracies(judge: Judge, pictures: Tensor, scenes: list[Scene]) -> list[float]:
    """Share of right answers for object, background and style."""
    pairs = zip(judge(pictures), labels_of(scenes), strict=True)
    return [round((answer.argmax(1) == right).float().mean().item(), 3) for answer, right in pairs]


def renamed(scene: Scene, which: int) -> list[Scene]:
    """List the scene with each object of the world in the place of one of its own, but none twice."""
    before, actor, after = scene.actors[:which], scene.actors[which], scene.actors[which + 1 :]
    kept = {other.name for other in before + after}
    actors = [dataclasses.replace(actor, name=name) for name in OBJECTS if name not in kept]
    return [dataclasses.replace(scene, actors=(*before, each, *after)) for each in actors]


def recognised(pictures: list[np.ndarray], scenes: list[Scene]) -> list[float]:
    """Share of pictures that pocket's CLIP finds nearer to their prompt than to it with another object, and so on.

    The first numbers are those of the scenes' objects, in the order of the prompt; then background and style.
    """
    clip, rights = ClipModel.load("pocket-clip"), []
    for picture, scene in zip(pictures, scenes, strict=True):
        others = (
            *(renamed(scene, which) for which in range(len(scene.actors))),
            [scene.edited(background=name) for name in BACKGROUNDS],
            [scene.edited(style=name) for name in STYLES],
        )
        texts = [list(dict.fromkeys([scene.caption, *(other.caption for other in kind)])) for kind in others]
        rights.append(
            [int((clip.images(picture[None]) @ clip.texts(kind).T).argmax()) == 0 for kind in texts]
        )
    return [round(float(share), 3) for share in np.mean(rights, axis=0)]


def main() -> None:
    """Train (or load) the judge, say how good it is on rendered scenes, and judge pocket's own pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--model", default=locate("pocket"))
    options = parser.parse_args()
    if options.file.exists():
        judge = Judge().eval()
        judge.load_state_dict(torch.load(options.file, weights_only=True))
    else:
        judge = train_judge(options.steps)
        options.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(judge.state_dict(), options.file)
    rendered = scenes_of(1, 500)
    print(
        "object, background, style on rendered scenes:",
        accuracies(judge, tensor_of([render(s) for s in rendered]), rendered),
    )
    if not options.prompts:
        return
    pipe = StableDiffusionPipeline.from_pretrained(options.model)
    asked = scenes_of(2, options.prompts)
    drawn = draw(pipe, [s.caption for s in asked], guidance=options.guidance, steps=25, seed=0)
    pictures = tensor_of([np.asarray(image) for image in drawn])
    print(
        f"on pocket's own, {len(asked)} prompts, guidance {options.guidance:g}:",
        accuracies(judge, pictures, asked),
    )
    print("by pocket's CLIP, of the same:", recognised([np.asarray(image) for image in drawn], asked))
    print("by pocket's CLIP, of the same prompts rendered:", recognised([render(s) for s in asked], asked))
    rng = random.Random(FIRST_SEED)
    pairs = [overlapping_scene(rng) for _ in asked]
    drawn = draw(pipe, [s.caption for s in pairs], guidance=options.guidance, steps=25, seed=0)
    print("of two objects, by the CLIP:", recognised([np.asarray(image) for image in drawn], pairs))
    print("of two objects, rendered:", recognised([render(s) for s in pairs], pairs))
    new = [i for i, s in enumerate(asked) if held_out(s.actors[0].name, s.background, s.style)]
    print(
        f"of which {len(new)} held-out combinations:",
        accuracies(judge, pictures[new], [asked[i] for i in new]),
    )


if __name__ == "__main__":
    main()
