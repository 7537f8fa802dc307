"""The trainable subset of an inflated UNet, ready for an optimizer, and given back as an adapter's tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tav_peft.errors import TuningError
from tav_peft.presets import Subset, json_config
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.unet.peft_layers import inject_layers, layers_of, lora_config, remove_layers

_INNER = "tav_tuning"  # the LoRA's name inside PEFT while it is trained


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
    unet: InflatedUNet, subset: Subset, *, rank: int, alpha: float | None = None, seed: int = 0
) -> Iterator[Trainable]:
    """Make only `subset` of a UNet trainable, in float32, and leave the UNet as it was at the end.

    `seed` draws the LoRA's A matrices; B starts at 0.

    Raises:
        TuningError: when the subset is empty on this UNet.

    """
    flags = {name: p.requires_grad for name, p in unet.named_parameters()}
    training = unet.training
    names = [name for name, _ in unet.named_modules()]
    config = subset.peft_config(names, rank=rank, alpha=alpha)
    dense = {module: unet.get_submodule(module) for module in subset.dense_modules(names)}
    if not dense and not subset.lora_modules(names):
        raise TuningError(
            f"This base has no {', '.join(subset.parts)} in its {', '.join(subset.blocks)} blocks."
        )
    unet.requires_grad_(False)
    plain = None if config is None else json_config(config)
    parameters: dict[str, nn.Parameter] = {}
    if plain is not None:
        inject_layers(unet, lora_config(plain), _INNER, seed=seed)
        for path, layer in layers_of(unet, _INNER):
            for kind in ("lora_A", "lora_B"):
                parameters[f"{path}.{kind}.weight"] = getattr(layer, kind)[_INNER].weight
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
