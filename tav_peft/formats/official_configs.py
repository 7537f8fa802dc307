"""The configs and the tokenizer of the original's folder, in the words of diffusers 0.11.1 and transformers 4.30."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tav_peft.errors import AdapterError
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.unet.inflation import InflatedUNet

_DIFFUSERS, _TRANSFORMERS = "0.11.1", "4.30.2"
_VAE_FACTOR = 0.18215  # written into the original's code
_PLAIN = "Use a base like Stable Diffusion 1.x or 2.x."
# what the classes of diffusers 0.11.1 and of the original read from their configs
_VAE = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "norm_num_groups", "out_channels", "sample_size", "up_block_types",
)  # fmt: skip
_UNET = (
    "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample", "class_embed_type",
    "cross_attention_dim", "down_block_types", "downsample_padding", "dual_cross_attention", "flip_sin_to_cos",
    "freq_shift", "in_channels", "layers_per_block", "mid_block_scale_factor", "mid_block_type", "norm_eps",
    "norm_num_groups", "num_class_embeds", "only_cross_attention", "out_channels", "resnet_time_scale_shift",
    "sample_size", "up_block_types", "upcast_attention", "use_linear_projection",
)  # fmt: skip
_TEXT = (
    "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_factor",
    "initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "pad_token_id", "projection_dim", "vocab_size",
)  # fmt: skip
_SCHEDULER = (
    "beta_end", "beta_schedule", "beta_start", "clip_sample", "num_train_timesteps", "prediction_type",
    "set_alpha_to_one", "skip_prk_steps", "steps_offset", "trained_betas",
)  # fmt: skip
_SCHEDULERS = {"DDIMScheduler": DDIMScheduler, "PNDMScheduler": PNDMScheduler}
_BLOCKS = {
    "CrossAttnDownBlock2D": "CrossAttnDownBlock3D",
    "DownBlock2D": "DownBlock3D",
    "UNetMidBlock2DCrossAttn": "UNetMidBlock3DCrossAttn",
    "CrossAttnUpBlock2D": "CrossAttnUpBlock3D",
    "UpBlock2D": "UpBlock3D",
}
# settings of newer diffusers that change no number here, or only at which timesteps is sampled
_NEWER = {"force_upcast", "dropout", "timestep_spacing"}


def configs(base: LoadedBase) -> dict[str, dict[str, Any]]:
    """Give the folder's JSON files by their names in it.

    Raises:
        AdapterError: when the base has a setting that the original code has not.

    """
    scheduler = _scheduler_config(base)
    return {
        "model_index.json": _model_index(scheduler["_class_name"]),
        "unet/config.json": _unet_config(base.unet),
        "vae/config.json": _vae_config(base.vae) | {"_name_or_path": base.base_name},
        "text_encoder/config.json": _text_config(base.text_encoder) | {"_name_or_path": base.base_name},
        "scheduler/scheduler_config.json": scheduler,
    }


def _model_index(scheduler: str) -> dict[str, Any]:
    return {
        "_class_name": "TuneAVideoPipeline",
        "_diffusers_version": _DIFFUSERS,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        # as the original's code names the module of its own class
        "unet": ["models", "UNet3DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unet_config(unet: InflatedUNet) -> dict[str, Any]:
    config = _known_settings(unet.config, UNet2DConditionModel, _UNET, "UNet")
    types = [*config["down_block_types"], config["mid_block_type"], *config["up_block_types"]]
    unknown = [name for name in types if name not in _BLOCKS]
    if unknown:
        raise AdapterError(
            f"This base has blocks of the type {unknown[0]}, the original code has not. {_PLAIN}"
        )
    return config | {
        "_class_name": "UNet3DConditionModel",
        "down_block_types": [_BLOCKS[name] for name in config["down_block_types"]],
        "mid_block_type": _BLOCKS[config["mid_block_type"]],
        "up_block_types": [_BLOCKS[name] for name in config["up_block_types"]],
    }


def _vae_config(vae: AutoencoderKL) -> dict[str, Any]:
    if vae.config.scaling_factor != _VAE_FACTOR:
        raise AdapterError(
            f"This base scales its latents by {vae.config.scaling_factor:g}, the original code by {_VAE_FACTOR} whatever "
            f"the base says. {_PLAIN}"
        )
    return _known_settings(vae.config, AutoencoderKL, _VAE, "VAE") | {"_class_name": "AutoencoderKL"}


def _text_config(encoder: CLIPTextModel) -> dict[str, Any]:
    given = encoder.config.to_dict()
    return {name: given[name] for name in _TEXT} | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "torch_dtype": str(encoder.dtype).removeprefix("torch."),
        "transformers_version": _TRANSFORMERS,
    }


def _scheduler_config(base: LoadedBase) -> dict[str, Any]:
    """Give the config of the base's own scheduler where diffusers 0.11.1 has its class, else of its DDIM."""
    location = base.config.get("_name_or_path")
    given: Mapping[str, Any] = base.scheduler.config
    if location and not Path(location).is_file():
        theirs = DDIMScheduler.load_config(location, subfolder="scheduler")
        given = theirs if theirs["_class_name"] in _SCHEDULERS else given
    name = given["_class_name"]
    known = _known_settings(
        {"prediction_type": "epsilon", **given}, _SCHEDULERS[name], _SCHEDULER, "scheduler"
    )
    return known | {"_class_name": name}


def _known_settings(given: Mapping[str, Any], kind: Any, known: tuple[str, ...], part: str) -> dict[str, Any]:
    """Choose the settings that diffusers 0.11.1 knows, and refuse the base where another one is not the default."""
    defaults = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    for name, value in given.items():
        if name in defaults and name not in known and name not in _NEWER and value != defaults[name]:
            raise AdapterError(
                f"The {part} of this base has {name} {value}, which the original code does not know. {_PLAIN}"
            )
    return {name: given[name] for name in known if name in given} | {"_diffusers_version": _DIFFUSERS}


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a config as diffusers does, its folder made where it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write the vocabulary in the files of transformers before 5, whose tokenizer reads no tokenizer.json."""
    marks = {
        name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    write_json(folder / "special_tokens_map.json", marks)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": tokenizer.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
            **{name: _added_token(mark) for name, mark in marks.items()},
            "pad_token": marks["pad_token"],
        },
    )
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", tokenizer.get_vocab())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    lines = ["#version: 0.2", *merges, ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def _added_token(content: str) -> dict[str, Any]:
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
