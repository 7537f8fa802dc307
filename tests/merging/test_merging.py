"""Merging: what the result computes is what the formulas say, and what does not go together is refused."""

import dataclasses
import itertools
import math

import pytest
import torch
from peft import PeftModel

from tav_peft.adapter import LATENTS, Adapter
from tav_peft.errors import AdapterError
from tav_peft.formats import peft
from tav_peft.merging import merge
from tav_peft.merging.methods import METHODS, ties
from tav_peft.presets import part_of
from tav_peft.recipe import ModelSection
from tav_peft.tensor_file import hash_tensors
from tav_peft.unet import philox, temporal_init
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import inflate, is_temporal

PRESETS = ["paper", "hybrid", "lite"]
PAIRS = pytest.mark.parametrize("presets", [*itertools.product(PRESETS, PRESETS)], ids="+".join)
MODULE = "mid_block.attentions.0.transformer_blocks.0"
ELEMENTWISE = ["ties", "dare_linear", "dare_ties", "magnitude_prune", "slerp"]


def deltas(adapter):
    """The updates of an adapter by the UNet's parameter, from its tensors by the definition of each form."""
    config, tensors, result = adapter.peft_config or {}, adapter.weights, {}
    seed = adapter.provenance.temporal_init.seed
    for name, tensor in tensors.items():
        module = name.removesuffix(".lora_B.weight").removesuffix(".diff")
        if name.endswith(".lora_B.weight"):
            rank = tensor.shape[1]
            alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            result[f"{module}.weight"] = scale * tensor @ tensors[f"{module}.lora_A.weight"]
        elif name.endswith(".diff"):
            result[f"{module}.weight"] = tensor
        elif not name.endswith(".lora_A.weight"):
            result[name] = tensor - temporal_init.initial(name, tensor.shape, seed)
    return result


def summed(adapters, weights):
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in deltas(adapter).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def assert_updates(got, expected, atol=2e-6):
    assert {name for name, delta in expected.items() if delta.any()} <= set(got)
    for name, delta in got.items():
        torch.testing.assert_close(delta, expected.get(name, torch.zeros_like(delta)), rtol=0, atol=atol)


def changed(adapter, *, config=None, tensors=None, **provenance):
    told = adapter.provenance.model_copy(update=provenance)
    own = adapter.peft_config if config is None else {**adapter.peft_config, **config}
    return Adapter(adapter.tensors if tensors is None else tensors, own, told)


# -- the law -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "presets", [("paper", "lite"), ("hybrid", "paper"), ("hybrid", "hybrid"), ("lite", "lite")], ids="+".join
)
def test_a_linear_merge_is_what_loading_both_is(presets, unet, run, make_adapter):
    adapters = [make_adapter(preset, seed=n, rank=2 + n, alpha=3) for n, preset in enumerate(presets)]
    weights = [{"all": 0.7, "cross_attn": 0.2}, {"all": -0.4, "t_attn": 1.1}]
    plain, attachments = run(), Attachments(unet)
    for n, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        parts = dict.fromkeys(("st_attn", "cross_attn", "t_attn"), weight["all"]) | weight
        parts.pop("all")
        attachments.attach(str(n), adapter, parts)
    both = run()
    attachments.detach("0")
    attachments.detach("1")
    merged, report = merge(adapters, weights)
    attachments.attach("merged", merged)
    assert (both - plain).abs().max() > 0.1
    # rounding of float32 on the way through the UNet; outputs are of order 1
    assert (run() - both).abs().max() <= 5e-6
    assert report.error <= 1e-6


@PAIRS
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "concat"])
def test_the_sums_are_exact_in_the_smallest_form(method, presets, make_adapter):
    adapters = [make_adapter(preset, seed=n, rank=2 + n, alpha=3) for n, preset in enumerate(presets)]
    merged, report = merge(adapters, [0.5, 2.0], method)
    assert_updates(deltas(merged), summed(adapters, [0.5, 2.0]))
    assert report.error <= 1e-6
    assert report.preset == min(presets, key=PRESETS.index)
    expected = {"paper": [(), ()], "hybrid": [(5,), ()], "lite": [(5,), (5,)]}[report.preset]
    assert [report.parts["st_attn"].ranks, report.parts["t_attn"].ranks] == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_one_adapter_with_weight_1_is_itself(preset, make_adapter):
    adapter = make_adapter(preset, rank=3, alpha=6)
    for method in METHODS:
        options = {"density": 1.0, "preset": preset, "rank": None if method == "concat" else 3}
        merged, report = merge([adapter], method=method, **options)
        assert_updates(deltas(merged), deltas(adapter))
        assert report.error <= 2e-6


