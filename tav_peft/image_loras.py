"""Ordinary LoRAs of image models, for style or character, on the UNet and the text encoders of a video pipeline."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    recurse_remove_peft_layers,
    set_weights_and_activate_adapters,
)
from torch import Tensor, nn

from tav_peft.errors import AdapterError
from tav_peft.tensor_file import hash_tensors, read_tensors
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.unet.peft_layers import layers_of, remove_layers

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT = "base_model.model."
_OTHERS = ("hada_", "lokr_", "oft_", "dora_scale", ".diff", "lora_magnitude_vector", "glora")


@dataclasses.dataclass
class _Loaded:
    """A LoRA that is loaded: the hash of its tensors, its strength, and the text encoders that it is on as well."""

    fingerprint: str
    strength: float
    encoders: tuple[str, ...]


class ImageLoras:
    """The LoRAs of image models on a UNet and its text encoders, those by the names of a diffusers pipeline.

    They are read by diffusers, and act in every frame: W = W0 + strength · scale · B·A, beside the adapters of clips.
    """

    def __init__(self, unet: InflatedUNet, encoders: Mapping[str, nn.Module]) -> None:
        self.unet, self.encoders = unet, dict(encoders)
        self._loaded: dict[str, _Loaded] = {}

    @property
    def names(self) -> list[str]:
        """Names of the loaded LoRAs, in the order they came."""
        return list(self._loaded)

    def record(self) -> list[dict[str, Any]]:
        """Say in plain values which LoRAs act, each with its strength."""
        return [
            {"fingerprint": each.fingerprint, "strength": each.strength}
            for each in sorted(self._loaded.values(), key=lambda each: each.fingerprint)
            if each.strength
        ]

    def load(self, path: Path, name: str, strength: float = 1.0) -> None:
        """Put a LoRA on: a file of kohya's or diffusers' keys, or a folder of PEFT or diffusers with such a file.

        Raises:
            AdapterError: when the name is taken, the file is none that diffusers can read exactly, or it fits no module.

        """
        if name in self._loaded:
            raise AdapterError(f"A LoRA named {name!r} is loaded already. Unload it, or choose another name.")
        loader = (
            StableDiffusionXLLoraLoaderMixin
            if "text_encoder_2" in self.encoders
            else StableDiffusionLoraLoaderMixin
        )
        file = _file_in(path)
        tensors, _ = read_tensors(file)
        _check(tensors, file)
        try:
            state, alphas, metadata = _read(loader, file, tensors, self.unet)
            metadata = None if metadata is None else _exactly(metadata, state)
            shared = {"network_alphas": alphas, "adapter_name": name, "metadata": metadata}
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "Already found a `peft_config`"
                )  # several are what was asked for
                if any(key.startswith("unet.") for key in state):
                    loader.load_lora_into_unet(state, unet=self.unet, **shared)
                for part, module in self.encoders.items():
                    if any(key.startswith(f"{part}.") for key in state):
                        loader.load_lora_into_text_encoder(state, text_encoder=module, prefix=part, **shared)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            self._remove(name)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise AdapterError(f"{path} cannot be loaded as a LoRA of this base: {reason}") from error
        on = tuple(encoder for encoder, module in self.encoders.items() if _carries(module, name))
        if not on and not layers_of(self.unet, name):
            self._remove(name)
            raise AdapterError(f"{path} changes no module of this base. Use the base that it was made for.")
        self._loaded[name] = _Loaded(hash_tensors(tensors), strength, on)
        modules: list[nn.Module] = [self.unet, *self.encoders.values()]
        for module in modules:
            module.requires_grad_(False)
        self.apply()

    def unload(self, name: str) -> None:
        """Take a LoRA off; without any the modules are bit for bit what they were."""
        del self._loaded[self._known(name)]
        self._remove(name)
        self.apply()

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Set the strengths of the named LoRAs; those not named get 0."""
        for name in strengths:
            self._known(name)
        for name, each in self._loaded.items():
            each.strength = float(strengths.get(name, 0.0))
        self.apply()

    def apply(self) -> None:
        """Bring every module to the strengths; the adapters of clips are off after that, and must be applied again."""
        on_unet = [name for name in self._loaded if layers_of(self.unet, name)]
        if on_unet:
            _activate(self.unet, on_unet, [self._loaded[name].strength for name in on_unet])
        for encoder, module in self.encoders.items():
            on = [name for name, each in self._loaded.items() if encoder in each.encoders]
            if on:
                _activate(module, on, [self._loaded[name].strength for name in on])

    def _known(self, name: str) -> str:
        if name not in self._loaded:
            raise AdapterError(
                f"No LoRA named {name!r} is loaded. Loaded: {', '.join(self._loaded) or 'none'}."
            )
        return name

    def _remove(self, name: str) -> None:
        remove_layers(self.unet, name)
        for module in self.encoders.values():
            if _carries(module, name):
                delete_adapter_layers(module, name)
                if not getattr(module, "peft_config", None):
                    recurse_remove_peft_layers(module)


