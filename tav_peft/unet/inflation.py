"""Inflate a 2-D Stable Diffusion UNet to video by changing what its modules know, not by copying its blocks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from tav_peft.errors import BaseModelError
from tav_peft.recipe import FrameAttention, FrameNorm, ModelSection
from tav_peft.shapes import Latents, TextStates
from tav_peft.unet import temporal_init
from tav_peft.unet.attention import FrameSettings, SpatioTemporalAttention


class VideoGroupNorm(nn.GroupNorm):
    """Group normalisation with statistics over all frames of a video together, or over each frame alone."""

    frames: FrameSettings

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (batch·frames, channels, height, width)."""
        if self.frames.count == 1 or self.frames.model.group_norm == "frame":
            return super().forward(x)
        video = x.unflatten(0, (-1, self.frames.count)).transpose(1, 2)  # b c f h w
        return super().forward(video).transpose(1, 2).flatten(0, 1)  # (b f) c h w


class VideoTransformerBlock(BasicTransformerBlock):
    """diffusers' transformer block followed by a residual self-attention over frames (T-Attn)."""

    frames: FrameSettings
    norm_temp: nn.LayerNorm
    attn_temp: Attention

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run attn1, attn2 and the feed-forward, then mix the frames at each position."""
        x = super().forward(*args, **kwargs)  # (b f) n c
        frames, positions = self.frames.count, x.shape[1]
        tracks = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)  # (b n) f c
        tracks = self.attn_temp(self.norm_temp(tracks)) + tracks
        return tracks.unflatten(0, (-1, positions)).transpose(1, 2).flatten(0, 1)  # (b f) n c


class InflatedUNet(UNet2DConditionModel):
    """A `UNet2DConditionModel` over video latents: its weights and names, plus `attn_temp` and `norm_temp`.

    Reproduces `UNet3DConditionModel` of the original implementation (Tune-A-Video, Wu et al. 2023, section 3.2), unless
    its `variant` is another one. All variants have the same weights; `save_pretrained` keeps those, the pipeline's the
    variant too. T-Attn has the initial values of `temporal_seed`, or counts from them where it is `temporal_tuned`.
    """

    _repeated_blocks = ("VideoTransformerBlock",)

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frames = FrameSettings()
        self.temporal_seed: int | None = None
        self.temporal_tuned = False
        _teach_frames(self, self.frames)

    @property
    def variant(self) -> ModelSection:
        """How frames are treated; it may be set at any time."""
        return self.frames.model

    @variant.setter
    def variant(self, model: ModelSection) -> None:
        self.frames.model = model

    @contextlib.contextmanager
    def as_variant(self, model: ModelSection) -> Iterator[None]:
        """Treat frames another way for a while."""
        before, self.frames.model = self.frames.model, model
        try:
            yield
        finally:
            self.frames.model = before

    def forward(
        self,
        sample: Latents,
        timestep: Tensor | float | int,
        encoder_hidden_states: TextStates,
        *,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict noise (or v) for a video, shape (batch, channels, frames, height, width).

        `timestep` is a number or one a video; text states (batch, tokens, width) are shared by a video's frames.
        """
        batch, _, frames = sample.shape[:3]
        self.frames.count = frames

        def per_frame(x: Tensor) -> Tensor:
            return x.repeat_interleave(frames, dim=0) if x.ndim and len(x) == batch else x

        if isinstance(timestep, Tensor):
            timestep = per_frame(timestep)
        if added_cond_kwargs is not None:
            added_cond_kwargs = {name: per_frame(x) for name, x in added_cond_kwargs.items()}
        (folded,) = super().forward(
            sample.transpose(1, 2).flatten(0, 1),  # (b f) c h w
            timestep,
            per_frame(encoder_hidden_states),
            added_cond_kwargs=added_cond_kwargs,
            return_dict=False,
            **kwargs,
        )
        out = folded.unflatten(0, (batch, frames)).transpose(1, 2)  # b c f h w
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    @torch.no_grad()
    def reset_temporal(self, seed: int = temporal_init.DEFAULT_SEED) -> None:
        """Give every `attn_temp` and `norm_temp` its initial value for `seed`."""
        for name, parameter in self.named_parameters():
            if is_temporal(name):
                parameter.copy_(temporal_init.initial(name, parameter.shape, seed))
        self.temporal_seed, self.temporal_tuned = seed, False


