"""What is counted on tensors without values is what happens on tensors with values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tav_peft.planning.counting import Counter, counting
from tav_peft.planning.stages import Frames, Tuned, prediction, tuning_step
from tav_peft.presets import Subset
from tav_peft.recipe import AdapterSection, ModelSection
from tav_peft.unet.trainable import trainable

FLOAT = 4  # bytes


def empty(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def counted(run, half=None, **options):
    with counting(half, **options) as counter:
        kept = run()
    del kept
    return counter.count


def test_a_product_takes_two_operations_for_each_multiplication():
    count = counted(lambda: empty(3, 5) @ empty(5, 7))
    assert (count.matmul, count.convolution, count.flops) == (2 * 3 * 5 * 7, 0, 2 * 3 * 5 * 7)


def test_a_convolution_takes_two_operations_for_each_weight_and_place():
    count = counted(lambda: F.conv2d(empty(2, 3, 8, 8), empty(5, 3, 3, 3), padding=1))
    assert (count.matmul, count.convolution) == (0, 2 * 2 * 64 * 5 * 3 * 9)


def test_attention_is_fused_and_stores_no_scores():
    heads, tokens, width = 2, 512, 8
    given = empty(1, heads, tokens, width)
    count = counted(lambda: F.scaled_dot_product_attention(given, given, given))
    assert count.matmul == 4 * heads * tokens**2 * width
    assert count.peak < heads * tokens**2 * FLOAT  # the scores alone


def test_memory_is_the_most_that_is_held_at_a_time():
    x = empty(10, 10)
    assert counted(lambda: ((x + 1) * 2).exp()).peak == 2 * 100 * FLOAT  # one is let go when the next is made
    assert counted(lambda: [x + 1, x + 2, x + 3]).peak == 3 * 100 * FLOAT
    assert counted(lambda: [x.T, x[1:], x.view(100)]).peak == 0  # views of what was there


def test_what_the_backward_needs_is_held_and_recomputation_lets_it_go():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8))).to("meta")
    x = empty(1000, 64)

    def forward(again):
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False) if again else layer(y)
        return y

    kept, recomputed = (counted(lambda again=again: forward(again)) for again in (False, True))
    one = 1000 * 64 * FLOAT
    assert kept.peak == 16 * one  # the input of every GELU and of every layer but the first, and the output
    assert recomputed.peak == 9 * one


def test_in_half_precision_products_are_halved_and_on_cuda_norms_are_not():
    linear, norm = nn.Linear(4, 4, device="meta"), nn.LayerNorm(4, device="meta", dtype=torch.half)
    for on_cuda, dtype in ((False, torch.half), (True, torch.float32)):
        with counting(torch.half, on_cuda=on_cuda):
            assert linear(empty(2, 4)).dtype == torch.half
            assert norm(empty(2, 4, dtype=torch.half)).dtype == dtype


# -- against the same on values ----------------------------------------------------------------------------


def real_step(unet, adapter, again, noise):
    """Count a step on real tensors of the CPU."""
    inputs = noise(1, 4, 3, 8, 8), torch.tensor([500]), noise(1, 77, 32)
    subset = Subset(adapter.preset, adapter.parts, adapter.blocks)
    with Counter() as counter, trainable(unet, subset, rank=adapter.rank):
        if again:
            unet.train().enable_gradient_checkpointing()
        predicted = unet(*inputs).sample
        F.mse_loss(predicted.float(), torch.empty_like(predicted)).backward()
    return counter.count


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_a_counted_tuning_step_is_a_real_one(preset, again, unet, noise):
    adapter = AdapterSection(preset=preset)
    counted = tuning_step(unet, ModelSection(), Frames(3, 8, 8), Tuned(adapter, again)).count
    real = real_step(unet, adapter, again, noise)
    # attention aside, whose kernel lays out what it gives otherwise than the meta device says
    assert (counted.matmul, counted.convolution) == (real.matmul, real.convolution)
    assert counted.peak == pytest.approx(real.peak, rel=0.05)
    assert counted.moved == pytest.approx(real.moved, rel=0.05)
    assert counted.kernels == pytest.approx(real.kernels, rel=0.1)


@pytest.mark.parametrize("preset", ["paper", "lite"])
def test_the_optimizers_moments_are_held(preset, unet):
    step = tuning_step(unet, ModelSection(), Frames(3, 8, 8), Tuned(AdapterSection(preset=preset), False))
    with trainable(unet, Subset(preset), rank=4) as part:
        assert step.held == 2 * sum(p.numel() * FLOAT for p in part.parameters.values()) > 0
    assert step.memory == step.count.peak + step.held


def test_a_counted_prediction_is_a_real_one(unet, noise):
    counted = prediction(unet, ModelSection(), Frames(3, 8, 8), rows=2).count
    with torch.no_grad(), Counter() as counter:
        unet(noise(2, 4, 3, 8, 8), torch.tensor([500, 500]), noise(2, 77, 32))
    assert counted.flops == counter.count.flops > 0
    assert counted.peak == pytest.approx(counter.count.peak, rel=0.05)


def test_the_variant_is_counted(unet):
    frames = Frames(8, 8, 8)
    full, sparse = (
        prediction(unet, ModelSection(attention=attention), frames, rows=1).count.matmul
        for attention in ("full", "sparse_causal")
    )
    assert full > sparse
