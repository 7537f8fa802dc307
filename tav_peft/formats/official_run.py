"""What a run of the original Tune-A-Video, or of the LOVEU-TGVE-2023 code, left behind: weights and settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import pydantic
import torch
import yaml
from torch import Tensor

from tav_peft.adapter import ClipInfo
from tav_peft.bases.checkpoint_file import read_checkpoint
from tav_peft.errors import AdapterError, BaseModelError
from tav_peft.formats.origin import UNKNOWN_CLIP
from tav_peft.recipe import Recipe

CONFIG = "config.yaml"
# in an output folder, in its unet/, and in the checkpoint-N/ of either age of accelerate
_PLACES = (
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STEP = re.compile(r"(?:checkpoint|tuneavideo)-(\d+)(?:\.\w+)?")
_WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.|unet\.)*")


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


_Count = Annotated[int, pydantic.Field(ge=1, le=1_000_000)]


class _TrainData(_Section):
    video_path: str = ""
    prompt: str = ""
    width: _Count | None = None
    height: _Count | None = None
    n_sample_frames: _Count | None = None
    sample_start_idx: Annotated[int, pydantic.Field(ge=0)] = 0
    sample_frame_rate: _Count = 1
    num_frames: _Count | None = None  # LOVEU-TGVE's, which begins at a random frame


class _ValidationData(_Section):
    prompts: tuple[str, ...] | dict[str, str] = ()  # LOVEU-TGVE's have names
    guidance_scale: float | None = None
    num_inference_steps: int | None = None


class RunConfig(_Section):
    """Those settings of a run's config.yaml that an adapter remembers; the others are passed over."""

    train_data: _TrainData
    validation_data: _ValidationData = _ValidationData()
    max_train_steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_weight_decay: float | None = None
    adam_epsilon: float | None = None
    max_grad_norm: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    gradient_checkpointing: bool | None = None

    @property
    def clip(self) -> ClipInfo:
        """Give the clip as far as it is known: which frames were asked for, not what was on them."""
        data = self.train_data
        frames = data.n_sample_frames or data.num_frames or 0
        first, stride = data.sample_start_idx, data.sample_frame_rate
        return UNKNOWN_CLIP.model_copy(
            update={
                "name": PurePosixPath(data.video_path).name,
                "frames": frames,
                "height": data.height or 0,
                "width": data.width or 0,
                "indices": () if data.num_frames else tuple(range(first, first + frames * stride, stride)),
            }
        )

    def recipe(self) -> dict[str, Any]:
        """Give the settings in the words of a recipe, without those that are not known."""
        data, validation = self.train_data, self.validation_data
        prompts = validation.prompts
        size = [data.width, data.height] if data.width and data.height else None
        return _known(
            {
                "prompt": data.prompt or None,
                "edits": list(prompts.values() if isinstance(prompts, dict) else prompts) or None,
                "clip": {
                    "frames": data.n_sample_frames or data.num_frames,
                    "start": None if data.num_frames else data.sample_start_idx,
                    "stride": 1 if data.num_frames else data.sample_frame_rate,
                    "size": size,
                    "fit": "squash",
                },
                "training": {
                    "steps": self.max_train_steps,
                    "lr": self.learning_rate,
                    "seed": self.seed,
                    "beta1": self.adam_beta1,
                    "beta2": self.adam_beta2,
                    "weight_decay": self.adam_weight_decay,
                    "epsilon": self.adam_epsilon,
                    "max_grad_norm": self.max_grad_norm,
                    "precision": "fp32" if self.mixed_precision == "no" else self.mixed_precision,
                    "gradient_checkpointing": self.gradient_checkpointing,
                },
                "editing": {
                    "guidance_scale": validation.guidance_scale,
                    "num_inference_steps": validation.num_inference_steps,
                },
            }
        )


def _known(values: dict[str, Any]) -> dict[str, Any]:
    inner = {name: _known(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in inner.items() if value not in (None, {})}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's file of weights, its settings where they are beside it, and the steps it had taken."""

    weights: Path
    config: RunConfig | None
    step: int | None

    def recipe(self, **adapter: Any) -> dict[str, Any]:
        """Give the run's settings as those fields of a recipe that are known, with the section `adapter`.

        Raises:
            AdapterError: when the run's config has values that no recipe can have.

        """
        about = {"name": "official", "description": "a run of the original code, imported"}
        known = self.config.recipe() if self.config else {}
        try:
            recipe = Recipe.model_validate({**about, **known, "adapter": adapter})
        except pydantic.ValidationError as error:
            raise AdapterError(f"{CONFIG} of the run: {_problems(error)}.") from None
        return recipe.model_dump(mode="json", exclude_unset=True)


def find_run(path: Path) -> Run:
    """Find a run's weights, by an output folder, its `unet`, a `checkpoint-N`, or a file; and its config beside them.

    Raises:
        AdapterError: when there are no weights, or the config is damaged.

    """
    weights = _weights_in(path) if path.is_dir() else path
    if not weights.is_file():
        raise AdapterError(f"{weights} does not exist. Check the name.")
    names = [weights.name, weights.parent.name]
    inside = names[1] in ("unet", "checkpoints") or names[1].startswith("checkpoint-")
    config = _read_config((weights.parents[1] if inside else weights.parent) / CONFIG)
    step = next((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), None)
    if step is None and names[1] == "unet" and config is not None:
        step = config.max_train_steps  # the original saves its pipeline at the end
    return Run(weights, config, step)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a UNet's tensors by name, without what training frameworks write before the names.

    Raises:
        AdapterError: when the file is damaged, or a pickle of more than tensors.

    """
    try:
        found = read_checkpoint(path)
    except BaseModelError as error:
        raise AdapterError(str(error)) from None
    for name, tensor in found.items():
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
            raise AdapterError(f"{path.name}: {name} is no plain tensor of floating-point numbers.")
    return {_WRAPPERS.sub("", name, count=1): tensor for name, tensor in found.items()}


def _weights_in(folder: Path) -> Path:
    for place in _PLACES:
        if (folder / place).is_file():
            return folder / place
    others = [*folder.glob("checkpoint-*"), *folder.glob("checkpoints/*.pth"), *folder.glob("*.pth")]
    there = f" It has {', '.join(str(p.relative_to(folder)) for p in sorted(others)[:3])}: name one of them."
    raise AdapterError(
        f"{folder} has no unet/diffusion_pytorch_model.bin, so it is no finished run of the original code."
        f"{there if others else ' Give the output folder of a run, or a file of its UNet.'}"
    )


def _read_config(path: Path) -> RunConfig | None:
    if not path.is_file():
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, Mapping) or "train_data" not in values:
            return None  # somebody else's
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        reason = _problems(error)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
    raise AdapterError(f"{path} is not the config of a run: {reason}. Correct it, or move it away.")


def _problems(error: pydantic.ValidationError) -> str:
    found = error.errors(include_url=False)[:3]
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found)
