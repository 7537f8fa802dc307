"""Pocket's world: scenes of one or two objects on a background in a style, drawn as 64x64 pictures."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from importlib.resources import files
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Picture: TypeAlias = Any  # numpy arrays; uint8 where a public function returns one

PIXELS = 64
DRAWN = 2 * PIXELS  # backgrounds are drawn at twice the size and reduced, so that edges are smooth

OBJECTS = (
    "rabbit", "panda", "fox", "tiger", "elephant", "penguin", "pig", "duck",
    "frog", "car", "bus", "tractor", "man", "robot", "astronaut", "watermelon",
)  # fmt: skip
BACKGROUNDS = {
    "grass": "on the grass",
    "snow": "on the snow",
    "beach": "on the beach",
    "road": "on the road",
    "desert": "in the desert",
    "moon": "on the moon",
    "forest": "in the forest",
    "water": "on the water",
}
STYLES = {
    "plain": "",
    "cartoon": ", cartoon style",
    "pixel": ", pixel art style",
    "sketch": ", pencil sketch style",
    "sunset": ", at sunset",
}


@dataclasses.dataclass(frozen=True)
class Actor:
    """One object in a scene: where its centre is and how large it is, in pixels of the 64x64 picture.

    `sprite` is a picture of its own, with transparency; without one it looks as the world's object of its name.
    """

    name: str
    x: float
    y: float
    size: float
    faces_right: bool = False
    sprite: Image.Image | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything one picture shows; `detail` seeds the background's clouds, hills and hues."""

    actors: tuple[Actor, ...]
    background: str
    style: str = "plain"
    detail: int = 0

    @property
    def caption(self) -> str:
        """Say the scene in the form of the paper's captions."""
        names = " and ".join(f"{_article(actor.name)} {actor.name}" for actor in self.actors)
        verb = "is" if len(self.actors) == 1 else "are"
        return f"{names} {verb} moving {BACKGROUNDS[self.background]}{STYLES[self.style]}"

    def moved(self, x: float, y: float) -> Scene:
        """Return the scene with its first object at another place."""
        first = dataclasses.replace(self.actors[0], x=x, y=y)
        return dataclasses.replace(self, actors=(first, *self.actors[1:]))

    def edited(
        self,
        *,
        name: str | None = None,
        sprite: Image.Image | None = None,
        background: str | None = None,
        style: str | None = None,
    ) -> Scene:
        """Return the ideal edit: the same places and path, another object (or sprite), background or style."""
        first = self.actors[0]
        if name is not None:
            first = dataclasses.replace(first, name=name, sprite=sprite)
        return dataclasses.replace(
            self,
            actors=(first, *self.actors[1:]),
            background=background or self.background,
            style=style or self.style,
        )


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def held_out(name: str, background: str, style: str) -> bool:
    """Tell whether a combination is kept out of all training (about one in ten), for tests to use."""
    pair = hashlib.sha256(f"{name}/{background}".encode()).digest()[0] % 12 == 0
    return pair or hashlib.sha256(f"{name}/{style}/{background}".encode()).digest()[0] % 24 == 0


def random_scene(rng: random.Random, *, training: bool = True) -> Scene:
    """Draw a scene's content; in training never a held-out combination."""
    while True:
        name, background = rng.choice(OBJECTS), rng.choice(tuple(BACKGROUNDS))
        style = "plain" if rng.random() < 0.4 else rng.choice(tuple(STYLES)[1:])
        if not (training and held_out(name, background, style)):
            break
    actors = [_random_actor(rng, name)]
    if rng.random() < 0.06:
        other = rng.choice([o for o in OBJECTS if o != name])
        left, right = rng.uniform(15, 20), rng.uniform(44, 49)
        actors = [
            dataclasses.replace(actors[0], x=left, size=rng.uniform(22, 28)),
            dataclasses.replace(_random_actor(rng, other), x=right, size=rng.uniform(22, 28)),
        ]
    return Scene(tuple(actors), background, style, rng.randrange(1 << 30))


def _random_actor(rng: random.Random, name: str) -> Actor:
    size = rng.uniform(24, 40)
    half = size / 2
    x = rng.uniform(half - 4, PIXELS - half + 4)
    y = rng.uniform(max(half, 26), PIXELS - half - 1)
    return Actor(name, x, y, size, rng.random() < 0.5)


