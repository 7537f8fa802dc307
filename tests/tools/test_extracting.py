"""Adapters out of tuned models: what was put into the tuned model comes out again, and what does not fit is told."""

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.tools.extracting import extract
from tav_peft.tools.ranks import RankRule
from tav_peft.unet.inflation import is_temporal
from tav_peft.unet.probe import probe
from tav_peft.updates import Updates

QUERIES = ("attn1.to_q.weight", "attn2.to_q.weight")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def own_base(base, tmp_path):
    return shutil.copytree(base, tmp_path / "own" / "base")


def changed(tensors, *, rank=2, others=()):
    """Add a random update of a rank to every query projection, and a hundredth of itself to other tensors."""
    generator = torch.Generator().manual_seed(5)
    tuned = dict(tensors)
    for name in sorted(tensors):
        if name.endswith(QUERIES):
            rows, columns = tensors[name].shape
            B, A = (torch.randn(s, generator=generator) * 0.2 for s in ((rows, rank), (rank, columns)))
            tuned[name] = tensors[name] + B @ A
        elif name in others:
            tuned[name] = tensors[name] * 1.01
    return tuned


@pytest.fixture
def tuned(own_base, tmp_path):
    """Write a fine-tuned copy of the base; give what was changed."""

    def write(name="tuned", *, dtype=torch.float32, **how):
        before = load_file(own_base / UNET)
        after = changed(before, **how)
        folder = shutil.copytree(own_base, tmp_path / name)
        save_file({key: tensor.to(dtype) for key, tensor in after.items()}, folder / UNET)
        return folder, {key: (after[key] - before[key]) for key in before if key.endswith(QUERIES)}

    return write


def test_the_update_of_a_fine_tuned_folder_comes_out(tuned, own_base, pipe):
    folder, expected = tuned()
    made = extract(folder, pipe, RankRule(2), caption="a square")
    updates = Updates(made.adapter, "made")
    assert set(updates.layout) == set(expected)
    for name, update in expected.items():
        torch.testing.assert_close(updates[name], update, rtol=0, atol=2e-6)
    assert made.left_out is None
    assert made.report.error < 1e-5
    assert min(each.energy for each in made.report.updates) > 1 - 1e-9
    said = made.adapter.provenance
    assert (said.caption, said.subset["parts"]) == ("a square", ("st_attn", "cross_attn"))
    assert said.base.fingerprint == pipe.base_fingerprint
    assert said.probe == probe(made.adapter, pipe.unet)
    (step,) = said.derived_from
    assert (step.tool, step.name, step.settings) == ("extract", "tuned", {"rank": 2, "preset": "hybrid"})


def test_the_adapter_does_what_the_tuned_model_does(tuned, pipe, noise):
    folder, _ = tuned()
    latents, text = noise(1, 4, 3, 8, 8), noise(1, 24, 32, seed=1)
    with torch.no_grad():
        expected = TuneAVideoPipeline.from_pretrained(folder).unet(latents, 500, text).sample
        plain = pipe.unet(latents, 500, text).sample
        pipe.load_adapter(extract(folder, pipe, RankRule(energy=0.9999999)).adapter)
        attached = pipe.unet(latents, 500, text).sample
    assert float((plain - expected).abs().max()) > 1e-2
    torch.testing.assert_close(attached, expected, rtol=0, atol=2e-4)


def test_it_goes_through_a_file(tuned, pipe, tmp_path):
    made = extract(tuned()[0], pipe, RankRule(1)).adapter
    loaded = Adapter.load(made.save(tmp_path / "a.safetensors"))
    assert loaded.provenance.model_dump(mode="json") == made.provenance.model_dump(mode="json")
    assert all(torch.equal(tensor, made.tensors[name]) for name, tensor in loaded.tensors.items())


