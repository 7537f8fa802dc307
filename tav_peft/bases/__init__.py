"""The base model an adapter belongs to: where it is found, and how it is recognised."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard, try_to_load_from_cache
from yaml import YAMLError

from tav_peft.errors import BaseModelError

POCKET = "pocket"
_POCKET_FOLDER = Path(str(files("tav_peft.pocket") / "model"))


def locate(base: str | Path) -> str:
    """Turn a base's name into a folder, a file or a hub id: `pocket` is the model that this package carries.

    Raises:
        BaseModelError: when it is neither a folder in diffusers layout nor a file, nor looks like a hub id.

    """
    name = str(base)
    if name == POCKET:
        if not (_POCKET_FOLDER / "model_index.json").exists():
            raise BaseModelError("This installation lacks the base 'pocket'. Reinstall tav-peft.")
        return str(_POCKET_FOLDER)
    path = Path(name)
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise BaseModelError(f"{name} is a folder without model_index.json. {_advice(path)}")
        return name
    if path.is_file():
        return name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "~", "/")):
        raise BaseModelError(
            f"No base at {name}. Give a folder in diffusers layout, a .safetensors or .ckpt file, "
            "a hub id (user/name), or 'pocket'."
        )
    return name


def at_hand(base: str | Path) -> bool:
    """Tell whether a base can be opened without a download: it is on this disk, or in the hub's cache."""
    try:
        location = locate(base)
    except BaseModelError:
        return False
    return Path(location).exists() or isinstance(try_to_load_from_cache(location, "model_index.json"), str)


def _advice(folder: Path) -> str:
    """Say what to give instead of a folder that is no base."""
    if (folder.parent / "model_index.json").exists():
        return f"It is a part of the base {folder.parent}: give that."
    if (folder / "adapter_config.json").exists():
        return "It is an adapter: give the base it was made for."
    files = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".ckpt"))
    if files:
        return f"It has files that may be bases: give one of them ({', '.join(files[:3])})."
    return (
        "Give a base in diffusers layout (with unet/, vae/, text_encoder/, tokenizer/, scheduler/), "
        "a .safetensors or .ckpt file, a hub id, or 'pocket'."
    )


def name_of(location: str) -> str:
    """Name a base for an adapter's header, without folders of this machine."""
    path = Path(location)
    if path == _POCKET_FOLDER:
        return POCKET
    return path.resolve().name if path.exists() else location


def license_of(location: str) -> str | None:
    """Give the licence that a base's model card states; None where there is no card on this disk, or it states none."""
    folder = Path(location)
    card = folder.parent / "MODEL_CARD.md" if folder == _POCKET_FOLDER else folder / "README.md"
    try:
        stated = ModelCard.load(card).data.to_dict().get("license")
    except (OSError, ValueError, YAMLError):
        return None
    return stated if isinstance(stated, str) else None


def architecture(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Collect what of a UNet's config decides whether an adapter's tensors can fit it."""
    keys = ("block_out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block")
    return {key: list(v) if isinstance(v := unet.config[key], tuple) else v for key in keys}


@torch.no_grad()
def fingerprint(unet: UNet2DConditionModel) -> str:
    """Hash the query projections of attn1 and attn2 (SHA-256, hex).

    Taken in half precision, so that a base and its fp16 variant have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        plain = name.replace(".base_layer", "")
        if plain.endswith(("attn1.to_q.weight", "attn2.to_q.weight")):
            digest.update(plain.encode())
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()
