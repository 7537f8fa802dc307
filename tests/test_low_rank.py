"""Truncation is Eckart and Young's to a millionth, however the singular values fall off, and deterministic."""

import pytest
import torch

from tav_peft import low_rank
from tav_peft.low_rank import core, singular_values, singular_values_of_factors, squared_norms, truncate


def matrix(rows, columns, values, seed=0):
    """Give a matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for size in (rows, columns)
    )
    n = len(values)
    return (U[:, :n] * torch.as_tensor(values).double() @ V[:, :n].T).float()


SPECTRA = {
    "flat": torch.ones(200),
    "random": torch.linalg.svdvals(torch.randn(200, 200, generator=torch.Generator().manual_seed(1))),
    "slow": torch.arange(1, 201) ** -0.5,
    "fast": torch.arange(1, 201) ** -2.0,
    "low rank and noise": torch.cat([torch.tensor([9.0, 7, 5, 3, 2]), torch.full((195,), 0.1)]),
    "of lower rank": torch.tensor([3.0, 2.0]),
    "in pairs": torch.arange(1, 101).repeat_interleave(2) ** -1.0,
    "tiny": torch.arange(1, 201) ** -1.0 * 1e-12,
}


@pytest.mark.parametrize("shape", [(200, 200), (240, 200), (200, 260)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_truncation_keeps_the_most_energy_there_is(name, rank, shape, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the whole decomposition was computed")

    values = SPECTRA[name]
    update = matrix(*shape, values)
    if name != "random":  # whose largest are close to each other, so that it may take too long at this size
        monkeypatch.setattr(torch.linalg, "svd", never)
    B, A = truncate(update, rank)
    assert (B.shape, A.shape) == ((shape[0], rank), (rank, shape[1]))
    squares = torch.linalg.svdvals(update.double()).square()
    wrong = float((B.double() @ A.double() - update.double()).square().sum())
    total = float(squares.sum())
    # the best that there is, up to a millionth of the energy
    assert wrong <= float(squares[rank:].sum()) + 1e-6 * total
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-3, atol=1e-6 * total**0.25)


def test_it_gives_the_same_every_time():
    update = matrix(200, 200, SPECTRA["slow"])
    state = torch.get_rng_state()
    first, again = truncate(update, 3), truncate(update, 3)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_of_nothing_it_is_nothing():
    B, A = truncate(torch.zeros(200, 150), 4)
    assert not B.any()
    assert not A.any()


def test_where_it_takes_too_long_the_whole_decomposition_is_computed(monkeypatch):
    monkeypatch.setattr(low_rank, "_ENOUGH", 0.0)
    monkeypatch.setattr(low_rank, "_ROUNDING", 0.0)
    update = matrix(200, 200, SPECTRA["random"])
    assert low_rank._leading(update, 4) is None
    B, A = truncate(update, 4)
    U, S, V = torch.linalg.svd(update)
    torch.testing.assert_close(B @ A, U[:, :4] * S[:4] @ V[:4], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shapes", [((7, 3), (3, 5)), ((7, 6), (6, 5)), ((4, 9), (9, 3))], ids=str)
def test_singular_values_of_factors_are_those_of_the_product(shapes, noise):
    B, A = (noise(*shape, seed=n) for n, shape in enumerate(shapes))
    expected = torch.linalg.svdvals(B.double() @ A.double())
    found = singular_values_of_factors((B, A))
    torch.testing.assert_close(found[: len(expected)], expected[: len(found)], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(core((B, A)).norm(), (B.double() @ A.double()).norm(), rtol=1e-12, atol=0)


def test_the_singular_value_of_a_vector_is_its_length():
    assert singular_values(torch.tensor([3.0, 4.0])).tolist() == [5.0]


def test_squared_norms_of_a_difference_do_not_cancel(noise):
    """Two updates that differ in the ninth digit."""
    B, A = noise(50, 4), noise(4, 60, seed=1)
    other = (B.double() * (1 + 1e-9), A.double())
    of_one, of_other, between = squared_norms((B, A), other)
    assert of_one == pytest.approx(float((B.double() @ A.double()).square().sum()), rel=1e-12)
    assert of_other == pytest.approx(of_one, rel=1e-8)
    assert between == pytest.approx(of_one * 1e-18, rel=1e-5)
    assert squared_norms((B, A), (B.clone(), A.clone()))[2] == 0
