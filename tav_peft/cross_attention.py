"""Where a word of the caption is in the clip: a mask from the cross-attention of the tuned UNet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tav_peft.conditions import token_places
from tav_peft.errors import TavError
from tav_peft.inversion import Inversion
from tav_peft.pipeline import TuneAVideoPipeline

DEPTHS = (0.1, 0.2, 0.35)  # of the noise at which the UNet is asked; near the noise end it sees no places
SIDES = (8, 32)  # positions along a layer's longer side; finer layers see textures, coarser ones no outlines
THRESHOLD = 0.35  # of a frame's strongest attention
DISTINCT = 2.0  # the strongest twentieth of a map against its median, which is 1 where all places look alike


class RecordingProcessor:
    """Computes attention as diffusers' plain processor does, and keeps how much each position looks at some tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self.seen: list[Tensor] = []  # (batch·frames, positions) each

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend from (batch·frames, positions, width) to the text's tokens."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(projected)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        weights = attn.get_attention_scores(query, key, attention_mask)  # (b f heads) n tokens
        per_head = weights[..., self._tokens].sum(-1).unflatten(0, (-1, attn.heads))
        self.seen.append(per_head.mean(dim=1).float())
        out = attn.batch_to_head_dim(torch.bmm(weights, value))
        return attn.to_out[1](attn.to_out[0](out))


@torch.no_grad()
def attention_map(pipe: TuneAVideoPipeline, inversion: Inversion, caption: str, word: str) -> Tensor:
    """Measure how much each place of an inverted clip looks at a word of its caption, (frames, height, width) of latents.

    The mean over heads, over the layers of middle size, and over some noise levels of the source's own trajectory (Hertz
    et al. 2023, section 3; Tang et al. 2023), scaled so that a frame's strongest is 1.

    Raises:
        TavError: when the caption does not have the word, the UNet does not look for it in one place, or has no
            cross-attention.

    """
    places = token_places(pipe.tokenizer, caption, word)
    size = inversion.trajectory.shape[-2:]
    told = pipe.encode_prompts([caption], size=pipe.pixel_size(inversion.clean))
    maps = []
    for depth in DEPTHS:
        row = min(max(1, round(depth * inversion.num_inference_steps)), len(inversion.trajectory) - 1)
        latents = inversion.trajectory[row][None].to(pipe.device, pipe.unet.dtype)
        with recording(pipe.unet, places) as processors:
            pipe.predict(latents, pipe.timesteps(inversion.num_inference_steps)[row - 1], told)
        for processor in processors:
            maps += [_as_picture(seen, size) for seen in processor.seen]
    middle = [each for each in maps if SIDES[0] <= max(each.shape[-2:]) <= SIDES[1]]
    sized = [F.interpolate(each[:, None], size, mode="bilinear")[:, 0] for each in middle or maps]
    mean = torch.stack(sized).mean(dim=0)
    strongest, usual = torch.quantile(mean.flatten(), torch.tensor([0.95, 0.5], device=mean.device))
    if strongest < DISTINCT * usual:
        raise TavError(
            f"The model does not look for {word!r} in one place of this clip, so there is no mask of it. Give the words "
            "after it too, where a text encoder may keep its meaning, or a mask as a picture or video."
        )
    low, high = mean.amin(dim=(1, 2), keepdim=True), mean.amax(dim=(1, 2), keepdim=True)
    return ((mean - low) / (high - low).clamp(min=1e-12)).cpu()


def attention_mask(
    pipe: TuneAVideoPipeline,
    inversion: Inversion,
    caption: str,
    word: str,
    *,
    threshold: float = THRESHOLD,
    grow: int = 1,
) -> Tensor:
    """Make a mask of where a word is, (frames, height, width) of latents: 1 where the clip is to be edited.

    `grow` widens it by that many latents, since what comes in the object's place has another outline.

    Raises:
        TavError: as `attention_map`, and for a threshold outside of 0 to 1.

    """
    if not 0 < threshold < 1:
        raise TavError(f"threshold {threshold:g}: give more than 0 and less than 1.")
    there = (attention_map(pipe, inversion, caption, word) >= threshold).float()
    return F.max_pool2d(there[:, None], 2 * grow + 1, stride=1, padding=grow)[:, 0]


@contextlib.contextmanager
def recording(unet: nn.Module, tokens: Sequence[int]) -> Iterator[list[RecordingProcessor]]:
    """Record every cross-attention of a UNet for a while."""
    attentions: list[Any] = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    if not attentions:
        raise TavError(
            "This UNet has no cross-attention to find a word with. Give a mask as a picture or video."
        )
    before = [attention.processor for attention in attentions]
    processors = [RecordingProcessor(tokens) for _ in attentions]
    try:
        for attention, processor in zip(attentions, processors, strict=True):
            attention.processor = processor
        yield processors
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor


def _as_picture(seen: Tensor, size: torch.Size) -> Tensor:
    """Lay positions out as (frames, height, width); the UNet halves, rounding up, until there are as few."""
    height, width = size
    while height * width > seen.shape[-1]:
        height, width = (height + 1) // 2, (width + 1) // 2
    return seen.unflatten(-1, (height, width))
