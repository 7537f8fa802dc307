"""T-Attn of different initial weights, run side by side: what comes out is the sum of what each gives."""

import itertools

import pytest
import torch

from tav_peft.errors import AdapterError
from tav_peft.formats import peft
from tav_peft.merging import merge
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.auditing import temporal_fingerprint
from tav_peft.unet.branches import Branch
from tav_peft.unet.inflation import VideoTransformerBlock, inflate

WEIGHTS = [0.7, -1.3]
SEEDS = [3, 8]
UP = "up_blocks.0.attentions.0.transformer_blocks.0.attn_temp"


@pytest.fixture
def make_pair(make_adapter):
    def make(*presets, **options):
        given = zip(presets, SEEDS, strict=True)
        return [make_adapter(preset, seed=seed, temporal_seed=seed, **options) for preset, seed in given]

    return make


@pytest.fixture
def run(noise):
    inputs = noise(1, 4, 3, 8, 8), 500, noise(1, 24, 32)

    def forward(unet):
        with torch.no_grad():
            return unet(*inputs).sample

    return forward


def tuned(flat, adapter):
    """The UNet with one adapter alone, inflated with the adapter's own seed."""
    unet = inflate(flat, temporal_seed=adapter.provenance.temporal_init.seed)
    Attachments(unet).attach("it", adapter)
    return unet


def temporal(unet):
    return [m.attn_temp for m in unet.modules() if isinstance(m, VideoTransformerBlock)]


def summed(flat, adapters, weights):
    """A UNet whose temporal attentions add, by weight, what those of the adapters' own UNets give for their tokens."""
    unet = inflate(flat)
    others = [temporal(tuned(flat, adapter)) for adapter in adapters]
    for place, own in enumerate(temporal(unet)):
        branches = [other[place] for other in others]

        def add(_, inputs, output, branches=branches):
            return output + sum(w * branch(*inputs) for w, branch in zip(weights, branches, strict=True))

        own.register_forward_hook(add)
    return unet


