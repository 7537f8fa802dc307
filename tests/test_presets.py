"""The presets: which modules they name, and that their configs are PEFT's own."""

import pytest
from peft import LoraConfig

from tav_peft.errors import RecipeError
from tav_peft.methods import json_config
from tav_peft.presets import Subset, part_of

# attention blocks of the tiny UNet: two levels down and up, one layer down and two up a level
BLOCKS = [
    *(f"down_blocks.{i}.attentions.0.transformer_blocks.0" for i in (0, 1)),
    "mid_block.attentions.0.transformer_blocks.0",
    *(f"up_blocks.{i}.attentions.{j}.transformer_blocks.0" for i in (0, 1) for j in (0, 1)),
]
ENDS = {
    "st_attn": ["attn1.to_q"],
    "cross_attn": ["attn2.to_q"],
    "t_attn": ["attn_temp.to_q", "attn_temp.to_k", "attn_temp.to_v", "attn_temp.to_out.0"],
}
DENSE = {"paper": {"st_attn", "cross_attn", "t_attn"}, "hybrid": {"t_attn"}, "lite": set()}


@pytest.fixture
def names(pipe):
    return [name for name, _ in pipe.unet.named_modules()]


def modules(parts, blocks=BLOCKS):
    return {f"{block}.{end}" for block in blocks for part in parts for end in ENDS[part]}


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_a_preset_updates_the_papers_three_parts_densely_or_as_lora(preset, names):
    subset = Subset(preset)
    assert set(subset.dense_modules(names)) == modules(DENSE[preset])
    assert set(subset.lora_modules(names)) == modules(set(ENDS) - DENSE[preset])


@pytest.mark.parametrize("preset", ["paper", "lite"])
@pytest.mark.parametrize("part", ENDS)
@pytest.mark.parametrize("block", ["down", "mid", "up"])
def test_a_part_and_a_block_group_are_chosen_by_name(preset, part, block, names):
    subset = Subset(preset, (part,), (block,))
    chosen = subset.dense_modules(names) + subset.lora_modules(names)
    assert set(chosen) == modules([part], [name for name in BLOCKS if name.startswith(block)])


def test_names_that_only_resemble_a_part_are_left_alone():
    subset = Subset("lite")
    near = [
        "up_blocks.0.attn1.to_q",
        "x.transformer_blocks.0.attn1.to_q",
        f"{BLOCKS[0]}.attn1.to_q.base_layer",
    ]
    near += [
        f"{BLOCKS[0]}.{end}"
        for end in ("attn1.to_k", "attn2.to_out.0", "norm_temp", "attn_temp", "attn1xto_q")
    ]
    assert subset.lora_modules(near) == []


@pytest.mark.parametrize("preset", ["hybrid", "lite"])
@pytest.mark.parametrize("blocks", [("down", "mid", "up"), ("mid", "up")])
def test_configs_are_stock_and_target_what_the_subset_names(preset, blocks, names):
    subset = Subset(preset, blocks=blocks)
    config = subset.peft_config(names, rank=4, alpha=8)
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 8, 0, "none")
    assert not config.use_dora
    assert not config.use_rslora
    saved = config.modules_to_save or []
    temporal = {name for name in names if name.endswith(tuple(saved))} if saved else set()
    chosen = [name for name in BLOCKS if name.startswith(blocks)]
    assert temporal == ({f"{name}.attn_temp" for name in chosen} if preset == "hybrid" else set())


def test_alpha_is_the_rank_when_it_is_not_given(names):
    assert Subset("lite").peft_config(names, rank=6).lora_alpha == 6


@pytest.mark.parametrize(("preset", "parts"), [("paper", tuple(ENDS)), ("hybrid", ("t_attn",))])
def test_a_wholly_dense_subset_has_no_peft_config(preset, parts, names):
    assert Subset(preset, parts).peft_config(names, rank=4) is None


def test_the_json_of_a_config_builds_the_same_config(names):
    config = Subset("hybrid").peft_config(names, rank=4, alpha=2.5)
    plain = json_config(config)
    assert set(plain) == {"peft_type", "r", "lora_alpha", "target_modules", "modules_to_save"}
    rebuilt = LoraConfig(**{key: value for key, value in plain.items() if key != "peft_type"})
    assert rebuilt.to_dict() == config.to_dict()


@pytest.mark.parametrize(("part", "end"), [(part, end) for part, ends in ENDS.items() for end in ends])
def test_a_module_knows_its_part(part, end):
    assert part_of(f"{BLOCKS[0]}.{end}") == part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "full"}, "preset full: choose from paper, hybrid, lite"),
        ({"parts": ("st_attn", "temporal")}, "part temporal: choose from st_attn, cross_attn, t_attn"),
        ({"parts": ()}, r"part \(none\): choose from"),
        ({"blocks": ("middle",)}, "block group middle: choose from down, mid, up"),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_known(arguments, message):
    with pytest.raises(RecipeError, match=message):
        Subset(**arguments)