@pytest.mark.parametrize("preset", PRESETS)
def test_the_order_of_a_sum_does_not_matter(preset, make_adapter):
    adapters = [make_adapter(preset, seed=n) for n in range(3)]
    one, _ = merge(adapters, [0.5, 1.0, -2.0])
    other, _ = merge(adapters[::-1], [-2.0, 1.0, 0.5])
    assert_updates(deltas(one), deltas(other))


def test_without_weights_all_are_1(make_adapter):
    adapters = [make_adapter("paper", seed=n) for n in range(2)]
    assert_updates(deltas(merge(adapters)[0]), summed(adapters, [1.0, 1.0]))


def test_the_same_adapter_twice_is_twice_the_update(make_adapter):
    adapter = make_adapter("lite")
    assert_updates(deltas(merge([adapter, adapter], [0.5, 1.0])[0]), summed([adapter], [1.5]))


def test_weights_by_block_and_path(make_adapter):
    adapter = make_adapter("lite")
    merged, _ = merge([adapter], [{"all": 0.0, "down": 2.0, "up_blocks.1.st_attn": 3.0}])
    weights = {"down_blocks": 2.0, "up_blocks.1": 3.0}
    before = deltas(adapter)
    for name, delta in deltas(merged).items():
        start = next((start for start in weights if name.startswith(start)), None)
        if start == "up_blocks.1" and part_of(name.rpartition(".")[0]) != "st_attn":
            start = None
        torch.testing.assert_close(delta, weights.get(start, 0.0) * before[name], rtol=0, atol=1e-6)


def test_rslora_and_patterns_of_rank_and_alpha_are_understood(make_adapter, unet, run, noise):
    adapter = make_adapter("lite", rank=2, alpha=5)
    module, tensors = f"{MODULE}.attn2.to_q", dict(adapter.tensors)
    tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = (
        noise(4, 32),
        noise(32, 4, seed=1),
    )
    patterns = {"use_rslora": True, "rank_pattern": {module: 4}, "alpha_pattern": {module: 7}}
    odd, plain = changed(adapter, config=patterns, tensors=tensors), make_adapter("lite", seed=1)
    merged, report = merge([odd, plain], [0.5, 1.5])
    assert_updates(deltas(merged), summed([odd, plain], [0.5, 1.5]), atol=5e-6)
    assert report.parts["cross_attn"].ranks == (4, 6)
    attachments = Attachments(unet)
    attachments.attach("odd", odd, 0.5)
    attachments.attach("plain", plain, 1.5)
    both = run()
    attachments.detach("odd")
    attachments.detach("plain")
    attachments.attach("merged", merged)
    assert (run() - both).abs().max() <= 1e-5


@pytest.mark.parametrize("presets", [("lite", "lite"), ("paper", "lite"), ("hybrid", "paper")], ids="+".join)
def test_adapters_of_other_parts_and_blocks_are_filled_up_with_nothing(presets, make_adapter, unet):
    adapters = [
        make_adapter(
            presets[0], parts=("st_attn",) if presets[0] != "hybrid" else ("t_attn",), blocks=("down",)
        ),
        make_adapter(presets[1], seed=1, parts=("cross_attn", "t_attn"), blocks=("mid", "up")),
    ]
    merged, report = merge(adapters, [0.5, 2.0])
    assert_updates(deltas(merged), summed(adapters, [0.5, 2.0]))
    assert report.error <= 1e-6
    assert merged.subset.blocks == ("down", "mid", "up")
    Attachments(unet).attach("merged", merged)  # checks every tensor against the UNet


# -- methods on updates ------------------------------------------------------------------------------------