@pytest.mark.parametrize("form", ["unet", "file", "variant", "bin", "single.safetensors", "single.ckpt"])
def test_every_form_of_a_model_gives_the_same(form, tuned, own_base, pipe, ldm, tmp_path):
    folder, expected = tuned()
    path = {"unet": folder / "unet", "file": folder / UNET}.get(form, tmp_path / form)
    if form == "bin":
        shutil.copytree(folder / "unet", path)
        torch.save(load_file(folder / UNET), path / "diffusion_pytorch_model.bin")
        (path / "diffusion_pytorch_model.safetensors").unlink()
    elif form.startswith("single"):
        tensors = {name: tensor.contiguous() for name, tensor in ldm("sd1", folder).items()}
        save_file(tensors, path) if form.endswith("safetensors") else torch.save(
            {"state_dict": tensors}, path
        )
    elif form == "variant":
        shutil.copytree(folder, path)
        (path / UNET).rename(path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    updates = Updates(extract(path, pipe, RankRule(2)).adapter, "made")
    for name, update in expected.items():
        torch.testing.assert_close(updates[name], update, rtol=0, atol=2e-6)


def test_energy_chooses_a_rank_for_each_module(tuned, pipe):
    folder, expected = tuned(rank=6)
    made = extract(folder, pipe, RankRule(energy=0.8))
    for each in made.report.updates:
        values = torch.linalg.svdvals(expected[each.parameter].double())
        assert each.rank == RankRule(energy=0.8).count(values)
        assert each.energy >= 0.8 - 1e-6
    assert len({each.rank for each in made.report.updates}) > 1


def test_what_else_was_tuned_is_told(tuned, own_base, pipe):
    names = [name for name in load_file(own_base / UNET) if ".attn1.to_k" in name or name == "conv_in.weight"]
    made = extract(tuned(others=names)[0], pipe, RankRule(2))
    assert made.left_out.tensors == len(names) == 8
    assert made.left_out.first == "conv_in.weight"
    assert made.left_out.change == pytest.approx(0.01, rel=1e-4)
    count = sum(not is_temporal(name) for name in pipe.unet.state_dict())
    assert made.left_out.compared == count - 14


def test_rounding_of_the_file_is_no_change(tuned, own_base, pipe, tmp_path):
    """Only one projection differs by more than half precision does; no other has an update."""
    before = load_file(own_base / UNET)
    name = next(name for name in sorted(before) if name.endswith("attn1.to_q.weight"))
    half = {key: tensor.half() for key, tensor in before.items()}
    half[name] = (before[name] + 0.1).half()
    folder = shutil.copytree(own_base, tmp_path / "half")
    save_file(half, folder / UNET)
    made = extract(folder, pipe, RankRule(1))
    assert [each.parameter for each in made.report.updates if each.norm] == [name]
    assert made.left_out is None
    torch.testing.assert_close(
        Updates(made.adapter, "made")[name], torch.full_like(before[name], 0.1), rtol=0, atol=2e-3
    )


def test_paper_keeps_the_updates_whole(tuned, pipe):
    folder, expected = tuned()
    made = extract(folder, pipe, None, preset="paper")
    assert made.report is None
    assert made.adapter.peft_config is None
    assert all(
        torch.equal(made.adapter.tensors[n.replace(".weight", ".diff")], u) for n, u in expected.items()
    )


# -- runs of the original code -----------------------------------------------------------------------------


@pytest.fixture
def run(pipe, tmp_path):
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    tuned = changed(state)
    for number, name in enumerate(name for name in tuned if ".attn_temp." in name):
        tuned[name] = tuned[name] + 0.05 * torch.randn(
            tuned[name].shape, generator=torch.Generator().manual_seed(number)
        )
    (tmp_path / "run" / "unet").mkdir(parents=True)
    torch.save(tuned, tmp_path / "run" / "unet" / "diffusion_pytorch_model.bin")
    return tmp_path / "run", state, tuned


def test_of_a_run_queries_become_loras_and_t_attn_stays(run, pipe):
    folder, state, tuned = run
    made = extract(folder, pipe, RankRule(energy=0.99), caption="a square")
    assert made.adapter.subset.preset == "hybrid"
    assert made.adapter.provenance.subset["parts"] == ("st_attn", "cross_attn", "t_attn")
    assert {each.rank for each in made.report.updates} == {2}
    updates = Updates(made.adapter, "made")
    for name in tuned:
        if ".attn_temp." in name:
            assert torch.equal(made.adapter.tensors[name], tuned[name])
        elif name.endswith(QUERIES):
            error = (updates[name] - (tuned[name] - state[name])).norm() / (tuned[name] - state[name]).norm()
            assert error**2 <= 0.01 + 1e-6
    assert made.adapter.provenance.probe == probe(made.adapter, pipe.unet)


def test_lite_takes_t_attn_against_the_recorded_start(run, pipe):
    folder, state, tuned = run
    made = extract(folder, pipe, RankRule(32), preset="lite")
    assert made.adapter.subset.preset == "lite"
    updates = Updates(made.adapter, "made")
    for name in tuned:
        if ".attn_temp." in name and name.endswith("weight"):
            torch.testing.assert_close(updates[name], tuned[name] - state[name], rtol=0, atol=2e-6)
    lost = [each.parameter for each in made.report.updates if each.rank == 0]
    assert len(lost) == 7
    assert all(name.endswith("attn_temp.to_out.0.bias") for name in lost)


def test_a_run_that_tuned_more_is_refused(run, pipe):
    folder, _, tuned = run
    tuned["conv_in.weight"] = tuned["conv_in.weight"] + 1
    torch.save(tuned, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(AdapterError, match=r"has tuned more than Tune-A-Video does: 1 of .*conv_in\.weight"):
        extract(folder, pipe, RankRule(2))


# -- mistakes ----------------------------------------------------------------------------------------------


def test_a_model_that_is_the_base_has_nothing_to_extract(own_base, pipe):
    with pytest.raises(AdapterError, match="there is nothing to extract"):
        extract(own_base, pipe, RankRule(2))
    with pytest.raises(AdapterError, match="there is nothing to extract"):
        extract(own_base, pipe, None, preset="paper")


@pytest.mark.parametrize(
    ("rule", "preset", "message"),
    [(None, None, "only the preset paper"), (None, "lite", "only the preset paper"),
     (RankRule(2), "paper", "Leave out the rank"), (RankRule(2), "tiny", "cannot become tiny")],
)  # fmt: skip
def test_a_form_that_cannot_be_is_refused(rule, preset, message, tuned, pipe):
    with pytest.raises(AdapterError, match=message):
        extract(tuned()[0], pipe, rule, preset=preset)


def test_another_architecture_is_refused(pipe, v_base, xl_base, ldm, tmp_path):
    with pytest.raises(
        AdapterError, match=r"is no UNet like that of tiny: \d+ tensors are missing, too many"
    ):
        extract(v_base, pipe, RankRule(2))
    save_file({n: t.contiguous() for n, t in ldm("sdxl", xl_base).items()}, tmp_path / "xl.safetensors")
    with pytest.raises(AdapterError, match=r"xl\.safetensors has not the UNet of this base: \d+ tensors"):
        extract(tmp_path / "xl.safetensors", pipe, RankRule(2))


def test_what_is_not_there_cut_short_or_in_pieces_is_refused(tuned, pipe, tmp_path):
    with pytest.raises(AdapterError, match="nothing does not exist"):
        extract(tmp_path / "nothing", pipe, RankRule(2))
    folder, _ = tuned()
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-9])
    with pytest.raises(AdapterError, match="is not a whole safetensors file"):
        extract(folder, pipe, RankRule(2))
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    with pytest.raises(AdapterError, match="has a UNet in several files"):
        extract(folder, pipe, RankRule(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"has no unet/diffusion_pytorch_model\.bin"):
        extract(tmp_path / "empty", pipe, RankRule(2))


def test_what_is_not_finite_is_refused_by_name(tuned, pipe):
    folder, _ = tuned()
    tensors = load_file(folder / UNET)
    name = next(name for name in sorted(tensors) if name.endswith("attn2.to_q.weight"))
    save_file({**tensors, name: tensors[name] * torch.nan}, folder / UNET)
    with pytest.raises(AdapterError, match=f"{name} holds NaN"):
        extract(folder, pipe, RankRule(2))


def test_diffusers_reads_the_tuned_model_as_we_do(tuned):
    """The model of these tests is one that diffusers loads."""
    folder, _ = tuned()
    state = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(folder / UNET).items())
