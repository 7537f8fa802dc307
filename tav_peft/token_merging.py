"""Token merging: positions that look alike go through ST-Attn as one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tav_peft.conditions import Conditions
from tav_peft.errors import TavError
from tav_peft.other_forward import other_forward
from tav_peft.shapes import Latents, Tokens
from tav_peft.unet.attention import SpatioTemporalAttention
from tav_peft.unet.inflation import InflatedUNet

MOST = 0.75  # one position of each cell of 2 x 2 must stay


class TokenMerging:
    """A prediction whose ST-Attn, where it sees each position of the latents, sees `share` of them merged into others.

    In each cell of 2 x 2 positions one stays; of the other positions those most like one that stays, by the cosine of
    what attention is given, are averaged into it, and get its output (Bolya and Hoffman 2023, sections 4 and 5). Each
    frame is merged by itself. Blocks of fewer positions, cross-attention and T-Attn see all. `predict` is the plain
    prediction.

    Raises:
        TavError: for a share outside of [0, 0.75].

    """

    def __init__(self, unet: InflatedUNet, predict: Callable[..., Latents], share: float) -> None:
        if not 0 <= share <= MOST:
            raise TavError(f"merge_tokens {share:g}: give a share of the positions from 0 to {MOST}.")
        self._predict, self._share = predict, share
        self._attentions = [m for m in unet.modules() if isinstance(m, SpatioTemporalAttention)]

    def __call__(
        self, latents: Latents, timestep: Tensor | int, conditions: Conditions, **residuals: Any
    ) -> Latents:
        """Predict as `predict` does, with merged positions."""
        height, width = latents.shape[-2:]
        with self._merging(height, width):
            return self._predict(latents, timestep, conditions, **residuals)

    @contextlib.contextmanager
    def _merging(self, height: int, width: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for attention in self._attentions:
                forward = self._merged(attention.forward, height, width)
                stack.enter_context(other_forward(attention, forward))
            yield

    def _merged(self, forward: Callable[..., Tokens], height: int, width: int) -> Callable[..., Tokens]:
        def merged(tokens: Tokens, *args: Any, **kwargs: Any) -> Tokens:
            if tokens.shape[1] != height * width:
                return forward(tokens, *args, **kwargs)
            merge = Merge(tokens, height, width, self._share)
            return merge.undone(forward(merge.done(tokens), *args, **kwargs))

        return merged


class Merge:
    """Which positions of some frames are averaged into which."""

    def __init__(self, tokens: Tokens, height: int, width: int, share: float) -> None:
        """Match tokens (batch·frames, height·width, width of the block), `share` of which are to go."""
        staying, free = (places.to(tokens.device) for places in _places(height, width))
        unit = F.normalize(tokens.float(), dim=-1)
        alike, nearest = (unit[:, free] @ unit[:, staying].transpose(1, 2)).max(dim=-1)
        order = alike.argsort(dim=-1, descending=True, stable=True)  # (batch·frames, free)
        gone = min(len(free), int(share * height * width))
        self._staying = staying
        self._gone, self._alone = free[order[:, :gone]], free[order[:, gone:]]
        self._into = nearest.gather(1, order[:, :gone])  # as places in `staying`

    def done(self, tokens: Tokens) -> Tokens:
        """Give what is left: the positions that stay, averaged with what goes into them, then those left alone."""
        into = _wide(self._into, tokens)
        stayed = tokens[:, self._staying].scatter_reduce(1, into, self._of(tokens, self._gone), "mean")
        return torch.cat([stayed, self._of(tokens, self._alone)], dim=1)

    def undone(self, tokens: Tokens) -> Tokens:
        """Put what came of the positions back; those that went into another get that one's."""
        stayed, alone = tokens[:, : len(self._staying)], tokens[:, len(self._staying) :]
        count = len(self._staying) + self._gone.shape[1] + self._alone.shape[1]
        out = tokens.new_empty(len(tokens), count, tokens.shape[2])
        out[:, self._staying] = stayed
        out.scatter_(1, _wide(self._gone, tokens), stayed.gather(1, _wide(self._into, tokens)))
        return out.scatter_(1, _wide(self._alone, tokens), alone)

    @staticmethod
    def _of(tokens: Tokens, index: Tensor) -> Tokens:
        return tokens.gather(1, _wide(index, tokens))


def _wide(index: Tensor, tokens: Tokens) -> Tensor:
    """Say (batch·frames, n) of each channel too."""
    return index[:, :, None].expand(-1, -1, tokens.shape[2])


@functools.cache
def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """List the position of each cell of 2 x 2 that stays, and all others.

    Which one stays is drawn, but always the same, so that no grid shows.
    """
    rows, columns = height // 2, width // 2
    drawn = torch.randint(4, (rows, columns), generator=torch.Generator().manual_seed(0))
    row = 2 * torch.arange(rows)[:, None] + drawn // 2
    column = 2 * torch.arange(columns)[None] + drawn % 2
    staying = (row * width + column).flatten()
    others = torch.ones(height * width, dtype=torch.bool)
    others[staying] = False
    return staying, others.nonzero()[:, 0]
