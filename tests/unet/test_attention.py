"""Attention over frames, against its formulas written as loops."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tav_peft.recipe import ModelSection
from tav_peft.unet.attention import SEES, FrameSettings, SpatioTemporalAttention, first_and_former
from tav_peft.unet.inflation import VideoGroupNorm, VideoTransformerBlock

BATCH, FRAMES, POSITIONS, WIDTH, HEADS = 2, 4, 5, 24, 3


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_double(module: nn.Module, seed: int = 1) -> nn.Module:
    for n, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed + n) * parameter.shape[-1] ** -0.5
    return module


def with_frames(module: nn.Module, kind: type[nn.Module], frames: int, **model: str) -> nn.Module:
    module.__class__, module.frames = kind, FrameSettings()
    module.frames.count, module.frames.model = frames, ModelSection(**model)
    return module


def softmax_attention(
    attention: Attention, queries: torch.Tensor, others: torch.Tensor, scores_in: torch.dtype | None = None
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V, head by head, from (positions, width) to (positions, width)."""
    query = queries @ attention.to_q.weight.T
    key, value = others @ attention.to_k.weight.T, others @ attention.to_v.weight.T
    query, key, value = (t.to(scores_in or t.dtype) for t in (query, key, value))
    size = WIDTH // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        weights = torch.softmax(query[:, part] @ key[:, part].T / size**0.5, dim=-1)
        heads.append(weights @ value[:, part])
    return attention.to_out[0](torch.cat(heads, dim=-1).to(queries.dtype))


@pytest.fixture
def attention() -> Attention:
    return in_double(Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS))


# the frames that frame i of m sees, written out for m = 4
SEEN = {
    "sparse_causal": [[0, 0], [0, 0], [0, 1], [0, 2]],
    "causal": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]],
    "full": [[0, 1, 2, 3]] * 4,
    "frame": [[0], [1], [2], [3]],
}
variants = pytest.mark.parametrize("variant", SEEN)


def by_frames(
    attention: Attention, tokens: torch.Tensor, variant: str, scores_in: torch.dtype | None = None
) -> torch.Tensor:
    """ST-Attn by its formula, frame by frame, (batch·frames, positions, width)."""
    frames = []
    for clip in tokens:
        for i, seen in enumerate(SEEN[variant]):
            others = torch.cat([clip[j] for j in seen])
            frames.append(softmax_attention(attention, clip[i], others, scores_in))
    return torch.stack(frames)


@variants
def test_st_attn_attends_from_each_frame_to_the_tokens_of_those_it_sees(attention, variant):
    tokens = noise(BATCH, FRAMES, POSITIONS, WIDTH)
    st_attn = with_frames(attention, SpatioTemporalAttention, FRAMES, attention=variant)
    expected = by_frames(attention, tokens, variant)
    torch.testing.assert_close(st_attn(tokens.flatten(0, 1)), expected, rtol=0, atol=1e-12)


@variants
def test_upcast_st_attn_takes_scores_and_softmax_in_float32(variant):
    """In bfloat16 a score has 8 bits: the formula without the cast is far from the one with it."""
    hot = in_double(Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, upcast_attention=True)).bfloat16()
    tokens = 3 * noise(BATCH, FRAMES, POSITIONS, WIDTH).bfloat16()
    got = with_frames(hot, SpatioTemporalAttention, FRAMES, attention=variant)(tokens.flatten(0, 1))
    expected, plain = (by_frames(hot, tokens, variant, dtype) for dtype in (torch.float32, torch.bfloat16))
    far = (got - expected).abs().float().mean()
    assert far < 0.02 * (plain - expected).abs().float().mean()


