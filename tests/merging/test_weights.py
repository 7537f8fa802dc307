"""Weights: numbers by part, block, path, or both, of which the last that names a module counts."""

import pytest

from tav_peft.errors import AdapterError
from tav_peft.merging.weights import check_rules, parse_weight, rules_of, weight_of

DOWN = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
MID = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_out.0"
UP = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
FAR = "up_blocks.10.attentions.0.transformer_blocks.0.attn_temp.to_k"
MODULES = (DOWN, MID, UP, FAR)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7", (0.7, 0.7, 0.7, 0.7)),
        ("st_attn=0.5", (0.5, 1, 1, 1)),
        ("0.7,t_attn=-2", (0.7, -2, 0.7, -2)),
        ("up=0.1, mid=0", (1, 0, 0.1, 0.1)),
        ("up_blocks.1=0.3", (1, 1, 0.3, 1)),
        ("up.t_attn=0.3", (1, 1, 1, 0.3)),
        ("up_blocks.1.cross_attn=3,0.5", (0.5, 0.5, 3, 0.5)),
        ("up=0.1,t_attn=0.2", (1, 0.2, 0.1, 0.2)),
        ("t_attn=0.2,up=0.1", (1, 0.2, 0.1, 0.1)),
        (f"{DOWN}=4", (4, 1, 1, 1)),
    ],
)
def test_the_last_rule_that_names_a_module_counts(text, expected):
    rules = rules_of(parse_weight(text))
    assert tuple(weight_of(rules, module) for module in MODULES) == expected


def test_a_number_is_for_all():
    assert rules_of(0.25) == {"all": 0.25}
    assert rules_of({"up": 2.0}) == {"all": 1.0, "up": 2.0}


@pytest.mark.parametrize("text", ["", "much", "0.5,", "=1", "up=", "up=nan", "inf", "up:0.5", "0.5 0.3"])
def test_what_is_no_weight_is_told_with_an_example(text):
    with pytest.raises(
        AdapterError, match=r"is neither a number nor name=number\. A weight is 0\.7, or 0\.7,st_"
    ):
        parse_weight(text)


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(AdapterError, match=r"The weight of up is nan\. Give a finite number"):
        rules_of({"up": float("nan")})


@pytest.mark.parametrize("name", ["attn", "up_block", "up_blocks.2", "down.cross_attn", "t_attn.up"])
def test_a_rule_that_names_nothing_is_refused(name):
    with pytest.raises(
        AdapterError, match=f"The weight of {name} names no module of a.safetensors. Give a part"
    ):
        check_rules({"all": 1.0, name: 0.5}, MODULES, "a.safetensors")
    check_rules({"all": 1.0, "up.t_attn": 0.5}, MODULES, "a.safetensors")
