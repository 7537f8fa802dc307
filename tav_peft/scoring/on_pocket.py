"""Scores that only a drawn world allows: the distance from the known path, and the likeness to the ideal edit."""

from __future__ import annotations

from tav_peft.pocket.clips import PocketClip
from tav_peft.pocket.motion import measure
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, STYLES
from tav_peft.scoring.clip_model import ClipModel
from tav_peft.scoring.pixels import psnr, ssim
from tav_peft.scoring.result import Score
from tav_peft.video.clip import Clip

RENDERER = "pocket's renderer"
MOTION = (
    "median over frames of the distance of the object, found where its outline fits best, from the known path"
)
RIGHT_OBJECT = "frames in which no other object of the world fits better at the place found"
IDEAL = "to the ideal edit as the renderer draws it"
RECOGNISED = "frames that fit the prompt better than the prompt with another {}"


def pocket_scores(edit: Clip, ideal: PocketClip) -> list[Score]:
    """Score an edit of a pocket clip, frames of 64x64, against the ideal edit.

    The motion-path error is in pixels of 64; PSNR and SSIM hold every pixel against the drawn ideal.
    """
    drawn, motion = ideal.render(), measure(edit, ideal)
    return [
        Score("motion_error", motion.median, MOTION, "px of 64", RENDERER, "lower"),
        Score("right_object", 100 * motion.right_object, RIGHT_OBJECT, "%", RENDERER),
        Score("ideal_psnr", psnr(edit, drawn), f"PSNR {IDEAL}", "dB", RENDERER),
        Score("ideal_ssim", ssim(edit, drawn), f"SSIM {IDEAL}", "", RENDERER),
    ]


def recognised(edit: Clip, ideal: PocketClip, clip: ClipModel) -> list[Score]:
    """Tell in which share of the frames a CLIP finds the asked object, the asked background and the asked style.

    The prompt is held against itself with each of the world's other objects (or backgrounds, or styles) in its place.
    """
    frames, scores = clip.images(edit.pixels), []
    alternatives = {
        "object": [ideal.edited(name=name) for name in OBJECTS],
        "background": [ideal.edited(background=name) for name in BACKGROUNDS],
        "style": [ideal.edited(style=name) for name in STYLES],
    }
    for kind, others in alternatives.items():
        prompts = dict.fromkeys([ideal.caption, *(other.caption for other in others)])  # the asked one first
        fits = frames @ clip.texts(list(prompts)).T
        share = 100 * float((fits.argmax(dim=1) == 0).double().mean())
        scores.append(Score(f"recognised_{kind}", share, RECOGNISED.format(kind), "%", clip.name))
    return scores
