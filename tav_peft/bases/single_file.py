"""Bases in one file, as Stable Diffusion was published and is shared: told apart and loaded, offline."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tav_peft.bases import prediction_type as prediction_types
from tav_peft.bases import unfit
from tav_peft.bases.checkpoint_file import checkpoint_layout, read_checkpoint
from tav_peft.bases.folder import read_config
from tav_peft.bases.ldm_keys import UNET, Kind, places
from tav_peft.errors import BaseModelError

_LOG = logging.getLogger(__name__)
_CONFIGS = Path(str(files("tav_peft.bases") / "configs"))
# the name of a text encoder tells the kinds apart, whatever their sizes
_KINDS: dict[str, Kind] = {
    "cond_stage_model.transformer.": "sd1",
    "cond_stage_model.model.": "sd2",
    "conditioner.embedders.1.model.": "sdxl",
}
_TITLES: dict[Kind, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
_MODELS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def components(
    path: Path,
    *,
    dtype: torch.dtype,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    **parts: Any,
) -> dict[str, Any]:
    """Load the parts of the base in a single file, by the names they have in a diffusers pipeline.

    `config` is a folder in diffusers layout with the configs and the tokenizer that belong to the file, for a base of
    other sizes than Stable Diffusion's. `prediction_type` is what the UNet predicts; not given, it is that of
    `config`, else that of the file's kind, which for Stable Diffusion 2.x is told from what the UNet does. `parts`
    are used instead of the file's.

    Raises:
        BaseModelError: when the file is damaged, would run code, or holds something else than a base.

    """
    checkpoint = read_checkpoint(path)
    kind = kind_of(path, checkpoint)
    folder = Path(config) if config else _CONFIGS / kind
    encoders = ["text_encoder", "text_encoder_2"][: 2 if kind == "sdxl" else 1]
    for name in ("unet", "vae", *encoders):
        if name not in parts:
            parts[name] = _model(path, kind, name, folder, checkpoint, dtype)
    for encoder in encoders:
        name = encoder.replace("text_encoder", "tokenizer")
        if name not in parts:
            parts[name] = _tokenizer(folder / name)
    if "scheduler" not in parts:
        if prediction_type is None and config is None:
            prediction_type = _prediction_type(path, kind, checkpoint, parts["unet"])
        parts["scheduler"] = _scheduler(folder / "scheduler", checkpoint, prediction_type)
    return parts


def configs_of(path: Path) -> Path:
    """Give the folder of the configs that belong to a single file; of a .safetensors only the header is read.

    Raises:
        BaseModelError: when the file is damaged, or no base.

    """
    return _CONFIGS / kind_of(path, checkpoint_layout(path))


def kind_of(path: Path, checkpoint: Mapping[str, Tensor]) -> Kind:
    """Tell which Stable Diffusion a single file holds, by its tensors' names.

    Raises:
        BaseModelError: when it is no base, with the reason.

    """
    reason = unfit.reason_of_names(checkpoint)
    entry = checkpoint.get(f"{UNET}input_blocks.0.0.weight")
    if reason is None and entry is not None:
        reason = unfit.reason_of_channels(entry.shape[1])
    if reason is not None:
        raise BaseModelError(f"{path.name} is no base, but {reason}")
    for prefix, kind in _KINDS.items():
        if any(name.startswith(prefix) for name in checkpoint):
            return kind
    raise BaseModelError(f"{path.name} has no text encoder. {unfit.WHOLE}")


def _model(
    path: Path, kind: Kind, name: str, folder: Path, checkpoint: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """Build one part from its config and fill each tensor of it: none missing, and for the UNet none left over."""
    model = _empty(name, folder)
    wanted = model.state_dict()
    found = places(kind, name, wanted)
    missing = [place.key for place in found.values() if place.key not in checkpoint]
    if missing:
        raise BaseModelError(
            f"{path.name} lacks {len(missing)} of the {len(found)} tensors of the {name} of {_TITLES[kind]}, "
            f"first {missing[0]}. {unfit.WHOLE}"
        )
    tensors = {key: place.take(checkpoint[place.key]) for key, place in found.items()}
    other = [found[key].key for key, tensor in tensors.items() if tensor.shape != wanted[key].shape]
    if name == "unet":
        known = {place.key for place in found.values()}
        other += [key for key in checkpoint if key.startswith(UNET) and key not in known]
    if other:
        raise BaseModelError(
            f"{path.name} is no {_TITLES[kind]}: {len(other)} tensors of its {name} are others, first {other[0]}. "
            "A base of other sizes needs its configs: `config`, a folder in diffusers layout."
        )
    # copies, so that nothing hangs on the file once it is read
    own = {
        key: tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    model.load_state_dict(own, assign=True)
    return model.eval()


def _empty(name: str, folder: Path) -> nn.Module:
    numbers, model_class = read_config(folder / name / "config.json"), _MODELS[name]
    with init_empty_weights():
        if name.startswith("text_encoder"):
            return model_class(model_class.config_class.from_dict(numbers))  # type: ignore[no-any-return]
        return model_class.from_config(numbers)  # type: ignore[no-any-return]


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return CLIPTokenizer.from_pretrained(folder)
    # all kinds share one vocabulary, and differ in what they fill up with
    marks = read_config(folder / "tokenizer_config.json")
    return CLIPTokenizer.from_pretrained(_CONFIGS / "clip_tokenizer", **marks)


def _scheduler(folder: Path, checkpoint: Mapping[str, Tensor], prediction_type: str | None) -> DDIMScheduler:
    numbers = read_config(folder / "scheduler_config.json")
    if prediction_type is not None:
        numbers["prediction_type"] = prediction_type
    # empty tensors of these names are the custom by which XL models of v say so, and that they begin at pure noise
    if "ztsnr" in checkpoint:
        numbers["rescale_betas_zero_snr"] = True
    return DDIMScheduler.from_config(numbers)


def _prediction_type(
    path: Path, kind: Kind, checkpoint: Mapping[str, Tensor], unet: UNet2DConditionModel
) -> str:
    if "v_pred" in checkpoint:
        return "v_prediction"
    if kind != "sd2":
        return "epsilon"
    told = prediction_types.tell(unet)
    if told is None:
        raise BaseModelError(
            f"{path.name} does not show what its UNet predicts. Give prediction_type (--prediction-type): epsilon for "
            "a Stable Diffusion 2.x of 512x512 pixels, v_prediction for one of 768x768."
        )
    _LOG.warning("%s is taken for a model with prediction_type %s, from what its UNet does.", path.name, told)
    return told
