"""An adapter's updates ΔW, one for each parameter of the UNet that it changes, whatever the form of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from tav_peft.adapter import LATENTS, Adapter, split_name
from tav_peft.errors import AdapterError
from tav_peft.method_updates import MethodUpdates
from tav_peft.methods import METHODS, is_lora, read_config
from tav_peft.presets import PARTS, part_of
from tav_peft.recipe import Part
from tav_peft.tensor_file import LazyTensors, layout_of
from tav_peft.unet import temporal_init
from tav_peft.unet.inflation import is_temporal

_BLOCK = re.compile(r"(.*transformer_blocks\.\d+)\..*")


class Updates(LazyTensors):
    """ΔW in float32 by the name of the UNet's parameter; nothing is read before it is asked for.

    Of a LoRA it is scale·B·A, a dense query update is one itself, and of a dense T-Attn it is W - W0 with the initial
    value W0 of its seed; of other methods see `method_updates`. `name` is what errors call the adapter, and `weight`
    gives the base's own weights, which methods need that turn them.

    Raises:
        AdapterError: when tensors are missing or too many, the LoRA has biases, or the method needs a base.

    """

    def __init__(self, adapter: Adapter, name: str, weight: Callable[[str], Tensor] | None = None) -> None:
        self.adapter = adapter
        self.name = name
        self._made = MethodUpdates(adapter, name, weight)
        low = adapter.peft_config is not None and is_lora(adapter.peft_config)
        self._config = read_config(adapter.peft_config or {}) if low else None
        if self._config is not None and self._config.lora_bias:
            raise AdapterError(
                f"{name} is a LoRA with biases, whose update is not scale·B·A alone. Retune without."
            )
        self._tensors = layout_of(adapter.tensors)
        self.layout = dict(self._made.layout)
        for given in self._tensors:
            if given == LATENTS:
                continue
            module, kind = split_name(given)
            if kind == "lora_B.weight":
                rows, columns = self._tensors[given].shape[0], self._columns(module)
                self.layout[f"{module}.weight"] = torch.empty(rows, columns, device="meta")
            elif kind in ("diff", "weight", "bias"):
                parameter = f"{module}.weight" if kind == "diff" else given
                self.layout[parameter] = torch.empty(self._tensors[given].shape, device="meta")
        self._check_whole()

    @property
    def dtypes(self) -> set[torch.dtype]:
        """In what precisions the adapter's tensors are."""
        return {like.dtype for name, like in self._tensors.items() if name != LATENTS}

    @property
    def dense_parts(self) -> set[Part]:
        """Parts whose updates are no LoRAs."""
        return {part_of(name.rpartition(".")[0]) for name in self.layout if self.rank(name) is None}

    @property
    def widths(self) -> dict[str, int]:
        """Transformer blocks that it changes, with their widths."""
        widths: dict[str, int] = {}
        for name, like in self.layout.items():
            match = _BLOCK.fullmatch(name)
            assert match is not None
            widths[match[1]] = min(*like.shape, widths.get(match[1], like.shape[0]))
        return widths

    def rank(self, parameter: str) -> int | None:
        """Rank of the LoRA on a parameter, None where its update is dense."""
        A = self._tensors.get(f"{parameter.removesuffix('.weight')}.lora_A.weight")
        return None if A is None or parameter in self._made else A.shape[0]

    def scale(self, parameter: str) -> float:
        """Give what the LoRA on a parameter is multiplied by: alpha/r, or alpha/√r for rsLoRA (Kalajdzievski 2023)."""
        rank = self.rank(parameter)
        assert self._config is not None
        assert rank is not None
        root = math.sqrt(rank) if self._config.use_rslora else rank
        return self._alpha(parameter.removesuffix(".weight")) / root

    def factors(self, parameter: str) -> tuple[Tensor, Tensor]:
        """Give scale·B (out, rank) and A (rank, in) of the LoRA on a parameter."""
        module = parameter.removesuffix(".weight")
        A, B = (self.adapter.tensors[f"{module}.lora_{kind}.weight"].float() for kind in "AB")
        return self.scale(parameter) * B, A

    def alpha(self, parameter: str) -> float:
        """Give the alpha of the LoRA on a parameter for which alpha/r is the scale, also where the config is rsLoRA's."""
        rank, module = self.rank(parameter), parameter.removesuffix(".weight")
        assert self._config is not None
        assert rank is not None
        return self._alpha(module) * (math.sqrt(rank) if self._config.use_rslora else 1)

    def absolute(self, parameter: str) -> Tensor:
        """Give the tuned value W of a T-Attn parameter, in float32."""
        if parameter in self.adapter.tensors:
            return self.adapter.tensors[parameter].float()
        if parameter in self._made:
            return self._initial(parameter) + self._made[parameter]
        B, A = self.factors(parameter)
        return self._initial(parameter) + B @ A

    def __getitem__(self, parameter: str) -> Tensor:
        if parameter in self._made:
            return self._made[parameter]
        if self.rank(parameter) is not None:
            B, A = self.factors(parameter)
            return B @ A
        if is_temporal(parameter):
            return self.absolute(parameter) - self._initial(parameter)
        return self.adapter.tensors[f"{parameter.removesuffix('.weight')}.diff"].float()

    def _initial(self, parameter: str) -> Tensor:
        seed = self.adapter.provenance.temporal_init.seed
        return temporal_init.initial(parameter, self.layout[parameter].shape, seed)

    def _alpha(self, module: str) -> float:
        assert self._config is not None
        alphas = self._config.alpha_pattern
        return float(alphas.get(get_pattern_key(list(alphas), module), self._config.lora_alpha))

    def _columns(self, module: str) -> int:
        A = self._tensors.get(f"{module}.lora_A.weight")
        if A is None:
            raise AdapterError(f"{self.name} has lora_B of {module} without its lora_A. The file is damaged.")
        return A.shape[1]

    def _check_whole(self) -> None:
        """Compare with what its subset says, in the blocks that it has anything of."""
        subset = self.adapter.subset
        expected = {
            f"{block}.{end}"
            for block in self.widths
            for part in subset.parts
            for end in tensor_ends(part, dense=part in subset.dense_parts)
        }
        there = {name for name in self._tensors if name != LATENTS}
        if self.adapter.peft_config is not None and self._config is None:
            # MethodUpdates has compared the tensors in each module
            expected = {name.rsplit(".lora_", 1)[0] for name in expected}
            there = {
                module if kind in METHODS[self.adapter.method].kinds else f"{module}.{kind}"
                for module, kind in map(split_name, there)
            }
        wrong = sorted(expected ^ there)
        if wrong:
            raise AdapterError(
                f"{self.name}: {len(wrong)} tensors are missing or do not belong to its preset {subset.preset}, first "
                f"{wrong[0]}. The file was changed; ask for it again."
            )