# -- drawing ------------------------------------------------------------------------------------------

_OUTLINED = {"cartoon": 3.2, "sketch": 1.0}  # strength of the dark line around objects


@functools.cache
def _sprites() -> dict[str, Image.Image]:
    folder = files("tav_peft.pocket")
    with (folder / "sprites.png").open("rb") as file:
        atlas = Image.open(file).convert("RGBa")
    index = json.loads((folder / "sprites.json").read_text())
    return {name: atlas.crop((0, top, w, top + h)) for name, (top, w, h) in index.items()}


def _sprite(actor: Actor) -> Image.Image:
    """Place an actor on a transparent picture, at a fraction of a pixel."""
    sprite = _sprites()[actor.name] if actor.sprite is None else actor.sprite.convert("RGBa")
    scale = max(sprite.size) / actor.size
    if actor.faces_right:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = sprite.width / scale, sprite.height / scale
    left, top = actor.x - width / 2, actor.y + actor.size / 2 - height  # feet stay where they were
    # two pictures wide, then reduced: PIL's affine samples points and would alias at this scale
    box = (-left * scale, 0, scale)
    big = sprite.transform(
        (DRAWN, DRAWN),
        Image.Transform.AFFINE,
        (scale / 2, 0, box[0], 0, scale / 2, -top * scale),
        Image.Resampling.BILINEAR,
    )
    return big.reduce(2)


def render(scene: Scene) -> Picture:
    """Draw a scene as uint8 RGB, shape (64, 64, 3)."""
    rng = random.Random(scene.detail)
    picture = np.asarray(_background(scene.background, rng), np.float32)
    for actor in scene.actors:
        sprite = np.asarray(_sprite(actor), np.float32)
        alpha = sprite[..., 3:] / 255
        shadow = _shadow(actor)[..., None]
        picture = picture * (1 - 0.35 * shadow * (1 - alpha))
        if scene.style in _OUTLINED:
            outline = Image.fromarray(sprite[..., 3].astype(np.uint8))
            rim = np.asarray(outline.filter(ImageFilter.GaussianBlur(1.3)), np.float32) / 255
            line = np.clip(_OUTLINED[scene.style] * rim, 0, 1)[..., None] * (1 - alpha)
            picture = picture * (1 - line) + 24 * line
        picture = picture * (1 - alpha) + sprite[..., :3]
    picture = _STYLERS[scene.style](picture)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def cut_out(actor: Actor) -> Picture:
    """Outline of an actor: how much it covers each pixel, (64, 64) in 0..1."""
    return np.asarray(_sprite(actor), np.float32)[..., 3] / 255


def _shadow(actor: Actor) -> Picture:
    rows, columns = np.mgrid[0:PIXELS, 0:PIXELS].astype(np.float32) + 0.5
    foot = actor.y + actor.size / 2 - 1
    distance = ((columns - actor.x) / (0.45 * actor.size)) ** 2 + ((rows - foot) / 3.2) ** 2
    return np.clip(1.6 * (1 - distance), 0, 1)


def _hue(rng: random.Random, colour: tuple[int, int, int], spread: int = 10) -> tuple[int, ...]:
    shift = rng.uniform(-spread, spread)
    return tuple(int(np.clip(c + shift + rng.uniform(-4, 4), 0, 255)) for c in colour)


def _ground(
    rng: random.Random, sky: tuple[int, int, int], low: tuple[int, int, int], ground: tuple[int, int, int]
) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """Start a picture: a sky that pales towards the horizon, and the ground below it."""
    horizon = rng.randint(36, 56)
    top, bottom = np.array(_hue(rng, sky)), np.array(_hue(rng, low))
    ramp = np.linspace(0, 1, horizon)[:, None]
    pixels = np.empty((DRAWN, DRAWN, 3), np.uint8)
    pixels[:horizon] = ((1 - ramp) * top + ramp * bottom)[:, None]
    near = np.linspace(1.0, 0.88, DRAWN - horizon)[:, None]
    pixels[horizon:] = (near * np.array(_hue(rng, ground)))[:, None]
    image = Image.fromarray(pixels)
    return image, ImageDraw.Draw(image), horizon