@pytest.mark.parametrize("frames", [1, 4, 9])
@variants
def test_scores_and_values_cost_what_the_frames_seen_cost(variant, frames):
    """2mN² pairs of tokens for sparse-causal attention, (mN)² for full; each pair 2d multiply-adds."""
    plain = Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS)
    folded = torch.empty(BATCH * frames, POSITIONS, WIDTH, device="meta")
    # without a kernel that computes both at once, whose operations the counter does not know on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        SEES[variant](plain, folded, folded, folded, frames)
    seen = {"frame": frames, "sparse_causal": 2 * frames, "causal": frames * (frames + 1) // 2}
    pairs = seen.get(variant, frames**2) * POSITIONS**2
    assert counter.get_total_flops() == BATCH * pairs * WIDTH * 2 * 2


@variants
def test_st_attn_of_one_frame_is_plain_self_attention(attention, variant):
    tokens = noise(BATCH, POSITIONS, WIDTH)
    plain = attention(tokens)
    st_attn = with_frames(attention, SpatioTemporalAttention, 1, attention=variant)
    torch.testing.assert_close(st_attn(tokens), plain, rtol=0, atol=1e-12)


def test_a_frame_after_the_first_never_sees_itself(attention):
    sparse = with_frames(attention, SpatioTemporalAttention, FRAMES)
    tokens = noise(FRAMES, POSITIONS, WIDTH)
    values = sparse.to_v(tokens).unflatten(0, (1, FRAMES))[0]
    joined = first_and_former(values, FRAMES)
    for i in range(1, FRAMES):
        assert not (joined[i, :POSITIONS] == values[i]).all()
        assert not (joined[i, POSITIONS:] == values[i]).all()


def test_the_order_is_first_then_former():
    tokens = torch.arange(3.0)[:, None, None]
    assert first_and_former(tokens, 3)[:, :, 0].tolist() == [[0, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize(("upcast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_scores_are_taken_in_float32_where_the_base_asks(upcast, expected, monkeypatch):
    seen = []

    def spy(query, *others, **options):
        seen.append(query.dtype)
        return plain(query, *others, **options)

    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    hot = in_double(
        Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, upcast_attention=upcast)
    ).bfloat16()
    out = with_frames(hot, SpatioTemporalAttention, FRAMES)(noise(FRAMES, POSITIONS, WIDTH).bfloat16())
    assert seen == [expected]
    assert out.dtype == torch.bfloat16


def test_t_attn_is_residual_self_attention_over_frames_at_each_position():
    block = VideoTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
    block.norm_temp = nn.LayerNorm(WIDTH)
    block.attn_temp = Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS)
    in_double(block.double())
    block.frames = FrameSettings()
    block.frames.count = FRAMES
    tokens = noise(BATCH * FRAMES, POSITIONS, WIDTH)
    got = block(tokens).unflatten(0, (BATCH, FRAMES))
    before = super(VideoTransformerBlock, block).forward(tokens).unflatten(0, (BATCH, FRAMES))
    for b in range(BATCH):
        for n in range(POSITIONS):
            track = before[b, :, n]  # frames, width
            centred = track - track.mean(dim=-1, keepdim=True)
            scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
            normed = centred * scale * block.norm_temp.weight + block.norm_temp.bias
            expected = track + softmax_attention(block.attn_temp, normed, normed)
            torch.testing.assert_close(got[b, :, n], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("frames", [1, 3])
def test_group_norm_takes_its_statistics_over_all_frames(frames):
    groups, channels = 2, 6
    norm = with_frames(in_double(nn.GroupNorm(groups, channels)), VideoGroupNorm, frames)
    x = noise(BATCH * frames, channels, 2, 3)
    got = norm(x).unflatten(0, (BATCH, frames))
    video = x.unflatten(0, (BATCH, frames))
    size = channels // groups
    for b in range(BATCH):
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            values = video[b, :, part]
            scaled = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
            expected = scaled * norm.weight[part, None, None] + norm.bias[part, None, None]
            torch.testing.assert_close(got[b, :, part], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 3])
def test_group_norm_of_each_frame_alone_is_pytorchs(frames):
    plain = in_double(nn.GroupNorm(2, 6))
    x = noise(BATCH * frames, 6, 2, 3)
    expected = torch.cat([plain(frame[None]) for frame in x])
    norm = with_frames(plain, VideoGroupNorm, frames, group_norm="frame")
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