@PAIRS
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_a_method_acts_on_the_updates_whatever_their_form(method, presets, make_adapter):
    adapters = [make_adapter(preset, seed=n, rank=2 + n, alpha=3) for n, preset in enumerate(presets)]
    weights, given = [0.7, 0.4], [deltas(adapter) for adapter in adapters]
    merged, report = merge(adapters, weights, method, density=0.3, seed=5)
    assert report.preset == "paper"
    got = deltas(merged)
    assert len(got) == len(merged.weights) == 49
    for name, delta in got.items():
        options = {"density": 0.3} if method != "slerp" else {}
        having = [n for n in range(2) if name in given[n]]
        if method.startswith("dare"):
            streams = [f"dare-1:5:{n}:{name}" for n in having]
            options["draws"] = [
                (philox.unit(stream, delta.numel()).reshape(delta.shape) + 1) / 2 for stream in streams
            ]
        expected = torch.zeros_like(delta)  # two LoRAs have no bias
        if having:
            expected = METHODS[method](
                [given[n][name] for n in having], [weights[n] for n in having], **options
            )
        torch.testing.assert_close(delta, expected, rtol=0, atol=3e-6)
    exact = summed(adapters, weights)
    wrong = sum(float((got[name] - exact.get(name, 0)).square().sum()) for name in got)
    asked = sum(float(delta.square().sum()) for delta in exact.values())
    assert report.error == pytest.approx(math.sqrt(wrong / asked), rel=1e-4)
    assert report.error > 0.05


def test_dropped_entries_are_the_same_on_every_machine(make_adapter):
    merged, _ = merge([make_adapter("paper")], method="dare_linear", density=0.5, seed=1)
    kept = merged.tensors[f"{MODULE}.attn1.to_q.diff"][0] != 0
    assert "".join(map(str, kept.int().tolist())) == "01001010101110000000001000000011"
    again, _ = merge([make_adapter("paper")], method="dare_linear", density=0.5, seed=2)
    assert not torch.equal(again.tensors[f"{MODULE}.attn1.to_q.diff"][0] != 0, kept)


def test_errors_are_told_by_part_and_module(make_adapter):
    adapters = [make_adapter("paper", seed=n) for n in range(2)]
    merged, report = merge(adapters, method="ties", density=0.2)
    got, exact = deltas(merged), summed(adapters, [1.0, 1.0])

    def error(names):
        wrong = sum(float((got[name] - exact[name]).square().sum()) for name in names)
        return math.sqrt(wrong / sum(float(exact[name].square().sum()) for name in names))

    for part in ("st_attn", "cross_attn", "t_attn"):
        names = [name for name in got if part_of(name.rpartition(".")[0]) == part]
        assert report.parts[part].error == pytest.approx(error(names), rel=1e-4)
        sizes = [t.nbytes for n, t in merged.weights.items() if part_of(n.removesuffix(".diff").removesuffix(
            ".weight").removesuffix(".bias")) == part]  # fmt: skip
        assert report.parts[part].bytes == sum(sizes)
    out = f"{MODULE}.attn_temp.to_out.0"
    assert report.modules[out] == pytest.approx(error([f"{out}.weight", f"{out}.bias"]), rel=1e-4)
    assert len(report.modules) == 7 * 6


def test_where_the_sum_is_nothing_there_is_no_relative_error(make_adapter):
    adapter = make_adapter("paper")
    assert merge([adapter, adapter], [1.0, -1.0])[1].error == 0
    assert merge([adapter, adapter], [1.0, -1.0], "dare_linear")[1].error is None


# -- forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presets", [("lite", "lite"), ("paper", "paper"), ("hybrid", "lite")], ids="+".join)
@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_with_a_rank_an_update_is_truncated_by_its_svd(method, presets, make_adapter):
    adapters = [make_adapter(preset, seed=n, rank=3) for n, preset in enumerate(presets)]
    merged, report = merge(adapters, [0.5, 1.5], method, rank=2)
    assert report.preset == ("lite" if presets == ("lite", "lite") else "hybrid")
    assert report.parts["st_attn"].ranks == (2,)
    name = f"{MODULE}.attn1.to_q.weight"
    full = summed(adapters, [0.5, 1.5])[name]
    if method == "ties":
        full = ties([deltas(adapter)[name] for adapter in adapters], [0.5, 1.5], density=0.5)
    U, S, V = torch.linalg.svd(full)
    torch.testing.assert_close(deltas(merged)[name], (U[:, :2] * S[:2]) @ V[:2], rtol=0, atol=5e-6)


