"""Feature injection: the source's own attention and features in the place of the edit's, to keep its layout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tav_peft.conditions import Conditions, joined
from tav_peft.errors import TavError
from tav_peft.inversion import Inversion
from tav_peft.recipe import EditingSection
from tav_peft.shapes import Latents
from tav_peft.unet.attention import SpatioTemporalAttention
from tav_peft.unet.inflation import InflatedUNet

_DECODER = "up_blocks"
_LEVEL = 1  # of the decoder, from which on the source is injected; SD 1.x has four levels


@dataclasses.dataclass(frozen=True)
class Injection:
    """For which share of the steps, from the noise end, the source is injected (Tumanyan et al. 2023, algorithm 1).

    `attention` is of the queries and keys of self-attention in the decoder, `features` of one residual block in it.
    The paper's are 0.5 and 0.8. With a depth below 1 the steps that are left out count too.

    Raises:
        TavError: for shares outside of 0 to 1.

    """

    attention: float = 0.5
    features: float = 0.8

    def __post_init__(self) -> None:
        for name, share in dataclasses.asdict(self).items():
            if not 0 <= share <= 1:
                raise TavError(f"{name} {share:g}: give a share of the steps from 0 to 1.")


def injection_of(how: EditingSection) -> Injection | None:
    """Give what a recipe's settings inject: nothing where features are reused or merged."""
    elsewhere = how.reuse_features != 1 or how.merge_tokens > 0
    if elsewhere or not (how.inject_attention or how.inject_features):
        return None
    return Injection(how.inject_attention, how.inject_features)


@dataclasses.dataclass(frozen=True, eq=False)
class Injector:
    """A prediction with the source's features in it; an injected step has one more row, the source's, first.

    `predict` is the plain prediction, of all frames or of windows of them, `nothing` the conditions of the empty
    prompt, with which the source was inverted. `timesteps` are the inversion's, the cleanest first.
    """

    injection: Injection
    unet: InflatedUNet
    inversion: Inversion
    timesteps: Sequence[int]
    nothing: Conditions
    predict: Callable[..., Latents]

    def __call__(
        self, latents: Latents, timestep: Tensor | int, conditions: Conditions, **residuals: Any
    ) -> Latents:
        """Predict as `predict` does, from the source's features wherever this step asks for them.

        Raises:
            TavError: when the inversion has no latents at this timestep.

        """
        modules = self._modules(int(timestep))
        if not modules:
            return self.predict(latents, timestep, conditions, **residuals)
        source = self.inversion.trajectory[self.timesteps.index(int(timestep)) + 1][None]
        rows = torch.cat([source.to(latents.device, latents.dtype), latents])
        steered = {name: _and_none(each, latents.shape[2]) for name, each in residuals.items()}
        with first_row_for_all(modules, len(rows)):
            return self.predict(rows, timestep, joined(self.nothing, conditions), **steered)[1:]

    def _modules(self, timestep: int) -> list[nn.Module]:
        """List the modules whose outputs are the source's at a timestep."""
        if timestep not in self.timesteps:
            raise TavError(
                f"To inject the source the sampler must walk the inversion's timesteps, and {timestep} is none of them. "
                "Use DDIM, Euler or DPM-Solver++ without noise levels of its own."
            )
        before = (
            len(self.timesteps) - 1 - self.timesteps.index(timestep)
        )  # steps from the noise end to this one
        modules: list[nn.Module] = []
        if before < round(self.injection.attention * len(self.timesteps)):
            modules += attention_modules(self.unet)
        if before < round(self.injection.features * len(self.timesteps)):
            modules += feature_modules(self.unet)
        return modules


def attention_modules(unet: InflatedUNet) -> list[nn.Module]:
    """List the query and key projections of self-attention in the decoder's finer levels.

    As in the paper's layers 4 to 11 of SD 1.x: all of them but the first of the coarsest level that has attention.
    """
    chosen = [
        module
        for level in unet.up_blocks[_LEVEL:]
        for module in level.modules()
        if isinstance(module, SpatioTemporalAttention)
    ]
    return [projection for each in chosen[1:] or chosen for projection in (each.to_q, each.to_k)]


def feature_modules(unet: InflatedUNet) -> list[nn.Module]:
    """Give the residual branch whose output is injected: of the decoder's layer 4 in SD 1.x, before it is added."""
    resnets: Any = unet.up_blocks[_LEVEL].resnets
    return [resnets[min(1, len(resnets) - 1)].conv2]


@contextlib.contextmanager
def first_row_for_all(modules: Sequence[nn.Module], rows: int) -> Iterator[None]:
    """Have modules give what they give for the first of `rows`, (rows·frames, …), in every row for a while."""

    def repeated(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.unflatten(0, (rows, -1))[:1].expand(rows, *[-1] * output.ndim).flatten(0, 1)

    handles = [module.register_forward_hook(repeated) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _and_none(residual: Any, frames: int) -> Any:
    """Put zeros for a row before tensors (batch·frames, …), alone or in a list: the source is not steered."""
    if isinstance(residual, Tensor):
        return torch.cat([torch.zeros_like(residual[:frames]), residual])
    return [_and_none(each, frames) for each in residual]