def _activate(module: nn.Module, names: Sequence[str], strengths: Sequence[float]) -> None:
    set_weights_and_activate_adapters(module, list(names), list(strengths))


def _carries(module: nn.Module, name: str) -> bool:
    return name in getattr(module, "peft_config", {})


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _FILES if (path / name).is_file()]
    if not found:
        raise AdapterError(f"{path} has none of {', '.join(_FILES)}. Give the LoRA's file.")
    return found[0]


def _check(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse what diffusers would read otherwise than it was meant, or not at all."""
    for sign in _OTHERS:
        key = next((key for key in tensors if sign in key), None)
        if key is not None:
            raise AdapterError(
                f"{file.name} is no plain LoRA ({key}), and diffusers would not apply it as it was meant. "
                "Convert it to one."
            )
    if any(".attn_temp." in key or "_attn_temp_" in key for key in tensors):
        raise AdapterError(f"{file.name} is the adapter of a clip. Load it with load_adapter.")


def _read(loader: Any, file: Path, tensors: Mapping[str, Tensor], unet: InflatedUNet) -> tuple[Any, Any, Any]:
    """Give tensors in diffusers' names, no alphas, and the metadata that say alpha."""
    if any(key.endswith(".alpha") for key in tensors):
        return loader.lora_state_dict(_scaled(tensors), unet_config=unet.config, return_lora_metadata=True)
    if not all(key.startswith(_PEFT) for key in tensors):
        return loader.lora_state_dict(str(file), unet_config=unet.config, return_lora_metadata=True)
    config = file.parent / "adapter_config.json"
    if not config.is_file():
        raise AdapterError(f"{file} is PEFT's, and {config.name} is not beside it. Give the whole folder.")
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{config} is broken ({error}). Ask for the folder again.") from None
    named = {"unet." + key.removeprefix(_PEFT): tensor for key, tensor in tensors.items()}
    return named, None, {f"unet.{key}": value for key, value in told.items()}


def _scaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply alpha/rank into kohya's tensors: diffusers (0.42.1) loses alphas that differ between modules."""
    scaled = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    for key, alpha in tensors.items():
        module = key.removesuffix(".alpha")
        up, down = (f"{module}.lora_{end}.weight" for end in ("up", "down"))
        if key.endswith(".alpha") and up in scaled and down in scaled:
            scaled[up] = scaled[up].float() * (float(alpha) / len(scaled[down]))
    return scaled


def _exactly(metadata: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name the very modules that have tensors: a short name such as to_q would match those of T-Attn too."""
    targets: dict[str, set[str]] = {}
    for key in state:
        part, _, module = key.partition(".")
        targets.setdefault(f"{part}.target_modules", set()).add(module.split(".lora")[0])
    return {**metadata, **{key: sorted(modules) for key, modules in targets.items() if key in metadata}}