@pytest.mark.parametrize("presets", [*itertools.product(["hybrid", "lite"], repeat=2)], ids="+".join)
def test_every_branch_gives_what_it_gives_alone(presets, make_pair, flat, noise):
    adapters, x = make_pair(*presets, parts=("t_attn",)), noise(9, 3, 32)
    merged, report = merge(adapters, WEIGHTS, t_attn="concat")
    assert (report.temporal_branches, report.parts["t_attn"].error, report.preset) == (2, 0.0, "hybrid")
    unet = inflate(flat)
    Attachments(unet).attach("merged", merged)
    got, one, other = (temporal(it)[1] for it in (unet, *(tuned(flat, adapter) for adapter in adapters)))
    with torch.no_grad():
        expected = WEIGHTS[0] * one(x) + WEIGHTS[1] * other(x)
        assert expected.abs().max() > 0.05
        assert (got(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("presets", [("hybrid", "hybrid"), ("lite", "hybrid")], ids="+".join)
def test_the_unet_is_that_with_the_branches_added_by_hand(presets, make_pair, flat, run):
    adapters = make_pair(*presets, parts=("t_attn",))
    merged, _ = merge(adapters, WEIGHTS, t_attn="concat")
    unet = inflate(flat)
    plain, attachments = run(unet), Attachments(unet)
    attachments.attach("merged", merged)
    expected = run(summed(flat, adapters, WEIGHTS))
    assert (expected - plain).abs().max() > 0.05
    assert (run(unet) - expected).abs().max() <= 1e-5  # outputs are of order 1, through five blocks
    attachments.set_strengths({"merged": 0.5})
    assert (run(unet) - run(summed(flat, adapters, [w / 2 for w in WEIGHTS]))).abs().max() <= 1e-5


def test_queries_are_merged_as_ever(make_pair, make_adapter):
    pair = make_pair("paper", "lite")
    apart, _ = merge(pair, WEIGHTS, t_attn="concat")
    together, _ = merge([make_adapter("paper", seed=3), make_adapter("lite", seed=8)], WEIGHTS)
    queries = [name for name in together.tensors if name.endswith(".diff")]
    assert len(queries) == 14
    assert all(torch.equal(apart.tensors[name], together.tensors[name]) for name in queries)


def test_strength_0_is_the_base_and_detaching_leaves_it_bit_for_bit(make_pair, flat, run):
    merged, _ = merge(make_pair("paper", "lite"), t_attn="concat")
    unet = inflate(flat)
    plain, state, kinds = run(unet), dict(unet.state_dict()), [type(m) for m in unet.modules()]
    attachments = Attachments(unet)
    attachments.attach("merged", merged, 0.0)
    assert torch.equal(run(unet), plain)
    attachments.set_strengths({"merged": 1.0})
    assert (run(unet) - plain).abs().max() > 0.05
    attachments.detach("merged")
    assert torch.equal(run(unet), plain)
    assert [type(m) for m in unet.modules()] == kinds
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


def test_branches_stack_with_other_adapters_in_any_order(make_pair, make_adapter, flat, run):
    merged, _ = merge(make_pair("hybrid", "lite"), t_attn="concat")
    others = {"merged": merged, "dense": make_adapter("hybrid", seed=5), "low": make_adapter("lite", seed=6)}
    outputs = []
    for order in itertools.permutations(others):
        unet = inflate(flat)
        attachments = Attachments(unet)
        for name in order:
            attachments.attach(name, others[name], 0.5)
        outputs.append(run(unet))
        assert temporal_fingerprint(unet, 0) == temporal_fingerprint(inflate(flat), 0)
        for name in order:
            attachments.detach(name)
        assert not any(isinstance(module, Branch) for module in unet.modules())
    assert max(float((output - outputs[0]).abs().max()) for output in outputs) <= 1e-5


def test_branches_of_branches_are_all_there(make_pair, make_adapter, flat, run):
    third = make_adapter("hybrid", seed=4, temporal_seed=4, parts=("t_attn",))
    pair = make_pair("hybrid", "lite", parts=("t_attn",))
    two, _ = merge(pair, [0.5, 1.0], t_attn="concat")
    three, report = merge([two, third], [2.0, -1.0], t_attn="concat")
    assert report.temporal_branches == 3
    unet = inflate(flat)
    Attachments(unet).attach("three", three)
    assert (run(unet) - run(summed(flat, [*pair, third], [1.0, 2.0, -1.0]))).abs().max() <= 1e-5


def test_a_block_that_one_does_not_have_is_the_others_alone(make_pair, make_adapter, flat, noise):
    one = make_adapter("hybrid", parts=("t_attn",), blocks=("down",), temporal_seed=3)
    other = make_adapter("hybrid", seed=1, parts=("t_attn",), blocks=("down", "up"), temporal_seed=8)
    merged, _ = merge([one, other], t_attn="concat")
    unet, x = inflate(flat), noise(9, 3, 32)
    Attachments(unet).attach("merged", merged)
    with torch.no_grad():
        got, expected = (it.get_submodule(UP)(x) for it in (unet, tuned(flat, other)))
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_one_t_attn_alone_stays_an_update(make_pair, make_adapter):
    adapters = [make_adapter("lite", parts=("st_attn",)), make_pair("hybrid", "lite")[0]]
    merged, report = merge(adapters, t_attn="concat")
    assert (report.temporal_branches, merged.provenance.temporal_init.seed) == (1, 3)


def test_the_result_moves_with_the_pipeline(make_pair, pipe, clip, tmp_path):
    merged, _ = merge(make_pair("hybrid", "lite"), t_attn="concat")
    pipe.load_adapter(merged.save(tmp_path / "merged.safetensors"))
    pipe.to(dtype=torch.bfloat16)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert pipe.invert(clip, num_inference_steps=2).trajectory.isfinite().all()


def test_what_cannot_hold_or_merge_branches_says_so(make_pair, make_adapter, tmp_path):
    merged, _ = merge(make_pair("hybrid", "lite"), t_attn="concat")
    with pytest.raises(
        AdapterError, match="2 temporal attentions side by side, which stock PEFT has no place for"
    ):
        peft.write(merged, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(AdapterError, match="adapter 1 has several temporal attentions side by side"):
        merge([merged, make_adapter("hybrid", temporal_seed=3)])
