"""Control networks as diffusers keeps them: loaded, and checked against the base they are to steer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
from torch import Tensor

from tav_peft.autoencoding import pixels_per_latent
from tav_peft.errors import BaseModelError
from tav_peft.foreign import refused
from tav_peft.shapes import Latents

Network: TypeAlias = Any  # a ControlNetModel or a T2IAdapter; their bases are untyped

KINDS = {"ControlNetModel": ControlNetModel, "T2IAdapter": T2IAdapter}
_SHARED = (
    "in_channels",
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
)
POCKET_NETWORKS = ("pocket-controlnet", "pocket-t2i-adapter")  # both read canny


def load_network(name: str | Path, dtype: torch.dtype = torch.float32) -> Network:
    """Load a ControlNet or a T2I-Adapter: a folder in diffusers layout, a hub id, or one of `POCKET_NETWORKS`.

    Raises:
        BaseModelError: when there is none of that name, or it is another kind of model.

    """
    place = Path(str(files("tav_peft.pocket"))) / str(name) if str(name) in POCKET_NETWORKS else Path(name)
    if place.is_file():
        raise BaseModelError(
            f"{name} is one file. Give a ControlNet or T2I-Adapter as a folder in diffusers layout "
            "(config.json beside the weights), or a hub id."
        )
    if place.is_dir():
        kind = _kind_in(place)
    elif len(Path(name).parts) == 2 and not Path(name).is_absolute():
        kind = _kind_on_the_hub(str(name))
    else:
        raise BaseModelError(
            f"No control network at {name}. Give a folder in diffusers layout, a hub id (user/name), "
            f"or {' or '.join(POCKET_NETWORKS)}."
        )
    if kind not in KINDS:
        raise BaseModelError(
            f"{name} is a {kind or 'model of no known class'}. Give a ControlNetModel or a T2IAdapter."
        )
    with refused(BaseModelError, f"{name} cannot be loaded as a {kind}"):
        network, told = KINDS[kind].from_pretrained(
            place if place.is_dir() else str(name), torch_dtype=dtype, output_loading_info=True
        )
    if told["missing_keys"]:  # which the library has drawn at random
        raise BaseModelError(
            f"{name} lacks {len(told['missing_keys'])} of its tensors, such as {sorted(told['missing_keys'])[0]}. "
            "Get the whole network."
        )
    return network.eval().requires_grad_(False)


def _kind_in(folder: Path) -> str | None:
    file = folder / "config.json"
    if not file.is_file():
        raise BaseModelError(f"{folder} has no config.json. Give the folder of a ControlNet or T2I-Adapter.")
    with refused(BaseModelError, f"{file} cannot be read"):
        config = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("_class_name") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def _kind_on_the_hub(name: str) -> str | None:
    with refused(BaseModelError, f"No control network at {name}, here or on the hub"):
        config = ControlNetModel.load_config(name)
    return config.get("_class_name")


def check_fit(network: ControlNetModel, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Refuse a ControlNet that was made for another architecture than the base's.

    Raises:
        BaseModelError: naming what differs.

    """
    ours, theirs = unet.config, network.config
    wanted: dict[str, Any] = {name: ours[name] for name in _SHARED}
    given = {name: theirs[name] for name in _SHARED}
    wanted["pixels per latent"] = pixels_per_latent(vae)
    given["pixels per latent"] = 2 ** (len(theirs.conditioning_embedding_out_channels) - 1)
    _compare(network, given, wanted)


def check_features(
    network: T2IAdapter, features: Sequence[Tensor], unet: UNet2DConditionModel, latents: Latents
) -> None:
    """Refuse a T2I-Adapter whose features have not the shapes that the UNet adds them at.

    A block with cross-attention takes them before it halves the picture, another one after; what is left over goes to
    the mid block.

    Raises:
        BaseModelError: naming the shapes.

    """
    height, width = latents.shape[-2:]
    wanted = []
    for block, channels in zip(unet.down_blocks, unet.config.block_out_channels, strict=True):
        before, halves = (channels, height, width), block.downsamplers is not None
        if halves:
            height, width = (height + 1) // 2, (width + 1) // 2
        wanted.append(before if hasattr(block, "attentions") else (channels, height, width))
    wanted = [*wanted, (channels, height, width)][: max(len(features), len(wanted))]
    given = [tuple(each.shape[1:]) for each in features]
    _compare(
        network, {"features (channels, height, width)": given}, {"features (channels, height, width)": wanted}
    )


def _compare(network: Network, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if _plain(value) != _plain(given[name]):
            raise BaseModelError(
                f"This {type(network).__name__} does not fit the base: its {name} is {_plain(given[name])}, the base's "
                f"{_plain(value)}. Use one that was made for this kind of Stable Diffusion."
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
