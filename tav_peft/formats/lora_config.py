"""What a PEFT config says of a LoRA, LoHa or LoKr that another tool made: rank and alpha of each module."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from tav_peft.errors import AdapterError

# fields that change how a LoRA is trained, found or called, not what its tensors are
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "decompose_both", "decompose_factor", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform",
    "lora_dropout", "megatron_config", "megatron_core", "module_dropout", "peft_type", "peft_version", "rank_dropout",
    "rank_dropout_scale", "revision", "runtime_config", "target_modules", "task_type", "use_effective_conv2d",
}  # fmt: skip
_READ = {"r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
_TYPES = ("LORA", "LOHA", "LOKR")
# others change the base's weights before the training, and the update counts from those
_INITS = (None, True, False, "true", "gaussian", "eva")


class LoraConfigText:
    """Rank and alpha by module, as a config in JSON says them.

    Raises:
        AdapterError: when it is damaged, or has something that decides the update and is not read here.

    """

    def __init__(self, text: str, file: str, *, prefix: str = "") -> None:
        try:
            given = json.loads(text)
            given = {
                key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)
            }
            self._rank, self._alpha = (
                int(given.get("r", 8)),
                float(given.get("lora_alpha", given.get("alpha", 8))),
            )
            self._ranks = {str(k): int(v) for k, v in (given.get("rank_pattern") or {}).items()}
            self._alphas = {str(k): float(v) for k, v in (given.get("alpha_pattern") or {}).items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterError(f"{file}: its LoRA config is damaged ({error}). Ask for it again.") from None
        self.root, self.dora = bool(given.get("use_rslora")), bool(given.get("use_dora"))
        self.type = given.get("peft_type", "LORA")
        _check(given, self.type, file)

    def rank(self, module: str) -> int:
        """Give the rank of a module."""
        return self._ranks.get(get_pattern_key(list(self._ranks), module), self._rank)

    def alpha(self, module: str) -> float:
        """Give the alpha of a module for which alpha/r is its scale, for rsLoRA too (Kalajdzievski 2023)."""
        alpha = self._alphas.get(get_pattern_key(list(self._alphas), module), self._alpha)
        return alpha * (math.sqrt(self.rank(module)) if self.root else 1)


def _check(given: Mapping[str, Any], kind: Any, file: str) -> None:
    if kind not in _TYPES:
        raise AdapterError(f"{file} is a PEFT adapter of type {kind}. LoRA, LoHa and LoKr are read.")
    begin = given.get("init_lora_weights")
    if begin not in _INITS:
        raise AdapterError(
            f"{file} was initialised by {begin}, which changes the base's weights first, so that its update counts from "
            "weights that no one has. Have it saved as a plain LoRA (PEFT: path_initial_model_for_weight_conversion)."
        )
    known, usual = _HARMLESS | _READ | {"init_lora_weights"}, LoraConfig().to_dict()
    others = sorted(k for k, v in given.items() if v and k not in known and v != usual.get(k))
    if others:
        raise AdapterError(
            f"{file}: its config has {', '.join(others)}, which decides its update and is not read."
        )