def _clouds(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int, colour: str) -> None:
    for _ in range(rng.randint(1, 2)):
        x, y = rng.randint(0, DRAWN), rng.randint(4, max(6, horizon - 22))
        draw.ellipse((x - 16, y, x + 16, y + 11), fill=colour)
        draw.ellipse((x - 6, y - 6, x + 24, y + 9), fill=colour)


def _background(name: str, rng: random.Random) -> Image.Image:
    return _PAINTERS[name](rng).reduce(2)


def _grass(rng: random.Random) -> Image.Image:
    image, draw, horizon = _ground(rng, (110, 190, 250), (200, 232, 252), (96, 186, 72))
    _clouds(draw, rng, horizon, "#ffffff")
    for _ in range(9):
        x, y = rng.randint(0, DRAWN), rng.randint(horizon + 8, DRAWN - 6)
        for lean in (-4, 0, 4):
            draw.line((x, y, x + lean, y - 8), fill="#3f8a34", width=3)
    return image


def _snow(rng: random.Random) -> Image.Image:
    image, draw, horizon = _ground(rng, (150, 186, 224), (216, 230, 244), (240, 246, 252))
    for _ in range(2):
        x, rise, half = rng.randint(0, DRAWN), rng.randint(20, 32), rng.randint(28, 44)
        draw.polygon([(x - half, horizon), (x, horizon - rise), (x + half, horizon)], fill="#8fa6c4")
        tip, cap = 0.4, horizon - 0.6 * rise
        draw.polygon(
            [(x - half * tip, cap), (x, horizon - rise), (x + half * tip, cap)],
            fill="#f4f8fc",
        )
    for _ in range(5):
        x, y = rng.randint(0, DRAWN), rng.randint(horizon + 14, DRAWN - 4)
        draw.arc((x - 22, y - 5, x + 22, y + 9), 190, 350, fill="#b9cde2", width=3)
    return image


def _beach(rng: random.Random) -> Image.Image:
    image, draw, horizon = _ground(rng, (96, 196, 244), (190, 236, 250), (240, 212, 148))
    shore = horizon + rng.randint(14, 20)
    draw.rectangle((0, horizon, DRAWN, shore), fill=_hue(rng, (36, 132, 196)))
    wave = [(x, shore + 4 * np.sin(x / 11 + rng.random())) for x in range(0, DRAWN + 8, 8)]
    draw.line(wave, fill="#ffffff", width=5)
    x = rng.choice((16, 30, DRAWN - 30, DRAWN - 16))
    draw.line((x, shore + 16, x + 5, horizon - 22), fill="#8a5a2b", width=6)
    for angle in range(0, 360, 60):
        tip = (x + 5 + 22 * np.cos(np.radians(angle)), horizon - 22 + 11 * np.sin(np.radians(angle)))
        draw.line((x + 5, horizon - 22, *tip), fill="#2d8f4e", width=6)
    return image


def _road(rng: random.Random) -> Image.Image:
    image, draw, horizon = _ground(rng, (150, 200, 240), (214, 230, 240), (104, 106, 112))
    x = -rng.randint(0, 16)
    while x < DRAWN:
        width, height = rng.randint(14, 26), rng.randint(12, 34)
        draw.rectangle((x, horizon - height, x + width, horizon), fill=_hue(rng, (150, 126, 118), 24))
        x += width + rng.randint(0, 10)
    draw.rectangle((0, horizon, DRAWN, horizon + 7), fill="#c9c4ba")
    y, shift = rng.randint(horizon + 34, DRAWN - 22), rng.randint(0, 40)
    for x in range(-shift, DRAWN, 40):
        draw.rectangle((x, y, x + 22, y + 5), fill="#f6e27a")
    return image


def _desert(rng: random.Random) -> Image.Image:
    image, draw, horizon = _ground(rng, (240, 190, 120), (252, 226, 172), (222, 160, 82))
    for tone in ("#cf8f47", "#e3aa63"):
        x, half = rng.randint(0, DRAWN), rng.randint(40, 64)
        draw.pieslice((x - half, horizon - 18, x + half, horizon + 26), 180, 360, fill=tone)
    x, y = rng.choice((14, 26, DRAWN - 26, DRAWN - 14)), horizon + rng.randint(10, 20)
    draw.line((x, y, x, y - 34), fill="#3c8c4a", width=9)
    draw.line((x, y - 14, x - 11, y - 14, x - 11, y - 25), fill="#3c8c4a", width=6)
    draw.line((x, y - 19, x + 11, y - 19, x + 11, y - 30), fill="#3c8c4a", width=6)
    return image


