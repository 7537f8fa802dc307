"""How many singular values are kept, counted by hand."""

import pytest
import torch

from tav_peft.errors import AdapterError
from tav_peft.tools.ranks import RankRule

VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # Σσ = 16, Σσ² = 86


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ({"rank": 3}, 3),
        ({"rank": 9}, 5),
        ({"sv_ratio": 1.5}, 1),
        ({"sv_ratio": 2}, 1),  # more than, not from
        ({"sv_ratio": 2.1}, 2),
        ({"sv_ratio": 100}, 5),
        ({"sv_cumulative": 0.5}, 1),  # 8/16
        ({"sv_cumulative": 0.51}, 2),
        ({"sv_cumulative": 0.75}, 2),  # 12/16
        ({"sv_cumulative": 1}, 5),
        ({"energy": 0.74}, 1),  # 64/86 = 0.744
        ({"energy": 0.75}, 2),
        ({"energy": 0.93}, 2),  # 80/86 = 0.930
        ({"energy": 0.97}, 3),  # 84/86 = 0.977
        ({"energy": 1}, 5),
        ({"frobenius": 0.86}, 1),  # √0.744 = 0.863
        ({"frobenius": 0.87}, 2),
        ({"frobenius": 0.98}, 3),  # √0.930 = 0.964, √0.977 = 0.988
        ({"energy": 0.97, "rank": 2}, 2),
        ({"energy": 0.75, "rank": 4}, 2),
    ],
    ids=str,
)
def test_the_fewest_that_a_rule_allows(rule, count):
    assert RankRule(**rule).count(VALUES) == count


@pytest.mark.parametrize(
    "rule", [{"sv_ratio": 5}, {"sv_cumulative": 0.9}, {"energy": 0.9}, {"frobenius": 0.9}]
)
def test_of_an_update_that_is_zero_one_is_kept(rule):
    assert RankRule(**rule).count(torch.zeros(4)) == 1


def test_ones_that_are_equal_are_kept_together_by_the_ratio_only():
    assert RankRule(sv_ratio=1.1).count(torch.ones(4)) == 4
    assert RankRule(energy=0.5).count(torch.ones(4)) == 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "No rank was given"),
        ({"rank": 0}, "rank 0: give at least 1"),
        ({"sv_ratio": 1}, "sv_ratio 1: give more than 1"),
        ({"energy": 0}, "energy 0: give a share"),
        ({"energy": 1.01}, "energy 1.01: give a share"),
        ({"frobenius": float("nan")}, "frobenius nan: give a share"),
        ({"sv_cumulative": -1}, "sv_cumulative -1: give a share"),
        ({"energy": 0.9, "sv_ratio": 5}, "sv_ratio and energy was given. Give a rank, or one of"),
    ],
    ids=str,
)
def test_impossible_rules_are_refused(rule, message):
    with pytest.raises(AdapterError, match=message):
        RankRule(**rule)
