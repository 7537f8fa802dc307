"""Feature reuse: the UNet's deep blocks computed at some steps only, their outputs given again at the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from tav_peft.conditions import Conditions
from tav_peft.errors import TavError
from tav_peft.other_forward import other_forward
from tav_peft.shapes import Latents
from tav_peft.unet.inflation import InflatedUNet


class FeatureReuse:
    """A prediction that computes all of the UNet at every `interval`-th step only (Ma et al. 2024, DeepCache).

    At the steps between, only the first block of the encoder and the last of the decoder see the new latents; whatever
    lies below them gives what it gave last. `predict` is the plain prediction. A run of sampling begins where the
    timestep rises; with another number of rows everything is computed too.

    Raises:
        TavError: for an interval below 1.

    """

    def __init__(self, unet: InflatedUNet, predict: Callable[..., Latents], interval: int) -> None:
        if interval < 1:
            raise TavError(f"reuse_features {interval}: give 1, which reuses nothing, or more.")
        self._predict, self._interval = predict, interval
        self._deep: list[nn.Module] = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
        self._kept: dict[nn.Module, Any] = {}
        self._steps, self._timestep, self._rows = 0, -1, 0

    def __call__(
        self, latents: Latents, timestep: Tensor | int, conditions: Conditions, **residuals: Any
    ) -> Latents:
        """Predict as `predict` does, or with the last outputs of the deep blocks."""
        if int(timestep) > self._timestep or len(latents) != self._rows:
            self._steps = 0
        act = self._reusing if self._steps % self._interval else self._keeping
        self._steps, self._timestep, self._rows = self._steps + 1, int(timestep), len(latents)
        with act():
            return self._predict(latents, timestep, conditions, **residuals)

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Remember what the deep blocks give."""
        handles = [
            block.register_forward_hook(lambda block, _, output: self._kept.__setitem__(block, output))
            for block in self._deep
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _reusing(self) -> Iterator[None]:
        """Give what the deep blocks gave last, without computing it."""
        with contextlib.ExitStack() as stack:
            for block in self._deep:
                again = lambda *_, block=block, **__: self._kept[block]  # noqa: E731
                stack.enter_context(other_forward(block, again))
            yield
