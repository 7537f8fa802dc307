"""Attaching: W = W0 + sum of strength times update, exactly undone, and refused where it does not fit."""

import itertools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError
from tav_peft.recipe import ModelSection
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import inflate, is_temporal

PRESETS = ["paper", "hybrid", "lite"]
MODULE = "mid_block.attentions.0.transformer_blocks.0"


def snapshot(unet):
    """Everything about a UNet's parameters that a user can see: names in order, bits, storage, flags, kinds."""
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    flags = [(name, p.requires_grad, p.data_ptr()) for name, p in unet.named_parameters()]
    return state, flags, [type(module) for module in unet.modules()], hasattr(unet, "peft_config")


def assert_same(one, other):
    assert list(one[0]) == list(other[0])
    for name, tensor in one[0].items():
        assert torch.equal(other[0][name], tensor), name
    assert one[1:] == other[1:]


def update_of(adapter, module, initial):
    """The update of a module's weight by an adapter alone: diff, scale B A, or W - W_initial."""
    tensors = adapter.tensors
    if f"{module}.diff" in tensors:
        return tensors[f"{module}.diff"]
    if f"{module}.lora_A.weight" in tensors:
        scale = adapter.peft_config["lora_alpha"] / adapter.peft_config["r"]
        return scale * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    return tensors[f"{module}.weight"] - initial


def effective_weight(unet, module):
    """The matrix that a module multiplies with, found by sending the unit vectors through it."""
    layer = unet.get_submodule(module)
    with torch.no_grad():
        unit = torch.eye(layer.in_features)
        return (layer(unit) - layer(torch.zeros(1, layer.in_features))).T


# -- strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_strength_0_is_exactly_the_base(preset, unet, run, make_adapter):
    base = run()
    attachments = Attachments(unet)
    attachments.attach("a", make_adapter(preset), 0.0)
    assert torch.equal(run(), base)
    attachments.set_strengths({"a": 1.0})
    assert (run() - base).abs().max() > 0.01
    attachments.set_strengths({"a": 0.0})
    assert torch.equal(run(), base)


def test_dense_weights_are_the_adapters_own_to_the_bit(unet, make_adapter):
    adapter = make_adapter("paper")
    before = dict(unet.state_dict())
    Attachments(unet).attach("a", adapter)
    state = unet.state_dict()
    assert len(adapter.tensors) == 49
    for name, tensor in adapter.tensors.items():
        if is_temporal(name):
            assert torch.equal(state[name], tensor)
        else:
            weight = name.replace(".diff", ".weight")
            assert torch.equal(state[weight], before[weight] + tensor)


