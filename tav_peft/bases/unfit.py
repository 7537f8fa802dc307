"""What is given as a base and is none: inpainting models, LoRAs, parts of a base, and the reason to name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tav_peft.bases.ldm_keys import UNET, VAE

PLAIN = "Use the plain text-to-image model it was made from."
WHOLE = "Give a checkpoint with the UNet, the VAE and the text encoder in it."
_MADE_FOR = "Give the base it was made for."
_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "a model that edits images (InstructPix2Pix), or an upscaler",
    9: "an inpainting model",
}
# what a tensor's name gives away: a pattern, what the file is, and what to do; the first that is found counts
_SIGNS = (
    (r"(^|[._])(lora|hada|lokr|oft)[_.]|\.alpha$", "a LoRA or the like, a change to a base", _MADE_FOR),
    (r"\.attn_temp\.|\.diff$", "an adapter of a tuned clip", _MADE_FOR),
    (r"^control_model\.|controlnet_|input_hint_block\.", "a ControlNet", _MADE_FOR),
    (r"\.time_stack\.", "a video model", PLAIN),
    (r"motion_modules\.", "a motion module of AnimateDiff", _MADE_FOR),
    (r"joint_blocks\.|double_blocks\.|single_blocks\.", "a transformer, such as Stable Diffusion 3 or Flux",
     "Use a Stable Diffusion 1.x, 2.x or XL base, which has a UNet."),
    (r"^conditioner\.embedders\.0\.model\.", "the refiner of SDXL", "Use the SDXL base model."),
    (r"^edm_(mean|vpred)", "a model with the noise levels of EDM (Playground 2.5, CosXL)", "Use a plain SDXL base."),
    (r"^embedder\.model\.|^noise_augmentor\.", "an unCLIP model, which reads images", PLAIN),
)  # fmt: skip
# what a file without a UNet may be
_PARTS = (
    (rf"^({re.escape(VAE)})?decoder\.", "a VAE alone", WHOLE),
    (r"^(down|up)_blocks\.", "one part of a base in diffusers' names", "Give the folder with model_index.json."),
    (r"(token_embedding|positional_embedding)", "a text encoder alone", WHOLE),
    (r"^(emb_params|clip_[lg]|\*)$|^string_to", "a textual inversion, a word for a base", _MADE_FOR),
)  # fmt: skip


def reason_of_channels(channels: int) -> str | None:
    """Say why a UNet that takes so many channels is no base, or None for the four of a plain one."""
    if channels == 4:
        return None
    what = _CHANNELS.get(channels, "a model with inputs of its own")
    return f"{what}: its UNet takes {channels} channels, a base takes 4. {PLAIN}"


def reason_of_names(names: Iterable[str]) -> str | None:
    """Say why a single file with tensors of these names is no base, or None where none of them speaks against it."""
    names = list(names)
    signs: tuple[tuple[str, str, str], ...] = _SIGNS
    if not any(name.startswith(UNET) for name in names):
        signs += (*_PARTS, ("", f"without a UNet in the layout of Stable Diffusion ({UNET}…)", WHOLE))
    for pattern, what, fix in signs:
        if any(re.search(pattern, name) for name in names):
            return f"{what}. {fix}"
    return None if names else f"empty. {WHOLE}"
