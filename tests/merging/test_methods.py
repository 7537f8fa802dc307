"""Each method against its formula, written out entry by entry in Python numbers."""

import inspect
import itertools
import math

import pytest
import torch

from tav_peft.errors import AdapterError
from tav_peft.low_rank import truncate, truncate_factors
from tav_peft.merging.methods import (
    METHODS,
    SUMS,
    concatenate,
    dare_linear,
    dare_ties,
    linear,
    magnitude_prune,
    slerp,
    ties,
    trim,
)

SHAPE = (4, 5)
WEIGHTS = [0.7, -0.4, 1.3]


@pytest.fixture
def updates(noise):
    return [noise(*SHAPE, seed=seed) for seed in range(3)]


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(9)
    return [torch.rand(SHAPE, generator=generator) for _ in range(3)]


def by_entry(rule, *lists):
    """Apply a rule to each entry: it is given one list of numbers for each list of tensors."""
    result = torch.zeros(SHAPE, dtype=torch.float64)
    for i, j in itertools.product(*map(range, SHAPE)):
        result[i, j] = rule(*([float(each[i, j]) for each in tensors] for tensors in lists))
    return result


def same(got, expected):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def trimmed(update, kept):
    """Set all but the `kept` largest magnitudes to 0."""
    order = sorted(map(abs, update.flatten().tolist()), reverse=True)
    return torch.tensor([[x if abs(x) >= order[kept - 1] else 0.0 for x in row] for row in update.tolist()])


def sign(x):
    return (x > 0) - (x < 0)


def elected_mean(deltas):
    weighted = [w * delta for w, delta in zip(WEIGHTS, deltas, strict=True)]
    elected = sign(sum(weighted))
    agreeing = [each for each in weighted if sign(each) == elected != 0]
    return sum(agreeing) / len(agreeing) if agreeing else 0.0


def test_linear_is_the_sum_by_weight(updates):
    expected = by_entry(lambda deltas: sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)), updates)
    same(linear(updates, WEIGHTS), expected)


@pytest.mark.parametrize(("density", "kept"), [(1.0, 20), (0.5, 10), (0.15, 3), (0.001, 1)])
def test_trimming_keeps_the_share_of_the_largest_magnitudes(density, kept, updates):
    got = trim(updates[0], density)
    assert torch.equal(got, trimmed(updates[0], kept))
    assert int((got != 0).sum()) == kept


def test_trimming_does_not_choose_between_equal_magnitudes():
    assert trim(torch.tensor([1.0, -3.0, 1.0, -1.0]), 0.5).tolist() == [1.0, -3.0, 1.0, -1.0]


def test_magnitude_prune_is_the_sum_of_what_trimming_leaves(updates):
    left = [trimmed(update, 6) for update in updates]
    expected = by_entry(lambda deltas: sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)), left)
    same(magnitude_prune(updates, WEIGHTS, density=0.3), expected)


def test_ties_trims_elects_and_averages(updates):
    expected = by_entry(elected_mean, [trimmed(update, 12) for update in updates])
    assert 0 < (expected == 0).sum() < 8
    same(ties(updates, WEIGHTS, density=0.6), expected)


def test_ties_with_equal_weights_is_the_papers_scaled_mean():
    one, other = torch.tensor([[3.0, -2.0, 1.0, 0.5]]), torch.tensor([[1.0, 4.0, 3.0, -0.5]])
    # of the second entry the larger sign is elected and counts alone; of the last neither sign wins
    assert ties([one, other], [0.4, 0.4], density=1).tolist() == [pytest.approx([0.8, 1.6, 0.8, 0.0])]


def test_dare_drops_where_the_draw_is_not_below_the_density_and_rescales(updates, draws):
    def rule(deltas, drawn):
        kept = [d / 0.4 if u < 0.4 else 0.0 for d, u in zip(deltas, drawn, strict=True)]
        return sum(w * d for w, d in zip(WEIGHTS, kept, strict=True))

    same(
        dare_linear(updates, WEIGHTS, density=0.4, draws=draws),
        by_entry(lambda *lists: rule(*lists), updates, draws),
    )


