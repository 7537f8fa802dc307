"""Updates ΔW of the modules that were tuned by another of PEFT's methods than LoRA, as PEFT's own layers make them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tav_peft.adapter import LATENTS, Adapter, split_name
from tav_peft.errors import AdapterError
from tav_peft.methods import METHODS, is_lora, method_of, read_config
from tav_peft.tensor_file import LazyTensors, layout_of
from tav_peft.unet.peft_layers import inject, parameters_of

_INNER = "made"  # the adapter's name inside PEFT
_WIDEST = 2**14  # no base has wider blocks; a header that says so would ask for more memory than there is


class MethodUpdates(LazyTensors):
    """ΔW in float32 by the name of the UNet's weight, made when it is asked for; none of LoRAs and dense updates.

    `weight` gives the base's own weight, which methods need that turn it. `name` is what errors call the adapter.

    Raises:
        AdapterError: when tensors are missing or of other shapes than the config asks for on the adapter's base, or the
            method needs weights and none were given.

    """

    def __init__(self, adapter: Adapter, name: str, weight: Callable[[str], Tensor] | None = None) -> None:
        self._config = adapter.peft_config
        self._tensors, self._weight = adapter.tensors, weight
        widths = modules_by_method(adapter, name)
        self._largest = max(widths.values(), default=0)
        self.layout = {
            f"{module}.weight": torch.empty(width, width, device="meta") for module, width in widths.items()
        }
        if widths and METHODS[adapter.method].turns and weight is None:
            raise AdapterError(
                f"{name} is tuned by {adapter.method}, which turns the base's weights: without them it has no update. "
                "Use it with `tav edit`, or export it as peft, or with its base as official or inflated."
            )

    @torch.no_grad()
    def __getitem__(self, parameter: str) -> Tensor:
        module, (width, _) = parameter.removesuffix(".weight"), self.layout[parameter].shape
        before = torch.zeros(width, width)
        if self._weight is not None:
            # a copy: PEFT merges in place
            before = self._weight(parameter).detach().to("cpu", torch.float32, copy=True)
        assert self._config is not None
        layer = _layer(self._config, before.clone(), self._largest)
        for kind, place in parameters_of(layer, _INNER).items():
            place.copy_(self._tensors[f"{module}.{kind}"])
        layer.merge()
        merged: Tensor = layer.get_base_layer().weight
        return merged.detach() - before


def modules_by_method(adapter: Adapter, name: str) -> dict[str, int]:
    """Give the modules that another method than LoRA tuned, with their widths, each with the tensors that it needs.

    Raises:
        AdapterError: when tensors are missing or of other shapes than the config asks for on the adapter's base.

    """
    config, found = adapter.peft_config, dict[str, dict[str, tuple[int, ...]]]()
    if config is None or is_lora(config):
        return {}
    for tensor, like in layout_of(adapter.tensors).items():
        module, kind = ("", "") if tensor == LATENTS else split_name(tensor)
        if kind in METHODS[adapter.method].kinds:
            found.setdefault(module, {})[kind] = tuple(like.shape)
    widths = {module: width_of(module, adapter.provenance.base.architecture, name) for module in found}
    for module, there in found.items():
        try:
            expected = shapes(config, widths[module], max(widths.values()))
        except ValueError as error:
            raise AdapterError(f"{name}: {error}. The file was changed; ask for it again.") from None
        if there != expected:
            raise AdapterError(
                f"{name}: {module} has {adapter.method} tensors of {there}, its config asks for {expected} on its base. "
                "The file was changed; ask for it again."
            )
    return widths


def shapes(config: Mapping[str, Any], width: int, largest: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what a method trains in a linear layer of this width, where the widest layer has `largest`.

    Raises:
        ValueError: when the method cannot be had there.

    """
    return dict(_shapes(json.dumps(config, sort_keys=True), width, largest))


@functools.lru_cache(maxsize=256)
def _shapes(config: str, width: int, largest: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    given = json.loads(config)
    block = given.get("oft_block_size", 1)
    if width % block:
        raise ValueError(f"blocks of {block} do not divide a width of {width}")
    if given["peft_type"] == "MISS" and given["r"] > width:
        raise ValueError(f"a rank of {given['r']} is more than the width of {width}")
    with torch.device("meta"):
        layer = _layer(given, torch.empty(width, width), largest)
    return tuple((kind, tuple(each.shape)) for kind, each in parameters_of(layer, _INNER).items())


def width_of(module: str, architecture: Mapping[str, Any], file: str) -> int:
    """Give the width of the block that a module is in, by what an adapter says of its base.

    Raises:
        AdapterError: when it says nothing of such a block.

    """
    group, level = module.split(".")[:2]
    try:
        channels = architecture["block_out_channels"]
        width = (
            channels[-1]
            if group == "mid_block"
            else channels[:: -1 if group == "up_blocks" else 1][int(level)]
        )
    except (KeyError, IndexError, TypeError, ValueError):
        width = 0
    if not (isinstance(width, int) and 0 < width <= _WIDEST):
        raise AdapterError(
            f"{file}: its base has no block for {module}. The file was changed; ask for it again."
        )
    return width


class _Stand(nn.Module):
    """The layer that is wrapped, and one as wide as the widest, by which VeRA draws what all share."""

    def __init__(self, weight: Tensor, largest: int) -> None:
        super().__init__()
        self.layer = _linear(weight)
        self.largest = _linear(weight.new_zeros(1, 1).expand(largest, largest))


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _layer(config: Mapping[str, Any], weight: Tensor, largest: int) -> BaseTunerLayer:
    """Wrap a weight (width, width) by a config's method."""
    targets = ["layer", "largest"] if method_of(config) == "vera" else ["layer"]
    stand = _Stand(weight, largest)
    inject(stand, read_config({**config, "target_modules": targets, "modules_to_save": None}), _INNER)
    layer: Any = stand.layer
    return layer
