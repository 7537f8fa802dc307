"""The trainable subset of an inflated UNet, ready for an optimizer, and given back as an adapter's tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tav_peft.errors import TuningError
from tav_peft.method_updates import shapes
from tav_peft.methods import json_config
from tav_peft.presets import Subset
from tav_peft.recipe import PeftMethod
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.unet.peft_layers import (
    inject_layers,
    layers_config,
    layers_of,
    parameters_of,
    remove_layers,
)

_INNER = "tav_tuning"  # the adapter's name inside PEFT while it is trained


@dataclasses.dataclass(frozen=True, eq=False)
class Trainable:
    """Parameters under training, by the name their tensor has in an adapter, with what they started from."""

    parameters: dict[str, nn.Parameter]
    originals: dict[str, Tensor]
    peft_config: Mapping[str, Any] | None

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Copy the adapter's tensors: a query projection as its update, all else as it is."""
        return {
            name: (p.detach() - self.originals[name] if name.endswith(".diff") else p.detach()).to(
                "cpu", dtype
            )
            for name, p in self.parameters.items()
        }


@contextlib.contextmanager
def trainable(
    unet: InflatedUNet,
    subset: Subset,
    *,
    rank: int,
    alpha: float | None = None,
    method: PeftMethod = "lora",
    seed: int = 0,
) -> Iterator[Trainable]:
    """Make only `subset` of a UNet trainable, in float32, and leave the UNet as it was at the end.

    `seed` draws what a method draws, such as a LoRA's A matrices; the UNet starts as it was.

    Raises:
        RecipeError: when the method cannot tune the subset, or not with this rank and alpha.
        TuningError: when the subset is empty on this UNet, or the method does not fit its widths.

    """
    flags = {name: p.requires_grad for name, p in unet.named_parameters()}
    training = unet.training
    names = [name for name, _ in unet.named_modules()]
    config = subset.peft_config(names, rank=rank, alpha=alpha, method=method)
    dense = {module: unet.get_submodule(module) for module in subset.dense_modules(names)}
    if not dense and not subset.lora_modules(names):
        raise TuningError(
            f"This base has no {', '.join(subset.parts)} in its {', '.join(subset.blocks)} blocks."
        )
    plain = None if config is None else json_config(config)
    _check_widths(unet, subset.lora_modules(names), plain, method)
    unet.requires_grad_(False)
    parameters = {} if plain is None else _injected(unet, plain, seed)
    for module, linear in dense.items():
        for kind, parameter in linear.named_parameters():
            is_query = module.endswith(("attn1.to_q", "attn2.to_q"))
            parameters[f"{module}.diff" if is_query else f"{module}.{kind}"] = parameter
    before = {name: p.data for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_(True)
    originals = {name: data.float() for name, data in before.items() if name.endswith(".diff")}
    try:
        yield Trainable(parameters, originals, plain)
    finally:
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = before[name], None
        remove_layers(unet, _INNER)
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(flags[name])
        unet.train(training)


def _injected(unet: InflatedUNet, config: Mapping[str, Any], seed: int) -> dict[str, nn.Parameter]:
    """Put a method's layers onto the UNet, and give what they train."""
    inject_layers(unet, layers_config(config), _INNER, seed=seed)
    return {
        f"{path}.{kind}": parameter
        for path, layer in layers_of(unet, _INNER)
        for kind, parameter in parameters_of(layer, _INNER).items()
    }


def _check_widths(
    unet: InflatedUNet, modules: list[str], config: Mapping[str, Any] | None, method: str
) -> None:
    """Refuse what a method cannot do before anything changes."""
    widths = {unet.get_submodule(module).in_features for module in modules}
    try:
        for width in widths:
            shapes(config or {}, width, max(widths))
    except ValueError as error:
        raise TuningError(f"{method} does not fit this base: {error}. Choose another adapter.rank.") from None