def test_dare_ties_elects_among_what_dropping_leaves(updates, draws):
    def rule(deltas, drawn):
        return elected_mean([d / 0.6 if u < 0.6 else 0.0 for d, u in zip(deltas, drawn, strict=True)])

    same(dare_ties(updates, WEIGHTS, density=0.6, draws=draws), by_entry(rule, updates, draws))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (0.0, 0.5), (2.0, 0.0)])
def test_slerp_goes_along_the_great_circle(weights, updates):
    one, other = (update.double().flatten() for update in updates[:2])
    angle = math.acos(float(one @ other) / math.sqrt(float(one @ one) * float(other @ other)))
    total, t = sum(weights), weights[1] / sum(weights)
    parts = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    same(
        slerp(updates[:2], weights),
        by_entry(lambda deltas: total * (parts[0] * deltas[0] + parts[1] * deltas[1]), updates[:2]),
    )


def test_slerp_of_unit_updates_stays_on_the_sphere(updates):
    units = [update / update.norm() for update in updates[:2]]
    assert float(slerp(units, [0.3, 0.7]).norm()) == pytest.approx(1, abs=1e-6)
    assert float(linear(units, [0.3, 0.7]).norm()) < 0.95


@pytest.mark.parametrize("factor", [2.0, -1.0], ids=["the same way", "the opposite way"])
def test_slerp_without_a_circle_is_the_sum(factor, updates):
    pair = [updates[0], factor * updates[0]]
    same(slerp(pair, [0.4, 0.6]), linear(pair, [0.4, 0.6]).double())
    same(slerp([updates[0], torch.zeros(SHAPE)], [0.4, 0.6]), 0.4 * updates[0].double())


@pytest.mark.parametrize(("count", "weights"), [(3, WEIGHTS), (2, [1.0, -0.5])])
def test_slerp_is_for_two_and_turns_forwards(count, weights, updates):
    with pytest.raises(AdapterError, match="two adapters with weights from 0"):
        slerp(updates[:count], weights)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scales_with_its_weight_and_keeps_one_update_whole(name, updates):
    known = {"density": 1.0, "draws": [torch.zeros(SHAPE)]}
    options = {key: known[key] for key in inspect.signature(METHODS[name]).parameters if key in known}
    same(METHODS[name](updates[:1], [0.3], **options), 0.3 * updates[0].double())


def test_four_names_are_one_sum():
    assert {"linear", "task_arithmetic", "concat", "svd"} == SUMS
    assert len(METHODS) == 9


# -- low rank ----------------------------------------------------------------------------------------------


@pytest.fixture
def factors(noise):
    return [(noise(6, rank, seed=rank), noise(rank, 7, seed=10 + rank)) for rank in (1, 2)]


def test_concatenation_is_the_exact_sum(factors):
    B, A = concatenate(factors, [0.5, -2.0])
    assert (B.shape, A.shape) == ((6, 3), (3, 7))
    expected = 0.5 * factors[0][0] @ factors[0][1] - 2 * factors[1][0] @ factors[1][1]
    torch.testing.assert_close(B @ A, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_leaves_out_exactly_the_smaller_singular_values(rank, noise):
    update = noise(6, 5)
    B, A = truncate(update, rank)
    assert (B.shape, A.shape) == ((6, rank), (rank, 5))
    left = torch.linalg.svdvals(update.double())[rank:].square().sum().sqrt()
    assert float((update - B @ A).norm()) == pytest.approx(float(left), abs=1e-5)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))  # evenly split


@pytest.mark.parametrize("rank", [1, 2])
def test_truncating_factors_is_truncating_their_product(rank, factors):
    B, A = truncate_factors(factors[1], rank)
    expected = truncate(factors[1][0] @ factors[1][1], rank)
    torch.testing.assert_close(B @ A, expected[0] @ expected[1], rtol=0, atol=1e-5)


def test_factors_of_more_columns_than_the_matrix_are_truncated_too(noise):
    B, A = noise(3, 5), noise(5, 4, seed=1)
    left, right = truncate_factors((B, A), 3)
    torch.testing.assert_close(left @ right, B @ A, rtol=0, atol=1e-5)
