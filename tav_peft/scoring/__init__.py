"""Score edits: each score is a short function in a module of its own, and says its model and its rule."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tav_peft.errors import TavError
from tav_peft.pocket.clips import PocketClip
from tav_peft.scoring import alignment, consistency, pixels, warping
from tav_peft.scoring.clip_model import POCKET, ClipModel, shared
from tav_peft.scoring.on_pocket import pocket_scores, recognised
from tav_peft.scoring.result import Score
from tav_peft.video.clip import Clip

__all__ = ["POCKET", "ClipModel", "Score", "score"]


def score(
    edit: Clip,
    prompt: str,
    *,
    source: Clip | None = None,
    caption: str | None = None,
    mask: Clip | None = None,
    reconstruction: Clip | None = None,
    ideal: PocketClip | None = None,
    clip_model: ClipModel | str | Path = POCKET,
    pick_model: ClipModel | str | Path | None = None,
) -> list[Score]:
    """Score an edited clip by everything that what is given allows.

    Frame consistency and textual alignment need the edit and its prompt only. Warp error follows the motion of the
    `source`, or of the edit itself. Directional similarity needs the source and its `caption`, background PSNR the
    source and a `mask` that is white where the edit was wanted, reconstruction PSNR the source and its
    `reconstruction`, PickScore a checkpoint of it. `ideal` is what an edit of a pocket clip should be.

    Raises:
        TavError: when clips do not go together, or a model cannot be loaded.

    """
    clip = _loaded(clip_model)
    frames, text = clip.images(edit.pixels), clip.texts([prompt])
    scores = [
        Score(
            "textual_alignment", alignment.textual_alignment(frames, text), alignment.TEXTUAL, "", clip.name
        )
    ]
    if edit.frames > 1:
        scores += _of_motion(edit, source, frames, clip.name)
    if pick_model is not None:
        pick = _loaded(pick_model)
        value = alignment.pick_score(pick.images(edit.pixels), pick.texts([prompt]), pick.scale)
        scores.append(Score("pick_score", value, alignment.PICK, "", pick.name))
    if source is not None:
        scores += _against_source(edit, source, mask, reconstruction)
        if caption is not None and caption != prompt:
            value = alignment.directional_similarity(
                frames, clip.images(source.pixels), text, clip.texts([caption])
            )
            scores.append(Score("directional_similarity", value, alignment.DIRECTIONAL, "", clip.name))
    elif mask is not None or reconstruction is not None:
        raise TavError("A mask and a reconstruction are compared with the source. Give the source too.")
    if ideal is not None:
        scores += pocket_scores(edit, ideal)
        if clip.name == POCKET:
            scores += recognised(edit, ideal, clip)
    return scores


def _of_motion(edit: Clip, source: Clip | None, frames: Tensor, model: str) -> list[Score]:
    of = "edit itself" if source is None else "source"
    return [
        Score("frame_consistency_all", consistency.all_pairs(frames), consistency.ALL_PAIRS, "", model),
        Score(
            "frame_consistency_consecutive",
            consistency.consecutive_pairs(frames),
            consistency.CONSECUTIVE,
            "",
            model,
        ),
        Score(
            "warp_error",
            warping.warp_error(edit, source),
            warping.RULE.format(of=of),
            "e-3",
            warping.FLOW,
            "lower",
        ),
    ]


def _against_source(edit: Clip, source: Clip, mask: Clip | None, reconstruction: Clip | None) -> list[Score]:
    scores = []
    if mask is not None:
        value = pixels.background_psnr(edit, source, mask)
        scores.append(Score("background_psnr", value, pixels.BACKGROUND, "dB"))
    if reconstruction is not None:
        value = pixels.psnr(reconstruction, source)
        scores.append(Score("reconstruction_psnr", value, f"reconstruction to source, {pixels.PSNR}", "dB"))
    return scores


def _loaded(model: ClipModel | str | Path) -> ClipModel:
    return model if isinstance(model, ClipModel) else shared(str(model))