def _moon(rng: random.Random) -> Image.Image:
    image, draw, horizon = _ground(rng, (14, 14, 36), (34, 32, 64), (176, 176, 184))
    for _ in range(14):
        x, y = rng.randint(0, DRAWN), rng.randint(0, horizon - 6)
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#f4f4ff")
    x, y = rng.randint(14, DRAWN - 14), rng.randint(12, 22)
    draw.ellipse((x - 11, y - 11, x + 11, y + 11), fill="#3f83d6")
    draw.ellipse((x - 6, y - 8, x + 4, y + 1), fill="#62b567")
    for _ in range(6):
        x, y, half = rng.randint(0, DRAWN), rng.randint(horizon + 10, DRAWN), rng.randint(6, 14)
        draw.ellipse((x - half, y - half // 2, x + half, y + half // 2), fill="#8c8c98")
    return image


def _forest(rng: random.Random) -> Image.Image:
    image, draw, horizon = _ground(rng, (120, 176, 160), (176, 212, 176), (92, 112, 56))
    x = -rng.randint(0, 14)
    while x < DRAWN + 10:
        height, half = rng.randint(38, 56), rng.randint(11, 16)
        base = horizon + rng.randint(2, 8)
        draw.rectangle((x - 3, base - 10, x + 3, base), fill="#5c4128")
        green = _hue(rng, (30, 96, 54), 14)
        draw.polygon([(x - half, base - 8), (x, base - height), (x + half, base - 8)], fill=green)
        x += rng.randint(15, 24)
    return image


def _water(rng: random.Random) -> Image.Image:
    image, draw, horizon = _ground(rng, (156, 206, 244), (220, 238, 250), (44, 116, 200))
    _clouds(draw, rng, horizon, "#ffffff")
    for _ in range(11):
        x, y = rng.randint(-10, DRAWN), rng.randint(horizon + 6, DRAWN - 2)
        draw.arc((x, y - 5, x + 18, y + 5), 20, 160, fill="#a5d2f6", width=3)
        draw.arc((x + 16, y - 5, x + 34, y + 5), 20, 160, fill="#a5d2f6", width=3)
    return image


_PAINTERS = {
    "grass": _grass,
    "snow": _snow,
    "beach": _beach,
    "road": _road,
    "desert": _desert,
    "moon": _moon,
    "forest": _forest,
    "water": _water,
}


# -- styles: (64, 64, 3) float in 0..255 -> the same ---------------------------------------------------


def _plain(picture: Picture) -> Picture:
    return picture


def _cartoon(picture: Picture) -> Picture:
    grey = picture.mean(axis=2, keepdims=True)
    vivid = np.clip(128 + 1.15 * (grey + 1.6 * (picture - grey) - 128), 0, 255)
    return np.round(vivid / 51) * 51


def _pixel(picture: Picture) -> Picture:
    blocks = picture.reshape(PIXELS // 4, 4, PIXELS // 4, 4, 3).mean(axis=(1, 3))
    return blocks.repeat(4, axis=0).repeat(4, axis=1)


def _sketch(picture: Picture) -> Picture:
    grey = picture @ np.array([0.3, 0.59, 0.11], np.float32)
    down, right = np.diff(grey, axis=0, append=grey[-1:]), np.diff(grey, axis=1, append=grey[:, -1:])
    edges = Image.fromarray(np.clip(1.7 * np.hypot(down, right), 0, 200).astype(np.uint8))
    lines = 1.5 * np.asarray(edges.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
    paper = 130 + 0.47 * grey
    return np.clip(paper - lines, 0, 255)[..., None] * np.array([1.0, 0.985, 0.94], np.float32)


def _sunset(picture: Picture) -> Picture:
    rows = np.linspace(1, 0, PIXELS, dtype=np.float32)[:, None, None]
    glow = np.array([255, 120, 60], np.float32)
    tinted = picture * np.array([0.92, 0.6, 0.55], np.float32)
    return tinted * (1 - 0.45 * rows) + glow * 0.45 * rows + 12


_STYLERS = {
    "plain": _plain,
    "cartoon": _cartoon,
    "pixel": _pixel,
    "sketch": _sketch,
    "sunset": _sunset,
}
