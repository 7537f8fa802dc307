"""Updates of low rank: their singular values, and the nearest ones of a smaller rank."""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # B (out, rank) and A (rank, in), with ΔW = B·A


def singular_values(update: Tensor) -> Tensor:
    """List the singular values of an update from the largest, in float64; of a vector its length is the only one."""
    if update.ndim == 1:
        return update.double().norm().reshape(1)
    return torch.linalg.svdvals(update).double()


def core(factors: Factors) -> Tensor:
    """Reduce B·A to a small matrix with the same singular values, in float64, without multiplying it out.

    With B = Q₁·R₁ and Aᵀ = Q₂·R₂ it is R₁·R₂ᵀ, since Q₁ and Q₂ have orthonormal columns.
    """
    R1, R2 = (torch.linalg.qr(each.double(), mode="r").R for each in (factors[0], factors[1].T))
    return R1 @ R2.T


def singular_values_of_factors(factors: Factors) -> Tensor:
    """Do as `singular_values` for B·A, of which there are no more than its rank."""
    return torch.linalg.svdvals(core(factors))


def squared_norms(one: Factors, other: Factors) -> tuple[float, float, float]:
    """Give ‖B₁·A₁‖², ‖B₂·A₂‖² and the squared norm of their difference [B₁, -B₂]·[A₁; A₂], from the factors."""
    of_one, of_other = (float(core(each).square().sum()) for each in (one, other))
    if all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True)):
        return of_one, of_other, 0.0
    B, A = ([each.double() for each in pair] for pair in zip(one, other, strict=True))
    between = torch.cat([B[0], -B[1]], dim=1), torch.cat(A)
    return of_one, of_other, float(core(between).square().sum())


def truncate(update: Tensor, rank: int) -> Factors:
    """Find the B·A of this rank that is nearest to an update (truncated SVD, Eckart and Young 1936).

    Each singular value is split evenly between B and A, which suits half precision.
    """
    U, S, V = torch.linalg.svd(update, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * V[:rank]


def truncate_factors(factors: Factors, rank: int) -> Factors:
    """Do as `truncate` for an update given as B·A, by the SVD of a matrix of its small rank."""
    (left, R), (right, L) = torch.linalg.qr(factors[0]), torch.linalg.qr(factors[1].T)
    B, A = truncate(R @ L.T, rank)
    return left @ B, A @ right.T