def test_svd_takes_the_largest_rank_it_is_given(make_adapter):
    adapters = [make_adapter("lite", seed=n, rank=rank) for n, rank in enumerate((2, 5))]
    merged, report = merge(adapters, method="svd")
    assert report.parts["t_attn"].ranks == (5,)
    assert merged.peft_config["r"] == merged.peft_config["lora_alpha"] == 5
    assert 0.01 < report.error < 0.7


def test_a_rank_of_all_ranks_loses_nothing(make_adapter):
    adapters = [make_adapter("lite", seed=n, rank=rank) for n, rank in enumerate((2, 5))]
    _, report = merge(adapters, method="svd", rank=64)
    assert report.parts["t_attn"].ranks == (7,)
    assert report.error <= 1e-6


def test_a_rank_above_the_width_stops_at_the_width(make_adapter, unet):
    adapters = [make_adapter("lite", seed=n, rank=12) for n in range(2)]
    merged, report = merge(adapters, method="concat")
    assert report.parts["st_attn"].ranks == (16, 24)  # down_blocks.0 and its like have width 16
    assert report.error <= 2e-6
    Attachments(unet).attach("merged", merged)


def test_a_dense_t_attn_as_lora_leaves_its_output_bias_out_and_says_so(make_adapter):
    merged, report = merge([make_adapter("hybrid", rank=3)], preset="lite", rank=32)
    assert report.warnings == ("The output bias of T-Attn in adapter 1 has no LoRA form and is left out.",)
    assert not any(name.endswith("bias") for name in merged.tensors)
    assert report.parts["st_attn"].error <= 1e-6
    exact = deltas(make_adapter("hybrid", rank=3))
    temporal = {name: delta for name, delta in exact.items() if is_temporal(name)}
    lost = sum(float(d.square().sum()) for name, d in temporal.items() if name.endswith("bias"))
    assert report.parts["t_attn"].error == pytest.approx(
        math.sqrt(lost / sum(float(d.square().sum()) for d in temporal.values())), rel=1e-3
    )


def test_a_preset_can_be_asked_for(make_adapter):
    adapters = [make_adapter("lite", seed=n) for n in range(2)]
    merged, report = merge(adapters, preset="paper")
    assert (report.preset, merged.peft_config) == ("paper", None)
    assert_updates(deltas(merged), summed(adapters, [1.0, 1.0]))


def test_the_precision_is_the_adapters_own_or_the_one_asked_for(make_adapter):
    half, full = (
        make_adapter("paper", dtype=torch.float16),
        make_adapter("paper", dtype=torch.float32, seed=1),
    )
    cases = [
        ([half, half], None, torch.float16),
        ([half, full], None, torch.float32),
        ([full], "bf16", torch.bfloat16),
    ]
    for adapters, dtype, expected in cases:
        merged, report = merge(adapters, dtype=dtype)
        assert {tensor.dtype for tensor in merged.tensors.values()} == {expected}
        assert (report.error > 1e-5) == (expected != torch.float32)  # rounding counts as error


def test_what_does_not_fit_into_half_precision_is_named(make_adapter):
    with pytest.raises(AdapterError, match=r"does not fit into torch\.float16 .* or dtype fp32"):
        merge([make_adapter("paper", dtype=torch.float16)], [1e7])


