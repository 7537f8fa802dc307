"""What the factors of a module multiply out to: LoRA, LoHa, LoKr, and DoRA's magnitudes on any of them."""

from __future__ import annotations

import torch
from torch import Tensor


def lora(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Multiply out ΔW = scale·B·A of shape (out, in), from A (rank, in) and B (out, rank) (Hu et al. 2022, eq. 3)."""
    return scale * (B @ A)


def loha(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float) -> Tensor:
    """Multiply out ΔW = scale·(w1_a·w1_b)⊙(w2_a·w2_b), the Hadamard product of two low ranks.

    Hyeon-Woo et al. 2022 (FedPara), proposition 1; `a` is (out, rank), `b` is (rank, in).
    """
    return scale * ((w1_a @ w1_b) * (w2_a @ w2_b))


def lokr(w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """Multiply out ΔW = scale·w1⊗w2, the Kronecker product (Yeh et al. 2024, LyCORIS, section 3; KronA)."""
    return scale * torch.kron(w1.contiguous(), w2.contiguous())


def dora(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """Give ΔW = m·V/‖V‖ - W with V = W + update (Liu et al. 2024, eq. 5), as PEFT and LyCORIS compute it.

    `magnitude` is (out,) or (out, 1) for norms of rows, as PEFT has them, or (1, in) for norms of columns.
    """
    directions = weight + update
    by_column = magnitude.ndim == 2 and len(magnitude) == 1 and magnitude.shape[1] == weight.shape[1] > 1
    norm = torch.linalg.vector_norm(directions, dim=0 if by_column else 1, keepdim=True)
    return magnitude.reshape(norm.shape) * directions / norm - weight
