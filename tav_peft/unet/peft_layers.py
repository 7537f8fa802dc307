"""PEFT's layers in an inflated UNet: put around its modules, found again, and taken off without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, VeraModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tav_peft.errors import AdapterError
from tav_peft.methods import read_config
from tav_peft.unet.inflation import InflatedUNet


def layers_config(given: Mapping[str, Any]) -> PeftConfig:
    """Build the PEFT config of an adapter, without the whole modules, which are handled here."""
    return read_config({**given, "modules_to_save": None})


def inject(model: nn.Module, config: PeftConfig, inner: str, *, seed: int = 0) -> None:
    """Wrap the targets of a config in a model's PEFT layers, new weights drawn for `seed`, and nothing else."""
    # PEFT draws from torch's global stream; nobody else's moves
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # stacking is what was asked for
        torch.manual_seed(seed)
        if config.peft_type == "VERA":
            VeraModel(
                model, config, inner
            )  # draws what its layers share, which the function below has no place for
        else:
            inject_adapter_in_model(config, model, adapter_name=inner)


def inject_layers(unet: InflatedUNet, config: PeftConfig, inner: str, *, seed: int = 0) -> None:
    """Wrap the targets in PEFT layers in place, what was on them before still acting."""
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    active = {path: [*layer.active_adapters] for path, layer in layers_of(unet)}
    inject(unet, config, inner, seed=seed)
    for path, layer in layers_of(unet):  # injecting leaves only the new adapter on; other tools' LoRAs stay
        if path in active:
            layer.set_adapter([*active[path], *([inner] if inner in adapters_on(layer) else [])])
    for parameter, flag in flags:  # PEFT freezes all but its own
        parameter.requires_grad_(flag)
    if not layers_of(unet, inner):
        raise AdapterError(
            "The adapter's config matches no module of this base. Use the base it was tuned for."
        )


def layers_of(unet: InflatedUNet, inner: str | None = None) -> list[tuple[str, BaseTunerLayer]]:
    """List the PEFT layers of a UNet by path; with `inner`, those that carry the adapter of that name."""
    layers = [(path, m) for path, m in unet.named_modules() if isinstance(m, BaseTunerLayer)]
    return [(path, layer) for path, layer in layers if inner is None or inner in adapters_on(layer)]


def adapters_on(layer: BaseTunerLayer) -> set[str]:
    """Name the adapters that have weights in a PEFT layer."""
    return {inner for name in layer.adapter_layer_names for inner in getattr(layer, name)}


def parameters_of(layer: BaseTunerLayer, inner: str) -> dict[str, nn.Parameter]:
    """Give the weights of an adapter in a PEFT layer, by the names that they have in an adapter's file."""
    found = {}
    for name, parameter in layer.named_parameters():
        path = name.split(".")
        if inner in path:
            kind = ".".join(step for step in path if step != inner)
            # PEFT's own files call it so
            found[kind.replace("magnitude_vector.weight", "magnitude_vector")] = parameter
    return found


def remove_layers(unet: InflatedUNet, inner: str) -> None:
    """Take one PEFT adapter off; layers that carry no other become the plain modules they wrapped."""
    for path, layer in layers_of(unet):
        if inner in adapters_on(layer):
            # else PEFT chooses another itself
            layer.set_adapter([n for n in layer.active_adapters if n != inner])
            layer.delete_adapter(inner)
        if not adapters_on(layer):
            parent, _, child = path.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer.get_base_layer())
    configs = getattr(unet, "peft_config", {})
    configs.pop(inner, None)
    if not configs and hasattr(unet, "peft_config"):
        del unet.peft_config
        unet._hf_peft_config_loaded = False


def is_added(name: str) -> bool:
    """Tell whether a module or parameter came with an adapter."""
    return ".lora_" in name or ".tav_slot_" in name


def base_layer(module: nn.Module) -> nn.Module:
    """Give the module that a PEFT layer wraps, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def module_names(unet: InflatedUNet) -> list[str]:
    """List the modules of a UNet without what came with adapters."""
    return [name for name, _ in unet.named_modules() if ".base_layer" not in name and not is_added(name)]


def parameter_of(unet: InflatedUNet, name: str) -> nn.Parameter:
    """Give a parameter of the UNet itself by its name, also where a PEFT layer wraps its module."""
    module, _, kind = name.rpartition(".")
    parameter = getattr(base_layer(unet.get_submodule(module)), kind)
    assert isinstance(parameter, nn.Parameter)
    return parameter