# -- what does not go together -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method 'magic': choose from linear, task_arithmetic, concat"),
        ({"preset": "huge"}, "preset 'huge': choose from lite, hybrid, paper"),
        ({"dtype": "fp8"}, "dtype 'fp8': choose from fp32, fp16, bf16"),
        ({"t_attn": "sum"}, "t_attn 'sum': choose from update, concat"),
        ({"density": 0.0}, "density 0: give more than 0 and at most 1"),
        ({"density": 1.5}, r"density 1\.5: give"),
        ({"rank": 0}, "rank 0: give at least 1"),
        ({"method": "concat", "rank": 2}, "concat keeps all ranks"),
        ({"method": "svd"}, "svd: none of the adapters is a LoRA"),
        (
            {"method": "ties", "preset": "lite"},
            "ties leaves updates of full rank where the preset lite has LoRAs",
        ),
        ({"preset": "lite"}, "linear leaves updates of full rank"),
        ({"t_attn": "concat", "preset": "lite"}, "Use hybrid or paper"),
        ({"weights": [1.0]}, "2 adapters and 1 weights were given"),
        ({"weights": [1.0, {"up_blocks.9": 1.0}]}, r"up_blocks\.9 names no module of adapter 2"),
    ],
)
def test_impossible_settings_are_told(settings, message, make_adapter):
    with pytest.raises(AdapterError, match=message):
        merge([make_adapter("paper", seed=n) for n in range(2)], **settings)


def test_nothing_to_merge_is_told():
    with pytest.raises(AdapterError, match="No adapters were given"):
        merge([])


def test_another_architecture_is_refused(make_adapter):
    other = make_adapter(seed=1)
    base = other.provenance.base
    base = base.model_copy(update={"architecture": {**base.architecture, "cross_attention_dim": 768}})
    with pytest.raises(
        AdapterError, match=r"adapter 1 .* cross_attention_dim 32, adapter 2 for one with 768"
    ):
        merge([make_adapter(), changed(other, base=base)])


def test_another_variant_is_refused(make_adapter):
    other = changed(make_adapter(seed=1), model=ModelSection(attention="full"))
    with pytest.raises(AdapterError, match=r"with attention sparse_causal .*, adapter 2 with attention full"):
        merge([make_adapter(), other])


@pytest.mark.parametrize("presets", [("paper", "paper"), ("lite", "lite"), ("hybrid", "lite")], ids="+".join)
@pytest.mark.parametrize("method", METHODS)
def test_another_initial_t_attn_is_refused(method, presets, make_adapter):
    adapters = [make_adapter(preset, seed=n, temporal_seed=7 * n) for n, preset in enumerate(presets)]
    with pytest.raises(
        AdapterError, match=r"of adapter 1 counts from initial weights of seed 0, that of adapter 2 .* 7"
    ):
        merge(adapters, method=method)


def test_without_t_attn_its_initial_weights_do_not_matter(make_adapter):
    adapters = [make_adapter("lite", seed=1, parts=("st_attn",)), make_adapter("hybrid", temporal_seed=7)]
    merged, report = merge(adapters)
    assert merged.provenance.temporal_init.seed == 7
    assert report.error <= 1e-6


