"""Frame consistency: how alike a CLIP finds a clip's frames. Papers use one name for two rules, which are kept apart."""

from __future__ import annotations

from torch import Tensor

from tav_peft.errors import TavError

ALL_PAIRS = "mean cosine of all pairs of different frames (Tune-A-Video, LOVEU-TGVE's CLIPFrame), times 100"
CONSECUTIVE = "mean cosine of each frame and the next (FateZero's Tem-Con, ControlVideo), times 100"


def all_pairs(frames: Tensor) -> float:
    """Mean cosine of all pairs of different frames, of unit vectors (frames, features), times 100.

    Wu et al. 2023, section 5.2; LOVEU-TGVE-2023 computes the same without the factor.

    Raises:
        TavError: for a single frame.

    """
    count = _at_least_two(frames)
    # the sum over all pairs is the squared length of the sum; each frame's cosine with itself is its squared length
    cosines = frames.double().sum(dim=0).square().sum() - frames.double().square().sum()
    return 100 * float(cosines) / (count * (count - 1))


def consecutive_pairs(frames: Tensor) -> float:
    """Mean cosine of each frame and the next, of unit vectors (frames, features), times 100.

    Qi et al. 2023 (FateZero), section 4; Zhang et al. 2023 (ControlVideo).

    Raises:
        TavError: for a single frame.

    """
    _at_least_two(frames)
    return 100 * float((frames[:-1] * frames[1:]).sum(dim=1).double().mean())


def _at_least_two(frames: Tensor) -> int:
    if len(frames) < 2:
        raise TavError("One frame has no consistency with others. Give a clip of two frames or more.")
    return len(frames)