class UpdatedTensors(LazyTensors):
    """A checkpoint's tensors with an adapter's updates added, each in its own precision, made when it is asked for.

    `keys` says by the UNet's parameter where the checkpoint has it, for all that the adapter changes in it.

    Raises:
        AdapterError: when the checkpoint lacks one of them, or has it in another shape.

    """

    def __init__(self, tensors: Mapping[str, Tensor], updates: Updates, keys: Mapping[str, str]) -> None:
        self.updates = updates
        self.layout = layout_of(tensors)
        self._tensors = tensors
        self._parameters = {key: parameter for parameter, key in keys.items()}
        for parameter, key in keys.items():
            there = tuple(self.layout[key].shape) if key in self.layout else None
            needed = tuple(updates.layout[parameter].shape)
            if there != needed:
                what = "is missing" if there is None else f"has shape {there}"
                raise AdapterError(
                    f"{key} {what} in the base; {updates.name} needs it with {needed}. Use the base it was tuned for, or "
                    "one like it."
                )

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        if key not in self._parameters:
            return tensor
        updated = (tensor.float() + self.updates[self._parameters[key]]).to(tensor.dtype)
        if not torch.isfinite(updated).all():
            raise AdapterError(
                f"{key} with the update does not fit into {tensor.dtype}. Choose a smaller weight."
            )
        return updated


def tensor_ends(part: Part, *, dense: bool) -> list[str]:
    """List how the names of an adapter's tensors for a part end, after the transformer block's path."""
    if not dense:
        return [f"{end}.lora_{kind}.weight" for end in PARTS[part] for kind in "AB"]
    if part == "t_attn":
        return [*(f"{end}.weight" for end in PARTS[part]), "attn_temp.to_out.0.bias"]
    return [f"{end}.diff" for end in PARTS[part]]