def test_an_unknown_kind_of_initial_t_attn_is_refused(make_adapter):
    adapter = make_adapter()
    init = adapter.provenance.temporal_init.model_copy(update={"name": "philox-uniform-9"})
    with pytest.raises(AdapterError, match="starts from 'philox-uniform-9', this tav-peft knows"):
        merge([changed(adapter, temporal_init=init)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_named(value, make_adapter):
    adapter = make_adapter("paper")
    name = f"{MODULE}.attn1.to_q.diff"
    broken = changed(adapter, tensors={**adapter.tensors, name: adapter.tensors[name] * value})
    with pytest.raises(AdapterError, match=f"adapter 2: {name} holds NaN or infinity"):
        merge([adapter, broken])


@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_that_lacks_a_tensor_is_refused(preset, make_adapter):
    adapter = make_adapter(preset)
    for name in list(adapter.tensors)[:4]:
        fewer = {key: tensor for key, tensor in adapter.tensors.items() if key != name}
        with pytest.raises(AdapterError, match=r"missing or do not belong|without its lora_A"):
            merge([changed(adapter, tensors=fewer)])


def test_a_lora_that_is_more_than_a_product_is_refused(make_adapter):
    with pytest.raises(AdapterError, match="is a LoRA with biases"):
        merge([changed(make_adapter("lite"), config={"lora_bias": True})])


# -- provenance and other doors ----------------------------------------------------------------------------


def test_the_result_remembers_what_it_was_merged_from(make_adapter):
    one, other = make_adapter("lite"), make_adapter("paper", seed=1)
    clip = other.provenance.clip.model_copy(update={"name": "circle.mp4", "fingerprint": "2" * 64})
    base = other.provenance.base.model_copy(update={"name": "other", "fingerprint": "f" * 64})
    other = changed(other, clip=clip, base=base, caption="a circle", step=9)
    merged, report = merge([one, other], [{"up": 0.5}, 2.0], "dare_ties", density=0.25, seed=3)
    told = merged.provenance
    assert told.merged_from == report.info
    assert (told.merged_from.method, told.merged_from.density, told.merged_from.seed) == (
        "dare_ties",
        0.25,
        3,
    )
    assert [each.model_dump() for each in told.merged_from.adapters] == [
        {"name": "adapter 1", "fingerprint": hash_tensors(one.tensors), "caption": "a square", "clip": "square.mp4",
         "weights": {"all": 1.0, "up": 0.5}},
        {"name": "adapter 2", "fingerprint": hash_tensors(other.tensors), "caption": "a circle", "clip": "circle.mp4",
         "weights": {"all": 2.0}},
    ]  # fmt: skip
    assert told.merged_from.adapters[0].fingerprint != told.merged_from.adapters[1].fingerprint
    assert (told.caption, told.clip.name, told.clip.fingerprint) == (
        "a square; a circle",
        "square.mp4, circle.mp4",
        "",
    )
    assert (told.base, told.step, told.recipe) == (one.provenance.base, 9, one.provenance.recipe)
    assert report.warnings == (
        "adapter 1 was tuned on the base tiny, adapter 2 on another one, other; their updates are stacked as they are.",
    )


def test_what_a_method_does_not_use_is_not_remembered(make_adapter):
    info = merge([make_adapter("paper")])[1].info
    assert (info.density, info.seed, info.rank) == (None, None, None)


def test_the_clips_latents_stay_if_all_are_of_one_clip(make_adapter, noise):
    adapter, latents = make_adapter("lite"), noise(1, 4, 3, 8, 8)
    carrying = changed(adapter, tensors={**adapter.tensors, LATENTS: latents})
    assert torch.equal(merge([adapter, carrying])[0].latents, latents)
    clip = adapter.provenance.clip.model_copy(update={"fingerprint": "2" * 64})
    assert merge([changed(adapter, clip=clip), carrying])[0].latents is None


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("preset", PRESETS)
def test_stock_peft_loads_a_merged_adapter(preset, method, make_adapter, flat, unet, run, tmp_path):
    merged, _ = merge([make_adapter(preset, seed=n, rank=2 + n) for n in range(2)], [0.5, 0.5], method)
    theirs = PeftModel.from_pretrained(inflate(flat), peft.write(merged, tmp_path / "folder"))
    Attachments(unet).attach("merged", merged)
    # dense query updates are LoRAs of full rank there, which add x·(B·I) to x·W
    assert (run() - run(theirs)).abs().max() <= 1e-4


def test_a_merged_adapter_can_be_merged_again(make_adapter):
    adapters = [make_adapter("lite", seed=n) for n in range(3)]
    two, _ = merge(adapters[:2], [0.5, 1.0])
    three, report = merge([two, adapters[2]], [2.0, 1.0])
    assert_updates(deltas(three), summed(adapters, [1.0, 2.0, 1.0]))
    assert report.error <= 1e-6


def test_a_merged_adapter_edits_in_the_pipeline(pipe, clip, make_adapter, tmp_path):
    merged, _ = merge([make_adapter(preset, seed=n) for n, preset in enumerate(("hybrid", "lite"))])
    merged.save(tmp_path / "merged.safetensors")
    plain = pipe.invert(clip, num_inference_steps=2).trajectory
    assert dataclasses.asdict(pipe.load_adapter(tmp_path / "merged.safetensors").subset)["preset"] == "hybrid"
    assert not torch.equal(pipe.invert(clip, num_inference_steps=2).trajectory, plain)
