"""An inflated UNet has the original's parameters, heads and trained tensors, by name."""

from tav_peft.presets import Subset
from tav_peft.unet.inflation import is_temporal

NEEDS = ("facts.json",)


def test_the_temporal_parameters_have_the_recorded_names_and_shapes(recording):
    state = recording.pipe().unet.state_dict()
    ours = {name: tensor.shape for name, tensor in state.items() if is_temporal(name)}
    theirs = {name: tensor.shape for name, tensor in recording.t_attn("random").items()}
    assert theirs
    assert ours == theirs


def test_the_parameters_are_as_many_as_recorded(recording):
    counted = {name: tensor.numel() for name, tensor in recording.pipe().unet.named_parameters()}
    facts = recording.facts["trainable"]
    assert sum(counted.values()) == facts["numel_all_3d"]
    assert sum(n for name, n in counted.items() if not is_temporal(name)) == facts["numel_2d"]
    assert sum(counted[name] for name in facts["names"]) == facts["numel"]


def test_the_preset_paper_trains_exactly_the_recorded_tensors(recording):
    unet = recording.pipe().unet
    modules = Subset("paper").dense_modules([name for name, _ in unet.named_modules()])
    ours = {
        f"{module}.{kind}" for module in modules for kind, _ in unet.get_submodule(module).named_parameters()
    }
    theirs = recording.facts["trainable"]["names"]
    assert len(theirs) > 50
    assert ours == set(theirs)


def test_every_attention_has_the_recorded_heads_and_scale(recording):
    unet, facts = recording.pipe().unet, recording.facts["trace"]
    assert facts["heads_per_transformer"]
    for path, heads in facts["heads_per_transformer"].items():
        block = unet.get_submodule(path).transformer_blocks[0]
        assert [block.attn1.heads, block.attn2.heads, block.attn_temp.heads] == [heads] * 3, path
    for name in ("attn1", "attn2", "attn_temp"):
        assert unet.get_submodule(facts["modules"][name]).scale == facts["scale"]
