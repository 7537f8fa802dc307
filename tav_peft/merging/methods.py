"""Methods of merging: each takes the updates ΔW of one tensor with their weights, and gives the merged update.

Each is a short function whose arguments after `*` are all it can be told. All of them are homogeneous in the weights:
one update with weight w and nothing dropped gives w·ΔW. "Of the sum" is Σ wᵢ·ΔWᵢ, what loading all adapters with
their weights as strengths amounts to. Trimming and sign election look at one tensor at a time, not, as some of the
papers do, at all tensors of a model together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tav_peft.errors import AdapterError
from tav_peft.low_rank import Factors

Updates = Sequence[Tensor]  # of one shape, float32
Weights = Sequence[float]


def linear(updates: Updates, weights: Weights) -> Tensor:
    """Sum the updates by weight: Σ wᵢ·ΔWᵢ (task arithmetic, Ilharco et al. 2023, section 2; wᵢ is its λ)."""
    return sum((w * update for w, update in zip(weights, updates, strict=True)), torch.zeros_like(updates[0]))


def magnitude_prune(updates: Updates, weights: Weights, *, density: float) -> Tensor:
    """Sum by weight what is left of each update after its smallest entries are dropped (Han et al. 2015)."""
    return linear([trim(update, density) for update in updates], weights)


def ties(updates: Updates, weights: Weights, *, density: float) -> Tensor:
    """Trim, elect a sign for each entry, and average those that have it (TIES, Yadav et al. 2023, algorithm 1).

    Trimmed updates τᵢ elect γ = sgn(Σ wᵢ·τᵢ), and the result is Σ wᵢ·τᵢ / n over the n updates with sgn(wᵢ·τᵢ) = γ.
    With all weights λ that is the paper's λ·τ.
    """
    return _elected_mean([trim(update, density) for update in updates], weights)


def dare_linear(updates: Updates, weights: Weights, *, density: float, draws: Updates) -> Tensor:
    """Sum by weight what random dropping leaves of the updates (DARE, Yu et al. 2024)."""
    return linear(_drop_all(updates, density, draws), weights)


def dare_ties(updates: Updates, weights: Weights, *, density: float, draws: Updates) -> Tensor:
    """Drop at random and rescale (DARE, Yu et al. 2024) where TIES trims; the rest is as in `ties`."""
    return _elected_mean(_drop_all(updates, density, draws), weights)


def slerp(updates: Updates, weights: Weights) -> Tensor:
    """Turn from one update to the other on the great circle between them (Shoemake 1985).

    With t = w₂/(w₁ + w₂) and Ω the angle between the flattened updates:
    (w₁ + w₂)·(sin((1−t)Ω)·ΔW₁ + sin(tΩ)·ΔW₂) / sin Ω. Where one is missing, or they point the same or the opposite
    way, there is no such circle, and the sum is taken.

    Raises:
        AdapterError: for a negative weight, or more than two updates.

    """
    if len(updates) > 2 or min(weights) < 0:
        raise AdapterError(
            f"slerp turns from one update to another: two adapters with weights from 0, not {len(updates)} with "
            f"{', '.join(f'{w:g}' for w in weights)}. Use another method."
        )
    norms = [float(update.double().norm()) for update in updates]
    total = sum(weights)
    if len(updates) < 2 or min(norms) == 0 or total == 0:
        return linear(updates, weights)
    cosine = float((updates[0].double() * updates[1].double()).sum()) / (norms[0] * norms[1])
    angle, t = math.acos(max(-1.0, min(1.0, cosine))), weights[1] / total
    if math.sin(angle) < 1e-4:
        return linear(updates, weights)
    turned = [math.sin((1 - t) * angle), math.sin(t * angle)]
    return linear(updates, [total * share / math.sin(angle) for share in turned])


METHODS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    # three other names of the sum: task arithmetic is its paper's; the others say in which form it is kept
    "task_arithmetic": linear,
    "concat": linear,
    "svd": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
    "slerp": slerp,
}
SUMS = frozenset(name for name, method in METHODS.items() if method is linear)


# -- parts of methods ------------------------------------------------------------------------------------


def trim(update: Tensor, density: float) -> Tensor:
    """Keep the share `density` of the entries, at least one, that are largest in magnitude; set the others to 0.

    Entries that tie with the smallest one kept are kept too, so that the result does not depend on their order.
    """
    magnitudes = update.abs().flatten()
    kept = max(1, round(density * magnitudes.numel()))
    smallest = magnitudes.kthvalue(magnitudes.numel() - kept + 1).values
    return torch.where(update.abs() >= smallest, update, 0)


def drop(update: Tensor, density: float, draws: Tensor) -> Tensor:
    """Keep each entry with probability `density`, divided by it: where a draw from U[0, 1) is below it."""
    return torch.where(draws < density, update / density, 0)


def _drop_all(updates: Updates, density: float, draws: Updates) -> list[Tensor]:
    return [drop(update, density, own) for update, own in zip(updates, draws, strict=True)]


def _elected_mean(updates: Updates, weights: Weights) -> Tensor:
    weighted = [w * update for w, update in zip(weights, updates, strict=True)]
    sign = torch.sign(sum(weighted, torch.zeros_like(updates[0])))
    agreeing = [torch.where((sign != 0) & (torch.sign(each) == sign), each, 0) for each in weighted]
    voters = sum(((each != 0).float() for each in agreeing), torch.zeros_like(sign))
    return sum(agreeing, torch.zeros_like(sign)) / voters.clamp(min=1)


# -- low rank --------------------------------------------------------------------------------------------


def concatenate(factors: Sequence[Factors], weights: Weights) -> Factors:
    """Write Σ wᵢ·Bᵢ·Aᵢ as one B·A whose rank is the sum of theirs; nothing is lost."""
    columns = [w * B for w, (B, _) in zip(weights, factors, strict=True)]
    return torch.cat(columns, dim=1), torch.cat([A for _, A in factors], dim=0)
