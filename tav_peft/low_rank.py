"""Updates of low rank: their singular values, and the nearest ones of a smaller rank."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 8  # by how much a matrix must be larger than the vectors sought for a Krylov method to pay
_MORE = 8  # vectors sought beside those wanted
_ENOUGH, _ROUNDING = 1e-3, 3e-6  # of σ²

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

    Each singular value is split evenly between B and A, which suits half precision. Of a matrix that is large beside the
    rank only the leading singular vectors are computed, see `_leading`.
    """
    found = _leading(update, rank) if _LARGE * (rank + _MORE) <= min(update.shape) else None
    if found is None:
        U, S, V = torch.linalg.svd(update, full_matrices=False)
        root = S[:rank].sqrt()
        return U[:, :rank] * root, root[:, None] * V[:rank]
    image, V = found
    root = image.norm(dim=0).sqrt()
    return torch.where(root > 0, image / root, 0), root[:, None] * V.T


def _leading(update: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Find the leading right singular vectors V (in, rank) and ΔW·V by a block Krylov method, or None if it takes long.

    The space spanned by Ω, ΔWᵀΔW·Ω, (ΔWᵀΔW)²·Ω, … for a random Ω holds the leading singular vectors after a few steps
    (block Lanczos: Golub and Underwood 1977; for truncation: Musco and Musco 2015, algorithm 2). It is done when
    ‖ΔWᵀΔW·v - σ²·v‖ is at most a thousandth of the smallest σ² kept, or what float32 rounds of the largest; the energy is
    then that of the exact vectors to a millionth, for flat spectra too (tests/test_low_rank.py).
    """
    size = float(torch.stack(torch.aminmax(update)).abs().max()) or 1.0
    update = update.float() / size  # squares of very small numbers would round to nothing
    omega = torch.randn(update.shape[1], rank + _MORE, generator=torch.Generator().manual_seed(0))
    block = torch.linalg.qr(update.T @ (update @ omega.to(update.device))).Q
    basis, images = block, update @ block
    while basis.shape[1] <= min(update.shape) // 2:
        image = images[:, -block.shape[1] :]
        # the next block of the space, without what is in the basis; again, since rounding of small columns brings it back
        following, R = update.T @ image, torch.eye(block.shape[1], device=update.device)
        for _ in range(2):
            following, again = torch.linalg.qr(following - basis @ (basis.T @ following))
            R = again @ R
        squares, Y = torch.linalg.eigh((images.T @ images).double())
        squares, Y = squares.flip(0)[:rank], Y.flip(1)[:, :rank].float()
        residual = float((R @ Y[-block.shape[1] :]).norm(dim=0).max())
        if residual <= max(_ENOUGH * float(squares[-1]), _ROUNDING * float(squares[0])):
            return size * (images @ Y), basis @ Y
        block = following
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, update @ block], dim=1)
    return None


def truncate_factors(factors: Factors, rank: int) -> Factors:
    """Do as `truncate` for an update given as B·A, by the SVD of a matrix of its small rank."""
    (left, R), (right, L) = torch.linalg.qr(factors[0]), torch.linalg.qr(factors[1].T)
    B, A = truncate(R @ L.T, rank)
    return left @ B, A @ right.T
