"""Smaller LoRAs: the best of their rank by Eckart and Young, their errors told, attachable, and remembered."""

import dataclasses
import itertools

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tav_peft.adapter import LATENTS, Adapter
from tav_peft.errors import AdapterError
from tav_peft.formats import peft
from tav_peft.merging import merge
from tav_peft.tools.comparing import compare
from tav_peft.tools.ranks import RankRule
from tav_peft.tools.resizing import resize, resize_file
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import inflate, is_temporal
from tav_peft.updates import Updates


def best_error(update: Tensor, rank: int) -> float:
    """‖ΔW - X‖ / ‖ΔW‖ of the nearest X of a rank (Eckart and Young)."""
    values = torch.linalg.svdvals(update.double())
    return float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())


@pytest.mark.parametrize("preset", ["lite", "hybrid", "paper"])
def test_every_lora_is_the_nearest_of_its_rank(preset, make_adapter):
    adapter = make_adapter(preset, rank=4, alpha=7)
    made, report = resize(adapter, RankRule(2))
    before, after = Updates(adapter, "before"), Updates(made, "after")
    assert len(report.updates) == (42 if preset == "lite" else 14)
    for each in report.updates:
        best = best_error(before[each.parameter], 2)
        assert best > 0.1
        assert each.error == pytest.approx(best, rel=1e-4)
        assert each.energy == pytest.approx(1 - best**2, rel=1e-4)
        difference = (after[each.parameter] - before[each.parameter]).double().norm()
        assert float(difference) == pytest.approx(best * each.norm, rel=1e-4)
        assert (each.before, each.rank) == (None if preset == "paper" else 4, 2)
        assert after.rank(each.parameter) == 2
    assert report.bytes == made.summary()["bytes"] < report.bytes_before == adapter.summary()["bytes"]
    # what is not resized is what it was, to the bit
    rest = [n for n in adapter.tensors if is_temporal(n) and preset != "lite"]
    assert all(torch.equal(made.tensors[name], adapter.tensors[name]) for name in rest)


