"""The subject of the DreamBooth: a toy robot that pocket never saw, and a few pictures of it.

It is drawn in colours of the world's own objects, since pocket's autoencoder blurs others (violet turns grey).
"""

from __future__ import annotations

from PIL import Image, ImageDraw

from tav_peft.pocket.world import Actor, Scene

CLASS = "robot"  # the class noun; pocket knows another robot by it
RED, YELLOW, WHITE, BLACK = "#f8312f", "#ffb02e", "#ffffff", "#212121"
SIDE, FINE = 96, 4  # drawn FINE times as large, then reduced, so that edges are smooth

# background, x, y, size, seed of the background's details; the other backgrounds are never seen with the subject
PLACES = (
    ("grass", 20, 42, 34, 101),
    ("grass", 44, 38, 28, 102),
    ("snow", 38, 40, 38, 103),
    ("road", 24, 36, 30, 104),
    ("forest", 42, 43, 36, 105),
    ("water", 30, 37, 32, 106),
)


def draw_subject() -> Image.Image:
    """Draw the toy robot as RGBA on nothing: one large eye, red head and arms, yellow body, two wheels."""
    picture = Image.new("RGBA", (SIDE * FINE, SIDE * FINE))
    pen = ImageDraw.Draw(picture)

    def box(left: float, top: float, right: float, bottom: float, colour: str, radius: float) -> None:
        corners = [FINE * v for v in (left, top, right, bottom)]
        pen.rounded_rectangle(corners, FINE * radius, fill=colour)

    def disc(x: float, y: float, radius: float, colour: str) -> None:
        pen.ellipse([FINE * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=colour)

    disc(48, 7, 7, YELLOW)
    box(16, 12, 80, 54, RED, 10)
    disc(48, 33, 17, WHITE)
    disc(48, 33, 9, BLACK)
    box(4, 54, 20, 80, RED, 6)
    box(76, 54, 92, 80, RED, 6)
    box(18, 54, 78, 82, YELLOW, 4)
    for x in (32, 64):
        disc(x, 83, 13, BLACK)
        disc(x, 83, 6, WHITE)
    small = picture.convert("RGBa").reduce(FINE).convert("RGBA")
    return small.crop(small.getchannel("A").getbbox())


def subject_scenes(name: str) -> list[Scene]:
    """List the scenes of the subject's pictures, captioned with its name ("a zwx robot is moving on the snow")."""
    sprite = draw_subject()
    return [
        Scene((Actor(name, x, y, size, sprite=sprite),), background, detail=detail)
        for background, x, y, size, detail in PLACES
    ]
