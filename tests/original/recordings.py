"""Folders of numbers recorded from the original implementation: found, opened, and what has been read of them."""

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.unet.inflation import is_temporal

CARRIED = Path(__file__).parents[1] / "recorded"  # see its README
SHARED = Path(__file__).parents[2].parent / "shared" / "fixtures"
CLIPS = SHARED.parent / "clips"
ELSEWHERE = "TAV_ORIGINAL_RECORDINGS"  # an environment variable that names one more place to look in

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
# diffusers warns of a cast although its list of modules to keep in float32 is empty
diffusers.utils.logging.get_logger("diffusers.models.modeling_utils").setLevel(diffusers.logging.ERROR)


def places() -> list[Path]:
    """Where recordings are looked for: those carried here, those beside the checkout, and where the variable says."""
    named = os.environ.get(ELSEWHERE)
    return [CARRIED, *([SHARED] if SHARED.is_dir() else []), *([Path(named)] if named else [])]


def recorded(file: str) -> list[Path]:
    """Every folder at those places that holds this file, in order; a place without any recording is an error."""
    folders: list[Path] = []
    for place in places():
        if not any(place.rglob("facts.json")):
            raise ValueError(f"{place} holds no recording: no folder in it has a facts.json.")
        folders += [found.parent for found in sorted(place.rglob(file))]
    return list(dict.fromkeys(folder.resolve() for folder in folders))


@functools.cache
def recording(folder: Path) -> "Recording":
    """The recording in a folder; one for all who ask, so that what has been computed from it is kept."""
    return Recording(folder)


class Recording:
    """One folder of recorded numbers, all of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, set[str]] = {}

    @property
    def name(self) -> str:
        """The place and the checkpoint, such as `carried sd1-tiny`."""
        return f"carried {self.folder.name}" if CARRIED in self.folder.parents else self.folder.name

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The settings of all but the training runs."""
        return self._json("facts")

    @functools.cached_property
    def noise_floor(self) -> dict[str, Any]:
        """How far the original in float64 is from its own record; empty where nobody measured it."""
        return self._json("noise_floor") if (self.folder / "noise_floor.json").exists() else {}

    @property
    def runs(self) -> list[str]:
        """Names of the recorded training runs."""
        return sorted(file.stem for file in self.folder.glob("train_*.json"))

    def run(self, name: str) -> dict[str, Any]:
        """The settings of a training run."""
        return self._json(name)

    def has(self, file: str) -> bool:
        """Tell whether the recording has this file of tensors."""
        return (self.folder / f"{file}.safetensors").exists()

    def names(self, file: str) -> set[str]:
        """Names of the tensors in a file."""
        return set(_tensors(self.folder / f"{file}.safetensors"))

    def take(self, file: str, name: str) -> Tensor:
        """Give a tensor of a file, and remember that it was asked for."""
        self._read.setdefault(file, set()).add(name)
        return _tensors(self.folder / f"{file}.safetensors")[name].clone()

    def unread(self, file: str) -> set[str]:
        """Names of the tensors in a file that nobody has asked for."""
        return self.names(file) - self._read.get(file, set())

    def t_attn(self, which: str) -> dict[str, Tensor]:
        """The temporal attentions' tensors: `fresh`, as the original initialises them, or `random`."""
        file = f"tattn_{which}"
        return {name: self.take(file, name) for name in sorted(self.names(file))}

    def pipe(self, t_attn: str | None = None, *, dtype: torch.dtype = torch.float32) -> TuneAVideoPipeline:
        """Our pipeline on the recorded checkpoint; each call gives another one."""
        pipe = copy.deepcopy(_loaded(self.folder / "checkpoint"))
        if t_attn is not None:
            put(pipe, self.t_attn(t_attn))
        return pipe.to(dtype)

    def flat(self) -> UNet2DConditionModel:
        """The checkpoint's 2-D UNet, as diffusers loads it."""
        return UNet2DConditionModel.from_pretrained(self.folder / "checkpoint" / "unet").eval()

    @property
    def scheduler(self) -> Path:
        """The folder with the checkpoint's own scheduler config."""
        return self.folder / "checkpoint" / "scheduler"

    @property
    def has_vae(self) -> bool:
        """Tell whether the checkpoint's VAE is there too; without it nothing can be decoded."""
        return (self.folder / "checkpoint" / "vae").is_dir()

    def _json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))


def put(pipe: TuneAVideoPipeline, temporal: dict[str, Tensor]) -> None:
    """Give the UNet these temporal attentions, which must be all that it has."""
    assert set(temporal) == {name for name in pipe.unet.state_dict() if is_temporal(name)}
    pipe.unet.load_state_dict(pipe.unet.state_dict() | temporal)


@functools.cache
def _tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)


@functools.cache
def _loaded(checkpoint: Path) -> TuneAVideoPipeline:
    if (checkpoint / "vae").is_dir():
        return TuneAVideoPipeline.from_pretrained(checkpoint)
    # the carried part has no VAE: this one stands in its place, and nothing that it decodes is compared
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return TuneAVideoPipeline.from_pretrained(checkpoint, vae=vae)