def test_the_errors_of_parts_and_of_all_are_those_of_all_their_entries(make_adapter):
    adapter = make_adapter("lite", rank=4)
    made, report = resize(adapter, RankRule(1))
    found = compare(adapter, made)
    assert report.parts() == pytest.approx(found.parts(), rel=1e-5)
    wrong = sum(each.of_difference for each in found.updates)
    assert report.error == pytest.approx((wrong / sum(each.of_a for each in found.updates)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    "rule", [RankRule(energy=0.9), RankRule(frobenius=0.9), RankRule(sv_ratio=1.5), RankRule(sv_cumulative=0.7),
             RankRule(2, energy=0.9)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("preset", ["lite", "paper"])
def test_each_update_has_the_rank_that_the_rule_gives_it(rule, preset, make_adapter, pipe):
    adapter = make_adapter(preset, rank=4)
    made, report = resize(adapter, rule)
    before, ranks = Updates(adapter, "before"), set()
    for each in report.updates:
        values = torch.linalg.svdvals(before[each.parameter].double())
        own = rule.count(values[: each.before])
        assert each.rank == own
        ranks.add(own)
        if rule.energy and not rule.rank:
            assert each.energy >= 0.9 - 1e-6
    assert len(ranks) > 1 or rule.rank
    pipe.load_adapter(made)  # different ranks, each where its pattern says
    for each in report.updates:
        module = pipe.unet.get_submodule(each.parameter.removesuffix(".weight"))
        assert {*module.r.values()} == {each.rank}
        assert {*module.scaling.values()} == {1.0}


@pytest.mark.parametrize("rule", [RankRule(4), RankRule(64), RankRule(energy=1)], ids=str)
def test_a_rank_that_is_enough_changes_nothing(rule, make_adapter):
    adapter = make_adapter("lite", rank=4, alpha=8)
    made, report = resize(adapter, rule)
    assert {each.rank for each in report.updates} == {4}
    assert report.error < 1e-6
    assert made.provenance.subset == adapter.provenance.subset | {
        "parts": ("st_attn", "cross_attn", "t_attn"),
        "blocks": ("down", "mid", "up"),
    }


def test_lite_makes_loras_of_a_dense_t_attn_against_its_initial_weights(make_adapter):
    adapter = make_adapter("paper", temporal_seed=7)
    made, report = resize(adapter, RankRule(3), preset="lite")
    before, after = Updates(adapter, "before"), Updates(made, "after")
    assert made.subset.preset == "lite"
    assert len(report.updates) == 49
    for each in report.updates:
        if each.parameter.endswith("bias"):
            assert (each.rank, each.error, each.energy) == (0, 1.0, 0.0)
            assert each.norm == pytest.approx(float(before[each.parameter].double().norm()))
            assert each.parameter not in after.layout
        else:
            assert each.error == pytest.approx(best_error(before[each.parameter], 3), rel=1e-4)
            assert (
                float((after[each.parameter] - before[each.parameter]).norm())
                <= each.error * each.norm * 1.001
            )
    only = compare(adapter, made).only_a
    assert len(only) == 7
    assert all(name.endswith("bias") for name in only)


def test_the_result_does_what_its_update_says(pipe, make_adapter, noise):
    """Attached, it is the model with the truncated updates added by hand."""
    adapter = make_adapter("hybrid", rank=4)
    made, _ = resize(adapter, RankRule(2))
    latents, text = noise(1, 4, 3, 8, 8), noise(1, 24, 32, seed=1)
    pipe.load_adapter(made)
    with torch.no_grad():
        attached = pipe.unet(latents, 500, text).sample
        pipe.unload_adapter()
        updates = Updates(made, "made")
        for name, parameter in pipe.unet.named_parameters():
            if name in updates.layout:
                parameter.data = updates.absolute(name) if is_temporal(name) else parameter + updates[name]
        by_hand = pipe.unet(latents, 500, text).sample
    torch.testing.assert_close(attached, by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("preset", "rule"), [("paper", RankRule(2)), ("lite", RankRule(energy=0.8))])
def test_a_file_is_resized_as_the_adapter_in_memory(preset, rule, make_adapter, tmp_path):
    adapter, steps = make_adapter(preset, rank=3, dtype=torch.float16), []
    latents = {LATENTS: torch.ones(1, 4, 3, 8, 8)}
    adapter = dataclasses.replace(adapter, tensors={**adapter.tensors, **latents})
    file = adapter.save(tmp_path / "a.safetensors")
    told = resize_file(file, rule, output=tmp_path / "b.safetensors", progress=lambda *n: steps.append(n))
    made, report = resize(file, rule)
    assert told == report
    assert (tmp_path / "b.safetensors").read_bytes() == made.save(tmp_path / "c.safetensors").read_bytes()
    assert steps == [(n, len(report.updates) if preset == "lite" else 14) for n in range(1, steps[-1][1] + 1)]
    assert torch.equal(Adapter.load(tmp_path / "b.safetensors").latents, latents[LATENTS])
    assert {t.dtype for t in made.weights.values()} == {torch.float16}


def test_rounding_to_the_adapters_precision_is_part_of_the_error(make_adapter):
    adapter = make_adapter("lite", rank=2, alpha=6, dtype=torch.float16)
    made, report = resize(adapter, RankRule(2))
    assert 0 < report.error < 2**-10
    assert report.error == pytest.approx(
        (sum(u.of_difference for u in compare(adapter, made).updates)
         / sum(u.of_a for u in compare(adapter, made).updates)) ** 0.5
    )  # fmt: skip


def test_it_is_remembered_what_was_done(make_adapter, tmp_path):
    file = make_adapter("paper").save(tmp_path / "a.safetensors")
    made, _ = resize(file, RankRule(8, energy=0.9))
    (step,) = made.provenance.derived_from
    assert (step.tool, step.name) == ("resize", "a.safetensors")
    assert step.settings == {"rank": 8, "energy": 0.9, "preset": "hybrid"}
    assert made.provenance.probe is None
    assert made.provenance.clip == make_adapter().provenance.clip
    again, _ = resize(made, RankRule(2))
    assert [each.settings["rank"] for each in again.provenance.derived_from] == [8, 2]


def test_an_update_that_is_zero_stays_zero(make_adapter):
    adapter = make_adapter("paper")
    tensors = {n: t * 0 if n.endswith("diff") else t for n, t in adapter.tensors.items()}
    made, report = resize(dataclasses.replace(adapter, tensors=tensors), RankRule(energy=0.9))
    assert {(each.rank, each.error) for each in report.updates} == {(1, 0.0)}
    assert all(not Updates(made, "")[each.parameter].any() for each in report.updates)


def test_an_imported_update_in_float64_becomes_float32(make_adapter):
    adapter = make_adapter("paper", parts=("st_attn",))
    doubled = dataclasses.replace(adapter, tensors={n: t.double() for n, t in adapter.tensors.items()})
    made, _ = resize(doubled, RankRule(2))
    assert {t.dtype for t in made.tensors.values()} == {torch.float32}


def test_attentions_side_by_side_stay_dense(make_adapter):
    both, _ = merge([make_adapter("hybrid"), make_adapter("hybrid", temporal_seed=7)], t_attn="concat")
    made, report = resize(both, RankRule(1))
    assert made.provenance.temporal_branches == 2
    assert {each.part for each in report.updates} == {"st_attn", "cross_attn"}
    with pytest.raises(AdapterError, match="2 temporal attentions side by side"):
        resize(both, RankRule(1), preset="lite")


@pytest.mark.parametrize(
    ("given", "preset", "message"),
    [
        ({"preset": "lite"}, "hybrid", "has the preset lite, .* cannot become hybrid. Choose lite"),
        ({"preset": "paper"}, "paper", "so it cannot become paper. Choose lite or hybrid"),
        ({"preset": "hybrid"}, "tiny", "so it cannot become tiny"),
        ({"preset": "hybrid", "parts": ("t_attn",)}, None, "a dense T-Attn alone, which only the preset lite has"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(given, preset, message, make_adapter):
    with pytest.raises(AdapterError, match=message):
        resize(make_adapter(**given), RankRule(2), preset=preset)


@pytest.mark.parametrize(
    ("preset", "kind"), [("lite", "lora_A.weight"), ("paper", "diff"), ("hybrid", "to_k.weight")]
)
def test_what_is_not_finite_is_refused_and_nothing_is_written(preset, kind, make_adapter, tmp_path):
    adapter = make_adapter(preset)
    name = next(name for name in adapter.tensors if name.endswith(kind))
    tensors = {**adapter.tensors, name: adapter.tensors[name] * torch.nan}
    file = dataclasses.replace(adapter, tensors=tensors).save(tmp_path / "broken.safetensors")
    with pytest.raises(AdapterError, match=r"broken\.safetensors: .* holds NaN or infinity"):
        resize_file(file, RankRule(1), output=tmp_path / "b.safetensors")
    assert [*tmp_path.iterdir()] == [file]


def test_nothing_is_made_twice(make_adapter, monkeypatch):
    from tav_peft.tools import resizing

    seen = []
    original = resizing.truncate
    monkeypatch.setattr(
        resizing, "truncate", lambda update, rank: seen.append(rank) or original(update, rank)
    )
    resize(make_adapter("paper"), RankRule(2))
    assert len(seen) == 14


def test_a_lora_of_lora_is_that_of_the_whole(make_adapter):
    """Rank 4 to 3 to 2 is rank 4 to 2: the singular values that are kept are the same."""
    adapter = make_adapter("lite", rank=4)
    straight, _ = resize(adapter, RankRule(2))
    twice, _ = resize(resize(adapter, RankRule(3))[0], RankRule(2))
    assert max(each.distance for each in compare(straight, twice).updates) < 1e-5


def test_more_rank_never_leaves_more_out(make_adapter):
    adapter = make_adapter("paper")
    errors = [resize(adapter, RankRule(rank))[1].error for rank in (1, 2, 4, 8)]
    assert all(more < less for less, more in itertools.pairwise(errors))


def test_the_clips_preview_is_kept(make_adapter, tmp_path):
    given = dataclasses.replace(make_adapter(), preview=b"RIFF\x04\x00\x00\x00WEBP")
    made, _ = resize(given, RankRule(1))
    assert made.preview == given.preview


@pytest.mark.parametrize("preset", ["hybrid", "lite"])
def test_stock_peft_computes_the_same_with_different_ranks(preset, make_adapter, flat, noise, tmp_path):
    made, report = resize(make_adapter("paper"), RankRule(energy=0.7), preset=preset)
    assert len({each.rank for each in report.updates if each.rank}) > 1
    ours, theirs = (
        inflate(flat),
        PeftModel.from_pretrained(inflate(flat), peft.write(made, tmp_path / "peft")),
    )
    inputs = noise(1, 4, 3, 8, 8), 500, noise(1, 24, 32)
    with torch.no_grad():
        plain = ours(*inputs).sample
        Attachments(ours).attach("it", made)
        attached = ours(*inputs).sample
        assert (attached - plain).abs().max() > 0.01
        torch.testing.assert_close(theirs(*inputs).sample, attached, rtol=0, atol=1e-6)
