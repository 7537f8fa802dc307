"""The layout of single-file checkpoints (latent diffusion's names): where in it each tensor of a diffusers base is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["sd1", "sd2", "sdxl"]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# the text encoders of each kind: in CLIP's own names as transformers has them, or in those of OpenCLIP
_TEXT_PREFIXES: dict[Kind, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer.text_model."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPENCLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of diffusers is in a single file, and how it lies there.

    `third` counts queries, keys and values inside one fused tensor; `pointwise` is a linear layer kept as a 1x1
    convolution; `transposed` a matrix applied from the other side.
    """

    key: str
    third: int | None = None
    pointwise: bool = False
    transposed: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """Give what diffusers has, of what the single file has at the key."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        if self.pointwise:
            tensor = tensor.flatten(1)
        return tensor.T if self.transposed else tensor


def places(kind: Kind, part: str, names: Iterable[str]) -> dict[str, Place]:
    """Say for each tensor of one part of a base (unet, vae, text_encoder, text_encoder_2) where a single file has it.

    `names` are all names of the part's state dict in diffusers or transformers.
    """
    names = list(names)
    place: Callable[[str], Place]
    if part == "unet":
        place = _unet_place(names)
    elif part == "vae":
        place = _vae_place(names)
    else:
        prefix = _TEXT_PREFIXES[kind][part]
        place = _openclip_place(prefix) if prefix.endswith(".model.") else _clip_place(prefix)
    return {name: place(name) for name in names}


def to_single_file(kind: Kind, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rename and reshape the parts' state dicts to one of a single file; dtypes are kept."""
    fused: dict[str, list[Tensor]] = {}
    result: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        for name, place in places(kind, part, tensors).items():
            tensor = tensors[name]
            if place.third is not None:
                thirds = fused.setdefault(place.key, [tensor] * 3)
                thirds[place.third] = tensor
            elif place.pointwise:
                result[place.key] = tensor[:, :, None, None]
            else:
                result[place.key] = tensor.T.contiguous() if place.transposed else tensor
    return result | {key: torch.cat(thirds) for key, thirds in fused.items()}


def _unet_place(names: list[str]) -> Callable[[str], Place]:
    # a level is a run of blocks: a residual block and its attention each, and one that resizes, alone or as their last
    layers = sum(
        name.startswith("down_blocks.0.resnets.") and name.endswith("conv1.weight") for name in names
    )
    attended = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}

    def place(name: str) -> Place:
        module, _, kind = name.rpartition(".")
        if module in _UNET_ENDS:
            return Place(f"{UNET}{_UNET_ENDS[module]}.{kind}")
        side, *path = name.split(".")
        if side == "mid_block":
            group, index, *rest = path
            block = f"middle_block.{2 * int(index) + (group == 'attentions')}"
            return Place(f"{UNET}{block}.{_inside(group, rest)}")
        level, group, index, *rest = path
        resizes = group in ("downsamplers", "upsamplers")
        count = int(level) * (layers + 1) + (layers if resizes else int(index))
        block = f"input_blocks.{count + 1}" if side == "down_blocks" else f"output_blocks.{count}"
        column = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + (level in attended)}[
            group
        ]
        return Place(f"{UNET}{block}.{column}.{_inside(group, rest)}")

    return place


def _inside(group: str, rest: list[str]) -> str:
    if group == "resnets":
        return ".".join([_RESNET[rest[0]], *rest[1:]])
    return ".".join(["op", *rest[1:]] if group == "downsamplers" else rest)


def _vae_place(names: list[str]) -> Callable[[str], Place]:
    levels = len({name.split(".")[2] for name in names if name.startswith("decoder.up_blocks.")})

    def place(name: str) -> Place:
        for part, ours in _VAE_ATTENTION.items():
            if f".mid_block.attentions.0.{part}." in name:
                side, kind = name.split(".")[0], name.rpartition(".")[2]
                pointwise = part != "group_norm" and kind == "weight"
                return Place(f"{VAE}{side}.mid.attn_1.{ours}.{kind}", pointwise=pointwise)
        key = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", key)
        key = key.replace("down_blocks.", "down.").replace("resnets.", "block.")
        key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        return Place(f"{VAE}{key}")

    return place


def _clip_place(prefix: str) -> Callable[[str], Place]:
    # transformers 4 has a `text_model` about the names, transformers 5 has not
    return lambda name: Place(prefix + name.removeprefix("text_model."))


def _openclip_place(prefix: str) -> Callable[[str], Place]:
    def place(name: str) -> Place:
        name = name.removeprefix("text_model.")
        if name in _OPENCLIP_ENDS:
            return Place(prefix + _OPENCLIP_ENDS[name], transposed=name.startswith("text_projection"))
        _, _, layer, rest = name.split(".", 3)  # encoder.layers.N.…
        block = f"{prefix}transformer.resblocks.{layer}"
        module, _, kind = rest.rpartition(".")
        if module.startswith("self_attn.") and module[10] in "qkv":
            return Place(f"{block}.attn.in_proj_{kind}", third="qkv".index(module[10]))
        return Place(f"{block}.{_OPENCLIP[module]}.{kind}")

    return place
