"""Small mistakes made on purpose, to see that the comparisons would have found them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import ModelSection
from tav_peft.unet.inflation import InflatedUNet

from .comparing import Comparison, compare
from .double_precision import tolerance
from .recordings import Recording
from .unet import calls

_CALL = "out_random"  # the call that every mistake is made in


def _variant(**settings: Any) -> Callable[[InflatedUNet], None]:
    return lambda unet: setattr(unet, "variant", ModelSection(**settings))


def _epsilon(end: str, value: float) -> Callable[[InflatedUNet], None]:
    def change(unet: InflatedUNet) -> None:
        for name, module in unet.named_modules():
            if name.endswith(end) and isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.eps = value

    return change


@torch.no_grad()
def _leave_t_attn_out(unet: InflatedUNet) -> None:
    for name, parameter in unet.named_parameters():
        if ".attn_temp.to_out.0." in name:
            parameter.zero_()


@torch.no_grad()
def _nudge(unet: InflatedUNet) -> None:
    bias = next(p for name, p in unet.named_parameters() if name.endswith("attn_temp.to_out.0.bias"))
    bias[0] += 1e-6


MISTAKES: dict[str, Callable[[InflatedUNet], None]] = {
    "T-Attn left out": _leave_t_attn_out,
    "attention to all former frames": _variant(attention="causal"),
    "GroupNorm by frame": _variant(group_norm="frame"),
    "ε 1e-6, not 1e-5, in the residual blocks' second norms": _epsilon(".norm2", 1e-6),
    "ε 1e-5, not 1e-6, in the transformers' norms": _epsilon(".norm", 1e-5),
    "ε 1e-6, not 1e-5, in T-Attn's norms": _epsilon(".norm_temp", 1e-6),
    "1e-6 added to one bias of one T-Attn": _nudge,
}


@dataclass(frozen=True)
class Seen:
    """What a mistake does to one call in float64: its distance from the record, and from the original's distance.

    `compared` has what would be allowed in float32, `apart_allowed` what is in float64 (see double_precision).
    """

    name: str
    compared: Comparison
    apart: float
    apart_allowed: float


class _Mistaken(Recording):
    def __init__(self, folder: Path, change: Callable[[InflatedUNet], None]) -> None:
        super().__init__(folder)
        self._change = change

    def pipe(self, t_attn: str | None = None, *, dtype: torch.dtype = torch.float32) -> TuneAVideoPipeline:
        pipe = super().pipe(t_attn, dtype=dtype)
        self._change(pipe.unet)
        return pipe


@torch.no_grad()
def seen(recording: Recording) -> Iterator[Seen]:
    """Make each mistake in one recorded call, for recordings with a noise floor."""
    theirs = recording.take("forward", _CALL)
    floor = recording.noise_floor[f"forward {_CALL}"]["max_abs"]
    for name, change in MISTAKES.items():
        call = calls(_Mistaken(recording.folder, change), torch.float64)[_CALL]
        compared = compare(recording, "forward", name, call(), theirs)
        yield Seen(name, compared, abs(compared.largest / floor - 1), tolerance(recording))