@pytest.mark.parametrize("presets", [*itertools.product(PRESETS, PRESETS)], ids="+".join)
def test_stacked_adapters_are_the_sum_of_their_updates_by_strength(presets, unet, make_adapter):
    strengths = (0.75, -0.5)
    adapters = [make_adapter(preset, seed=n, rank=2 + n, alpha=3) for n, preset in enumerate(presets)]
    modules = [
        name
        for name, module in unet.named_modules()
        if name.endswith((".to_q", "temp.to_k", "temp.to_out.0"))
    ]
    first = {module: unet.get_submodule(module).weight.detach().clone() for module in modules}
    attachments = Attachments(unet)
    for n, adapter in enumerate(adapters):
        attachments.attach(f"adapter {n}", adapter, strengths[n])
    assert len(modules) == 7 * 5
    for module in modules:
        updates = [s * update_of(a, module, first[module]) for s, a in zip(strengths, adapters, strict=True)]
        expected = first[module] + sum(updates)
        torch.testing.assert_close(effective_weight(unet, module), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("part", ["st_attn", "cross_attn", "t_attn"])
def test_each_part_has_its_own_strength(preset, part, unet, make_adapter):
    ends = {"st_attn": "attn1.to_q", "cross_attn": "attn2.to_q", "t_attn": "attn_temp.to_v"}
    before = {end: effective_weight(unet, f"{MODULE}.{end}") for end in ends.values()}
    attachments = Attachments(unet)
    attachments.attach("a", make_adapter(preset), {name: float(name == part) for name in ends})
    changed = {
        end
        for end, weight in before.items()
        if not torch.equal(effective_weight(unet, f"{MODULE}.{end}"), weight)
    }
    assert changed == {ends[part]}
    attachments.set_strengths({"a": {part: 0.0}})  # the others get 1
    kept = {
        end
        for end, weight in before.items()
        if torch.equal(effective_weight(unet, f"{MODULE}.{end}"), weight)
    }
    assert kept == {ends[part]}


def test_an_unknown_part_is_refused_before_anything_changes(unet, make_adapter):
    before = snapshot(unet)
    with pytest.raises(
        AdapterError, match=r"No part named temporal\. The parts are st_attn, cross_attn, t_attn"
    ):
        Attachments(unet).attach("a", make_adapter(), {"temporal": 1.0})
    assert_same(before, snapshot(unet))


def test_adapters_that_are_not_named_go_off(unet, run, make_adapter):
    attachments = Attachments(unet)
    attachments.attach("one", make_adapter("paper", seed=1))
    one = run()
    attachments.attach("two", make_adapter("lite", seed=2))
    attachments.set_strengths({"one": 1.0})
    assert torch.equal(run(), one)


# -- off again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False], ids=["with gradients", "frozen"])
@pytest.mark.parametrize("preset", PRESETS)
def test_detached_the_unet_is_what_it_was_bit_for_bit(preset, trained, unet, run, make_adapter):
    unet.requires_grad_(trained)
    before, base = snapshot(unet), run()
    attachments = Attachments(unet)
    attachments.attach("a", make_adapter(preset), 0.3)
    attachments.detach("a")
    assert_same(before, snapshot(unet))
    assert torch.equal(run(), base)
    assert attachments.names == []


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")], ids=" then ".join)
@pytest.mark.parametrize(
    "presets", [("paper", "lite"), ("hybrid", "hybrid"), ("lite", "paper")], ids="+".join
)
def test_two_adapters_come_off_in_any_order(presets, order, unet, run, make_adapter):
    before = snapshot(unet)
    adapters = dict(
        zip(("one", "two"), (make_adapter(p, seed=n) for n, p in enumerate(presets)), strict=True)
    )
    attachments = Attachments(unet)
    for name, adapter in adapters.items():
        attachments.attach(name, adapter, 0.5)
    attachments.detach(order[0])
    left = run()
    attachments.detach(order[1])
    assert_same(before, snapshot(unet))
    attachments.attach("left", adapters[order[1]], 0.5)
    assert torch.equal(run(), left)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_2d_unet_that_shares_the_weights_is_never_touched(preset, flat, unet, make_adapter):
    before = {name: tensor.clone() for name, tensor in flat.state_dict().items()}
    Attachments(unet).attach("a", make_adapter(preset))
    assert all(torch.equal(tensor, before[name]) for name, tensor in flat.state_dict().items())


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_a_lora_of_another_tool_stays_as_it_is(on, unet, run, make_adapter):
    base = run()
    config = LoraConfig(r=2, target_modules=["attn2.to_k", "attn2.to_q"], init_lora_weights=False)
    inject_adapter_in_model(config, unet, adapter_name="style")
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_adapter(["style"] if on else [])
    styled = run()
    assert torch.equal(styled, base) != on
    attachments = Attachments(unet)
    attachments.attach("a", make_adapter("lite"), 0.0)
    assert torch.equal(run(), styled)
    attachments.set_strengths({"a": 1.0})
    assert not torch.equal(run(), styled)
    attachments.detach("a")
    assert torch.equal(run(), styled)
    assert len(layers) == 14
    assert all(layer.active_adapters == (["style"] if on else []) for layer in layers)


def test_any_name_is_harmless(unet, run, make_adapter):
    adapter, attachments, outputs = make_adapter("lite", parts=("st_attn",)), Attachments(unet), []
    for name in (
        "plain",
        "attn1",
        "lora",
        "to_q",
        "lora_A",
        "default",
        "mid_block",
        "a.b",
        "tav_slot_1",
        "ü ",
        "",
    ):
        attachments.attach(name, adapter)
        attachments.attach(f"{name}.weight", adapter, 0.5)
        outputs.append(run())
        attachments.detach(name)
        attachments.detach(f"{name}.weight")
        assert not hasattr(unet, "peft_config")
    assert all(torch.equal(output, outputs[0]) for output in outputs)


# -- what does not fit -------------------------------------------------------------------------------------


def changed(adapter, tensors=None, **provenance):
    told = adapter.provenance.model_copy(update=provenance)
    return Adapter(adapter.tensors if tensors is None else tensors, adapter.peft_config, told)


def refused(unet, adapter, message):
    before = snapshot(unet)
    attachments = Attachments(unet)
    with pytest.raises(AdapterError, match=message):
        attachments.attach("a", adapter)
    assert attachments.names == []
    assert_same(before, snapshot(unet))


@pytest.mark.parametrize(
    ("key", "value"),
    [("cross_attention_dim", 768), ("block_out_channels", [16, 64]), ("layers_per_block", 2)],
)
def test_an_adapter_for_another_architecture_names_the_difference(key, value, unet, make_adapter):
    adapter = make_adapter()
    base = adapter.provenance.base
    base = base.model_copy(update={"architecture": {**base.architecture, key: value}})
    message = rf"tuned for a base with {key} {value}, this one has .*\. Use a base like tiny, or retune"
    refused(unet, changed(adapter, base=base), message.replace("[", r"\[").replace("]", r"\]"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_missing_tensor_is_named(preset, unet, make_adapter):
    adapter = make_adapter(preset)
    name = next(name for name in adapter.tensors if name.startswith(f"{MODULE}.attn2.to_q"))
    fewer = {key: tensor for key, tensor in adapter.tensors.items() if key != name}
    refused(unet, changed(adapter, fewer), f"do not match its config on this base: 1 missing, first {name}")


@pytest.mark.parametrize("preset", PRESETS)
def test_an_unexpected_tensor_is_named(preset, unet, make_adapter):
    adapter = make_adapter(preset)
    name = f"{MODULE.replace('blocks.0', 'blocks.1')}.attn1.to_q.diff"
    refused(unet, changed(adapter, {**adapter.tensors, name: torch.zeros(2)}), f"1 unexpected, first {name}")


def test_tensors_of_another_subset_are_refused(unet, make_adapter):
    adapter, narrow = make_adapter("lite"), make_adapter("lite", blocks=("up",))
    refused(
        unet, changed(adapter, subset=narrow.provenance.subset), "targets 42 modules of this base, not those"
    )
    refused(
        unet, changed(narrow, subset=adapter.provenance.subset), "targets 24 modules of this base, not those"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_wrong_shape_is_named_with_both(preset, unet, make_adapter):
    adapter = make_adapter(preset)
    name = next(name for name in adapter.tensors if name.startswith(f"{MODULE}.attn_temp.to_q"))
    shape = tuple(adapter.tensors[name].shape)
    wrong = {**adapter.tensors, name: torch.zeros(3, 5)}
    refused(
        unet,
        changed(adapter, wrong),
        rf"{name} has shape \(3, 5\), this base needs \({shape[0]}, {shape[1]}\)",
    )


def test_an_unknown_initial_t_attn_is_refused(unet, make_adapter):
    adapter = make_adapter("lite")
    init = adapter.provenance.temporal_init.model_copy(update={"name": "philox-uniform-2"})
    refused(unet, changed(adapter, temporal_init=init), "starts from 'philox-uniform-2', this tav-peft knows")


def test_an_initial_t_attn_whose_hash_differs_is_refused(unet, make_adapter):
    adapter = make_adapter("lite")
    init = adapter.provenance.temporal_init.model_copy(update={"fingerprint": "0" * 64})
    refused(
        unet,
        changed(adapter, temporal_init=init),
        "starts from weights that seed 0 does not give on this base",
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_an_update_of_t_attn_needs_the_seed_it_counts_from(preset, unet, make_adapter):
    adapter = make_adapter(preset, temporal_seed=7)
    refused(unet, adapter, r"seed 7, this UNet has seed 0\. Inflate with temporal_seed=7")
    unet.reset_temporal(7)
    Attachments(unet).attach("a", adapter)


def test_a_config_whose_targets_are_not_the_subsets_is_refused(unet, make_adapter):
    adapter = make_adapter("lite")
    config = {**adapter.peft_config, "target_modules": ["attn1.to_q"]}
    refused(
        unet,
        Adapter(adapter.tensors, config, adapter.provenance),
        "targets 7 modules of this base, not those",
    )


def test_without_t_attn_the_initial_t_attn_does_not_matter(unet, make_adapter):
    adapter = make_adapter("lite", parts=("st_attn", "cross_attn"), temporal_seed=7)
    Attachments(unet).attach("a", adapter)


def test_a_name_is_given_once(unet, make_adapter):
    attachments = Attachments(unet)
    attachments.attach("a", make_adapter("paper"))
    with pytest.raises(AdapterError, match="An adapter named 'a' is loaded already"):
        attachments.attach("a", make_adapter("lite"))
    with pytest.raises(AdapterError, match=r"No adapter named 'b' is loaded\. Loaded: a\."):
        attachments.detach("b")
    with pytest.raises(AdapterError, match=r"No adapter named 'b' is loaded\. Loaded: a\."):
        attachments.set_strengths({"a": 0.5, "b": 1.0})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["half file", "half base"],
)
def test_file_and_base_may_differ_in_precision(preset, stored, dtype, flat, noise, make_adapter):
    unet = inflate(flat.to(dtype))
    attachments = Attachments(unet)
    inputs = noise(1, 4, 3, 8, 8).to(dtype), 500, noise(1, 24, 32).to(dtype)
    with torch.no_grad():
        plain = unet(*inputs).sample
        attachments.attach("a", make_adapter(preset, dtype=stored))
        assert {p.dtype for name, p in unet.named_parameters() if "lora_" not in name} == {dtype}
        out = unet(*inputs).sample
    assert out.dtype == dtype
    assert (out - plain).abs().max() > 0.01


# -- variants ----------------------------------------------------------------------------------------------

FULL = ModelSection(attention="full", group_norm="frame")


@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_of_another_variant_switches_the_unet_and_switches_it_back(
    preset, flat, unet, run, make_adapter
):
    attachments, base = Attachments(unet), run()
    attachments.attach("a", changed(make_adapter(preset), model=FULL))
    other = inflate(flat)
    Attachments(other).attach("a", make_adapter(preset))
    other.variant = FULL
    assert torch.equal(run(), run(other))
    attachments.set_strengths({"a": 0.0})
    assert torch.equal(run(), run(inflate(flat, **FULL.model_dump())))
    attachments.detach("a")
    assert unet.variant == ModelSection()
    assert torch.equal(run(), base)


def test_a_unets_own_variant_comes_back_only_with_the_last_adapter(flat, make_adapter):
    unet = inflate(flat, attention="causal")
    attachments = Attachments(unet)
    for name in ("a", "b"):
        attachments.attach(name, changed(make_adapter(), model=FULL))
    attachments.detach("a")
    assert unet.variant == FULL
    attachments.detach("b")
    assert unet.variant == ModelSection(attention="causal")


def test_adapters_of_two_variants_are_refused(unet, run, make_adapter):
    attachments = Attachments(unet)
    attachments.attach("a", make_adapter())
    before = run(), snapshot(unet)
    message = (
        "The adapter was tuned with attention full and group_norm frame, a with attention sparse_causal and "
        "group_norm joint. A UNet treats frames one way at a time: unload the one or the other."
    )
    with pytest.raises(AdapterError, match=message):
        attachments.attach("b", changed(make_adapter(seed=1), model=FULL))
    assert attachments.names == ["a"]
    assert torch.equal(run(), before[0])
    assert_same(snapshot(unet), before[1])
    attachments.detach("a")
    attachments.attach("b", changed(make_adapter(seed=1), model=FULL))


def test_a_refused_adapter_switches_nothing(unet, make_adapter):
    adapter = changed(make_adapter(), model=FULL)
    refused(unet, changed(adapter, dict(list(adapter.tensors.items())[1:])), "missing")
    assert unet.variant == ModelSection()
