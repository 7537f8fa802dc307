"""How well frames fit a prompt, and whether they changed as the prompt did."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tav_peft.errors import TavError

TEXTUAL = "mean cosine of each frame and the prompt, times 100 (Tune-A-Video, LOVEU-TGVE; CLIPScore without its 2.5)"
PICK = "mean cosine of each frame and the prompt, times the model's learnt scale (PickScore)"
DIRECTIONAL = (
    "mean cosine of the frames' change from the source and the prompt's change from the source's caption, "
    "-1 to 1 (StyleGAN-NADA, InstructPix2Pix)"
)


def textual_alignment(frames: Tensor, prompt: Tensor) -> float:
    """Mean cosine of unit vectors of frames (frames, features) and of the prompt (1, features), times 100.

    Wu et al. 2023, section 5.2. Hessel et al. 2021 (CLIPScore) have 2.5 in place of 100 and cut off below 0.
    """
    return 100 * float((frames @ prompt.T).double().mean())


def pick_score(frames: Tensor, prompt: Tensor, scale: float) -> float:
    """Mean cosine of unit vectors of frames and of the prompt, times the learnt scale of a preference model.

    Kirstain et al. 2023, eq. 2, before the softmax over several pictures; so LOVEU-TGVE-2023 reports it.
    """
    return scale * float((frames @ prompt.T).double().mean())


def directional_similarity(frames: Tensor, source: Tensor, prompt: Tensor, caption: Tensor) -> float:
    """Mean cosine between the change of each frame and that of the text, in -1 to 1.

    `frames` and `source` are unit vectors (frames, features), `prompt` and `caption` (1, features). Gal et al. 2022
    (StyleGAN-NADA), eq. 3, as a similarity; Brooks et al. 2023 (InstructPix2Pix), section 4. A frame that has not
    changed has no direction and counts as 0.

    Raises:
        TavError: when prompt and caption say the same, or the clips differ in length.

    """
    if len(frames) != len(source):
        raise TavError(
            f"The edit has {len(frames)} frames, its source {len(source)}. Give the frames it was made of."
        )
    wanted = prompt - caption
    if float(wanted.norm()) < 1e-6:
        raise TavError("Prompt and source caption are the same: there is no direction to compare with.")
    return float(F.cosine_similarity(frames - source, wanted, dim=-1, eps=1e-8).double().mean())
