"""Attention over frames, against its formulas written as loops."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from tav_peft.attention import FrameCount, SparseCausalAttention, first_and_former
from tav_peft.inflation import JointGroupNorm, VideoTransformerBlock

BATCH, FRAMES, POSITIONS, WIDTH, HEADS = 2, 4, 5, 24, 3


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_double(module: nn.Module, seed: int = 1) -> nn.Module:
    for n, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed + n) * parameter.shape[-1] ** -0.5
    return module


def with_frames(module: nn.Module, kind: type[nn.Module], frames: int) -> nn.Module:
    module.__class__, module.frame_count = kind, FrameCount()
    module.frame_count.value = frames
    return module


def softmax_attention(attention: Attention, queries: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V, head by head, from (positions, width) to (positions, width)."""
    query = queries @ attention.to_q.weight.T
    key, value = others @ attention.to_k.weight.T, others @ attention.to_v.weight.T
    size = WIDTH // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        weights = torch.softmax(query[:, part] @ key[:, part].T / size**0.5, dim=-1)
        heads.append(weights @ value[:, part])
    out = attention.to_out[0]
    return torch.cat(heads, dim=-1) @ out.weight.T + out.bias


@pytest.fixture
def attention() -> Attention:
    return in_double(Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS))


def test_st_attn_attends_from_each_frame_to_the_first_and_the_former(attention):
    tokens = noise(BATCH, FRAMES, POSITIONS, WIDTH)
    sparse = with_frames(attention, SparseCausalAttention, FRAMES)
    got = sparse(tokens.flatten(0, 1)).unflatten(0, (BATCH, FRAMES))
    for b in range(BATCH):
        for i in range(FRAMES):
            first, former = tokens[b, 0], tokens[b, max(0, i - 1)]
            expected = softmax_attention(attention, tokens[b, i], torch.cat([first, former]))
            torch.testing.assert_close(got[b, i], expected, rtol=0, atol=1e-12)


def test_st_attn_of_one_frame_is_plain_self_attention(attention):
    tokens = noise(BATCH, POSITIONS, WIDTH)
    plain = attention(tokens)
    torch.testing.assert_close(
        with_frames(attention, SparseCausalAttention, 1)(tokens), plain, rtol=0, atol=1e-12
    )


def test_a_frame_after_the_first_never_sees_itself(attention):
    sparse = with_frames(attention, SparseCausalAttention, FRAMES)
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
    out = with_frames(hot, SparseCausalAttention, FRAMES)(noise(FRAMES, POSITIONS, WIDTH).bfloat16())
    assert seen == [expected]
    assert out.dtype == torch.bfloat16


def test_t_attn_is_residual_self_attention_over_frames_at_each_position():
    block = VideoTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
    block.norm_temp = nn.LayerNorm(WIDTH)
    block.attn_temp = Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS)
    in_double(block.double())
    block.frame_count = FrameCount()
    block.frame_count.value = FRAMES
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
    norm = with_frames(in_double(nn.GroupNorm(groups, channels)), JointGroupNorm, frames)
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