def is_temporal(name: str) -> bool:
    """Tell whether a parameter of an inflated UNet is one that the 2-D UNet does not have."""
    return ".attn_temp." in name or ".norm_temp." in name


def inflate(
    unet: UNet2DConditionModel,
    *,
    temporal_seed: int = temporal_init.DEFAULT_SEED,
    attention: FrameAttention = "sparse_causal",
    group_norm: FrameNorm = "joint",
) -> InflatedUNet:
    """Build the video model of a 2-D UNet; the 2-D weights are shared, not copied, and `unet` stays as it is.

    An untuned result treats equal frames exactly as `unet` does: the new temporal attention starts as an identity.
    `attention` and `group_norm` are the result's first `variant`.

    Raises:
        BaseModelError: when the UNet has no self-attention that could be inflated.
        RecipeError: when there is no such attention or group_norm.

    """
    variant = ModelSection().replace(attention=attention, group_norm=group_norm)
    _refuse_unfit(unet)
    with torch.device("meta"):
        inflated: InflatedUNet = InflatedUNet.from_config(unet.config)
    state = dict(unet.state_dict())
    like = next(unet.parameters())
    for name, parameter in inflated.named_parameters():
        if is_temporal(name):
            value = temporal_init.initial(name, parameter.shape, temporal_seed)
            state[name] = value.to(like.device, like.dtype)
    inflated.load_state_dict(state, assign=True)
    inflated.temporal_seed, inflated.variant = temporal_seed, variant
    return inflated.train(unet.training)


def _teach_frames(unet: nn.Module, frames: FrameSettings) -> None:
    """Change the class of the modules that must know about frames; their parameters and names stay."""
    module: Any
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock):
            _add_temporal(module)
            _become(module, VideoTransformerBlock, frames)
            _become(module.attn1, SpatioTemporalAttention, frames)
        elif isinstance(module, ResnetBlock2D):
            _become(module.norm1, VideoGroupNorm, frames)
            _become(module.norm2, VideoGroupNorm, frames)
    output_norm = getattr(unet, "conv_norm_out", None)
    if output_norm is not None:
        _become(output_norm, VideoGroupNorm, frames)


def _become(module: nn.Module, kind: type[nn.Module], frames: FrameSettings) -> None:
    module.__class__ = kind
    module.frames = frames  # type: ignore[assignment]


def _add_temporal(block: BasicTransformerBlock) -> None:
    width, heads = block.attn1.query_dim, block.attn1.heads
    block.norm_temp = nn.LayerNorm(width)
    block.attn_temp = Attention(width, heads=heads, dim_head=width // heads, bias=False)


def _refuse_unfit(unet: nn.Module) -> None:
    if not isinstance(unet, UNet2DConditionModel):
        raise BaseModelError(
            f"Only a UNet2DConditionModel can be inflated, this is a {type(unet).__name__}. Use a Stable Diffusion base."
        )
    if isinstance(unet, InflatedUNet):
        raise BaseModelError("This UNet is inflated already. Use it as it is.")
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    if not blocks:
        raise BaseModelError(
            "This UNet has no transformer blocks. Use a Stable Diffusion 1.x, 2.x or XL base."
        )
    config = unet.config
    for option in ("only_cross_attention", "dual_cross_attention"):
        value = getattr(config, option, False)
        if value is True or (isinstance(value, (list, tuple)) and any(value)):
            raise BaseModelError(
                f"This UNet sets {option}, so its attn1 is no self-attention between frames. "
                "Use a Stable Diffusion 1.x, 2.x or XL base (not an upscaler)."
            )
