"""Norms, ranks and energy of updates, against the formula on the update multiplied out in float64."""

import dataclasses
import math

import pytest
import torch

from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError
from tav_peft.merging import merge
from tav_peft.tools.spectra import Spectrum, depth, energy, measure, norm, plot, ranks_of_interest
from tav_peft.unet import temporal_init


def of(*values):
    return Spectrum("mid_block.attn1.to_q.weight", "st_attn", (8, 8), None, None, tuple(map(float, values)))


def exact(adapter, parameter):
    """ΔW in float64, by the definition of each form."""
    module = parameter.removesuffix(".weight")
    tensors = {name: tensor.double() for name, tensor in adapter.tensors.items()}
    if f"{module}.lora_A.weight" in tensors:
        rank, alpha = tensors[f"{module}.lora_A.weight"].shape[0], adapter.peft_config["lora_alpha"]
        return alpha / rank * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    if f"{module}.diff" in tensors:
        return tensors[f"{module}.diff"]
    first = temporal_init.initial(parameter, tensors[parameter].shape, 0)
    return tensors[parameter] - first.double()


@pytest.mark.parametrize(("preset", "alpha"), [("lite", 6.0), ("hybrid", None), ("paper", None)])
def test_singular_values_are_those_of_the_update_multiplied_out(preset, alpha, make_adapter):
    adapter = make_adapter(preset, rank=3, alpha=alpha)
    spectra = measure(adapter)
    assert len(spectra) == {"lite": 42, "hybrid": 49, "paper": 49}[preset]
    for each in spectra:
        update = exact(adapter, each.parameter)
        assert each.shape == tuple(update.shape)
        expected = torch.linalg.svdvals(update.reshape(len(update), -1))[: len(each.values)]
        # float32 has 24 bits, the SVD loses a few of the largest value's
        torch.testing.assert_close(
            torch.tensor(each.values, dtype=torch.float64), expected, rtol=0, atol=float(expected[0]) * 1e-5
        )
        assert each.norm == pytest.approx(float(update.norm()), rel=1e-5)
        low = preset == "lite" or (preset == "hybrid" and "attn_temp" not in each.parameter)
        assert (each.rank, each.alpha) == ((3, alpha or 3) if low else (None, None))


def test_ranks_and_energy_are_those_of_the_formulas():
    spectrum = of(4, 2, 1, 0)
    assert spectrum.stable_rank == 21 / 16
    shares = [4 / 7, 2 / 7, 1 / 7]
    assert spectrum.effective_rank == pytest.approx(math.prod(p**-p for p in shares))
    assert [spectrum.energy(rank) for rank in (1, 2, 3, 4)] == [16 / 21, 20 / 21, 1, 1]
    assert of(3, 3, 3).stable_rank == 3
    assert of(3, 3, 3).effective_rank == pytest.approx(3)
    together = [spectrum, of(2, 0, 0, 0)]
    assert norm(together) == 5
    assert energy(together, 1) == 20 / 25


def test_where_nothing_was_tuned_all_is_kept():
    assert (of(0, 0).norm, of(0, 0).stable_rank, of(0, 0).effective_rank, of(0, 0).energy(1)) == (0, 0, 0, 1)


@pytest.mark.parametrize(("count", "ranks"), [(1, [1]), (3, [1, 2]), (4, [1, 2, 4]), (9, [1, 2, 4, 8])])
def test_ranks_of_interest_are_powers_of_two_up_to_the_last(count, ranks):
    assert ranks_of_interest([of(*range(count, 0, -1)), of(1)]) == ranks


def test_updates_come_in_the_order_of_the_blocks(make_adapter):
    names = [each.parameter for each in measure(make_adapter())]
    groups = [name.split(".")[0] for name in names]
    assert [*dict.fromkeys(groups)] == ["down_blocks", "mid_block", "up_blocks"]
    assert sorted(groups, key=["down_blocks", "mid_block", "up_blocks"].index) == groups
    assert depth("up_blocks.10.attentions.0.x.attn1.to_q.weight") > depth(
        "up_blocks.9.attentions.0.x.attn1.to_q.weight"
    )


def test_a_file_is_measured_as_the_adapter_in_memory(make_adapter, tmp_path):
    adapter, steps = make_adapter("hybrid"), []
    file = adapter.save(tmp_path / "a.safetensors")
    assert measure(file, progress=lambda *counts: steps.append(counts)) == measure(adapter)
    assert steps == [(n, 49) for n in range(1, 50)]


def test_of_attentions_side_by_side_the_weights_are_measured(make_adapter):
    both, _ = merge([make_adapter("hybrid"), make_adapter("hybrid", temporal_seed=7)], t_attn="concat")
    (spectrum,) = (
        s
        for s in measure(both)
        if s.parameter.endswith("mid_block.attentions.0.transformer_blocks.0.attn_temp.to_k.weight")
    )
    assert spectrum.shape == (64, 32)
    assert spectrum.norm == pytest.approx(float(both.tensors[spectrum.parameter].double().norm()))


@pytest.mark.parametrize("preset", ["lite", "paper"])
def test_what_is_not_finite_is_refused_by_name(preset, make_adapter, tmp_path):
    adapter = make_adapter(preset)
    name = next(name for name in adapter.tensors if "attn1" in name)
    tensors = {**adapter.tensors, name: adapter.tensors[name] * torch.inf}
    file = dataclasses.replace(adapter, tensors=tensors).save(tmp_path / "broken.safetensors")
    with pytest.raises(AdapterError, match=r"broken\.safetensors: .*attn1\.to_q.* holds NaN or infinity"):
        measure(file)


def test_an_unknown_start_of_t_attn_is_refused(make_adapter):
    adapter = make_adapter()
    init = adapter.provenance.temporal_init.model_copy(update={"name": "other-2"})
    foreign = Adapter(
        adapter.tensors, adapter.peft_config, adapter.provenance.model_copy(update={"temporal_init": init})
    )
    with pytest.raises(AdapterError, match="its T-Attn starts from 'other-2'"):
        measure(foreign)


def test_the_plot_is_a_picture(make_adapter, tmp_path):
    plot(measure(make_adapter("hybrid")), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
