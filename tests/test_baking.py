"""Baking into checkpoints: what comes out is the base with the updates added, and takes nothing else along."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tav_peft.adapter import Adapter
from tav_peft.baking import HEADER, bake, bake_image
from tav_peft.errors import AdapterError, BaseModelError, TuningError
from tav_peft.formats import official
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe
from tav_peft.tensor_file import FileTensors
from tav_peft.tuning import tune
from tav_peft.unet.inflation import is_temporal
from tav_peft.updates import Updates

PRESETS = ("paper", "hybrid", "lite")


def output_of(pipe, noise):
    latents, states = noise(1, 4, 3, 8, 8, seed=3), noise(1, 7, pipe.unet.config.cross_attention_dim, seed=4)
    with torch.no_grad():
        return pipe.unet(latents, 501, states).sample


def spatial(adapter):
    updates = Updates(adapter, "adapter")
    return {name: updates[name] for name in updates if not is_temporal(name)}


# -- the inflated checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_an_inflated_checkpoint_is_the_base_with_the_adapter_attached(
    preset, weight, pipe, make_adapter, noise, tmp_path
):
    adapter = make_adapter(preset)
    bake([adapter], pipe, tmp_path / "baked", [weight])
    pipe.load_adapter(adapter, strength=weight)
    loaded = TuneAVideoPipeline.from_pretrained(tmp_path / "baked")
    # the same numbers added up in another order, in float32
    torch.testing.assert_close(output_of(loaded, noise), output_of(pipe, noise), rtol=0, atol=2e-5)
    assert (loaded.unet.temporal_tuned, loaded.base_name) == (True, "baked")


def test_baking_leaves_the_base_as_it_was(pipe, make_adapter, tmp_path):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    bake([make_adapter("paper", temporal_seed=7)], pipe, tmp_path / "baked")
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert pipe.unet.temporal_seed == 0


def test_adapters_are_baked_in_by_their_weights(pipe, make_adapter, noise, tmp_path):
    adapters = [make_adapter("paper", seed=1), make_adapter("lite", seed=2)]
    made = bake(adapters, pipe, tmp_path / "baked", [0.5, 0.25])
    for name, adapter, weight in zip("ab", adapters, (0.5, 0.25), strict=True):
        pipe.load_adapter(adapter, name, weight)
    loaded = TuneAVideoPipeline.from_pretrained(tmp_path / "baked")
    torch.testing.assert_close(output_of(loaded, noise), output_of(pipe, noise), rtol=0, atol=2e-5)
    assert [each.weights for each in made.info.adapters] == [{"all": 0.5}, {"all": 0.25}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_taking_an_adapter_out_gives_the_base_back_within_its_rounding(
    preset, dtype, base, make_adapter, tmp_path
):
    adapter = make_adapter(preset)
    pipe = TuneAVideoPipeline.from_pretrained(base, dtype=dtype)
    bake([adapter], pipe, tmp_path / "in")
    inside = TuneAVideoPipeline.from_pretrained(tmp_path / "in", dtype=dtype)
    bake([adapter], inside, tmp_path / "out", [-1.0])
    out = TuneAVideoPipeline.from_pretrained(tmp_path / "out", dtype=dtype)
    baked, first = inside.unet.state_dict(), pipe.unet.state_dict()
    changed = 0
    for name, tensor in out.unet.state_dict().items():
        changed += not torch.equal(baked[name], first[name])
        rounding = torch.finfo(dtype).eps * (baked[name].float().abs() + first[name].float().abs())
        assert ((tensor.float() - first[name].float()).abs() <= rounding).all(), name
    assert changed > 8
    # T-Attn is wholly at rest again, so that adapters of it can be loaded
    assert not out.unet.temporal_tuned
    out.load_adapter(adapter)


def test_a_tuned_checkpoint_takes_no_other_t_attn_but_other_queries(pipe, make_adapter, tmp_path):
    bake([make_adapter("lite")], pipe, tmp_path / "baked")
    loaded = TuneAVideoPipeline.from_pretrained(tmp_path / "baked")
    with pytest.raises(AdapterError, match="T-Attn is tuned already"):
        loaded.load_adapter(make_adapter("lite", seed=1))
    loaded.load_adapter(make_adapter("lite", seed=1, parts=("st_attn", "cross_attn")))


def test_a_tuned_checkpoint_is_not_tuned_again(pipe, make_adapter, clip, tmp_path):
    bake([make_adapter("lite")], pipe, tmp_path / "baked")
    loaded = TuneAVideoPipeline.from_pretrained(tmp_path / "baked")
    with pytest.raises(TuningError, match="T-Attn is tuned already"):
        tune(loaded, clip, "a square", Recipe.load("pocket").override(["training.steps=1"]))


def test_a_tuned_checkpoint_that_is_saved_again_is_the_same(pipe, make_adapter, tmp_path):
    bake([make_adapter("paper", temporal_seed=3)], pipe, tmp_path / "baked")
    TuneAVideoPipeline.from_pretrained(tmp_path / "baked").save_pretrained(tmp_path / "again")
    for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "model_index.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "baked" / name).read_bytes()


def test_a_checkpoint_keeps_the_variant_and_the_other_parts_of_the_base(v_base, make_adapter, tmp_path):
    pipe = TuneAVideoPipeline.from_pretrained(v_base)
    pipe.unet.variant = pipe.unet.variant.replace(attention="full")
    pipe.save_pretrained(tmp_path / "saved")
    loaded = TuneAVideoPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.unet.variant == pipe.unet.variant
    assert (loaded.unet.temporal_tuned, loaded.scheduler.config.prediction_type) == (False, "v_prediction")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items()), part


def test_a_pipeline_with_adapters_is_not_saved_as_if_it_had_none(pipe, make_adapter, tmp_path):
    pipe.load_adapter(make_adapter())
    for save in (pipe.save_pretrained, lambda path: bake([make_adapter()], pipe, path)):
        with pytest.raises(AdapterError, match="Adapters are loaded"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_stock_diffusers_reads_the_image_model_in_it(pipe, base, make_adapter, noise, tmp_path):
    adapter = make_adapter("paper")
    bake([adapter], pipe, tmp_path / "baked")
    flat = UNet2DConditionModel.from_pretrained(base / "unet")
    for name, update in spatial(adapter).items():
        flat.get_parameter(name).data += update
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "baked", safety_checker=None).unet
    latents, states = noise(2, 4, 8, 8), noise(2, 7, flat.config.cross_attention_dim)
    with torch.no_grad():
        torch.testing.assert_close(stock(latents, 9, states).sample, flat(latents, 9, states).sample)


@pytest.mark.parametrize("seed", [0, 5])
def test_an_inflated_checkpoint_is_imported_bit_for_bit(seed, pipe, base, make_adapter, tmp_path):
    bake([make_adapter("hybrid", temporal_seed=seed)], pipe, tmp_path / "baked")
    made = official.read(tmp_path / "baked", TuneAVideoPipeline.from_pretrained(base))
    assert (made.inexact, made.base_checked, made.adapter.provenance.temporal_init.seed) == (0, True, seed)
    again = TuneAVideoPipeline.from_pretrained(base)
    again.unet.reset_temporal(seed)
    bake([made.adapter], again, tmp_path / "again")
    first, second = (
        load_file(tmp_path / n / "unet/diffusion_pytorch_model.safetensors") for n in ("baked", "again")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_checkpoint_of_a_newer_version_and_a_damaged_one_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved/unet/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"tav_peft": values["tav_peft"] | {"version": 2}}))
    with pytest.raises(BaseModelError, match=r"version: .* Update tav-peft"):
        TuneAVideoPipeline.from_pretrained(tmp_path / "saved")
    config.write_text(json.dumps(values))
    weights = tmp_path / "saved/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.popitem()
    save_file(tensors, weights)
    with pytest.raises(BaseModelError, match="1 tensors of its UNet are not those of its config"):
        TuneAVideoPipeline.from_pretrained(tmp_path / "saved")


# -- plain image models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_image_folder_gets_the_queries_and_keeps_all_else(preset, dtype, base, make_adapter, tmp_path):
    adapter, source = make_adapter(preset), tmp_path / "base"
    shutil.copytree(base, source)
    UNet2DConditionModel.from_pretrained(base / "unet").to(dtype).save_pretrained(source / "unet")
    made = bake_image([adapter], source, tmp_path / "baked", [0.5])
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(source / name), load_file(tmp_path / "baked" / name)
    updates = spatial(adapter)
    assert made.changed == len(updates) > 4
    for key, tensor in before.items():
        expected = tensor.float() + 0.5 * updates[key] if key in updates else tensor
        assert after[key].dtype == dtype
        torch.testing.assert_close(after[key], expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    others = sorted(
        p.relative_to(source) for p in source.rglob("*") if p.is_file() and str(p.relative_to(source)) != name
    )
    assert len(others) > 6
    assert all((tmp_path / "baked" / p).read_bytes() == (source / p).read_bytes() for p in others)
    assert [each.part for each in made.left_out] == ["t_attn"]
    told = json.loads(FileTensors(tmp_path / "baked" / name).metadata[HEADER])
    assert told["left_out"][0]["names"] == list(made.left_out[0].names)


@pytest.mark.parametrize(("kind", "which"), [("sd1", "base"), ("sd2", "v_base"), ("sdxl", "xl_base")])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_gets_the_queries_where_it_has_them(
    kind, which, suffix, request, ldm, make_adapter, tmp_path
):
    folder = request.getfixturevalue(which)
    pipe = TuneAVideoPipeline.from_pretrained(folder)
    adapter = fitting(pipe, tmp_path) if kind == "sdxl" else make_adapter("hybrid")
    tensors = ldm(kind, folder)
    file = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file, {"title": "kept"})
    made = bake_image([adapter], file, tmp_path / "baked.safetensors")
    after = load_file(tmp_path / "baked.safetensors")
    flat = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    updates = spatial(adapter)
    baked_unet = {name: tensor + updates.get(name, 0) for name, tensor in flat.items()}
    expected = ldm(kind, folder) | ldm_unet(kind, baked_unet)
    assert set(after) == set(expected)
    assert sum(not torch.equal(after[key], tensors[key]) for key in tensors) == made.changed
    for key, tensor in expected.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-7)
    if suffix == ".safetensors":
        assert FileTensors(tmp_path / "baked.safetensors").metadata["title"] == "kept"


def ldm_unet(kind, state):
    from tav_peft.bases.ldm_keys import to_single_file

    return to_single_file(kind, {"unet": state})


def fitting(pipe, folder) -> Adapter:
    """An adapter of random dense query updates that fits any pipeline, by way of a tuned run."""
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith(("attn1.to_q.weight", "attn2.to_q.weight")):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01)
    (folder / "run").mkdir()
    torch.save(state, folder / "run" / "diffusion_pytorch_model.bin")
    return official.read(folder / "run", pipe).adapter


def test_taking_it_out_of_an_image_model_gives_it_back_within_its_rounding(base, make_adapter, tmp_path):
    adapter, name = make_adapter("paper"), "unet/diffusion_pytorch_model.safetensors"
    bake_image([adapter], base, tmp_path / "in")
    bake_image([adapter], tmp_path / "in", tmp_path / "out", [-1.0])
    first, baked, out = (load_file(folder / name) for folder in (base, tmp_path / "in", tmp_path / "out"))
    for key, tensor in first.items():
        rounding = torch.finfo(torch.float32).eps * (baked[key].abs() + tensor.abs())
        assert ((out[key] - tensor).abs() <= rounding).all(), key


def test_every_variant_of_a_folder_is_baked_and_pickles_become_safetensors(base, make_adapter, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(base, source)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.save_pretrained(source / "unet", safe_serialization=False)
    (source / "unet/diffusion_pytorch_model.safetensors").unlink()
    unet.half().save_pretrained(source / "unet", variant="fp16")
    bake_image([make_adapter()], source, tmp_path / "baked")
    files = sorted(p.name for p in (tmp_path / "baked/unet").iterdir())
    assert files == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]
    TuneAVideoPipeline.from_pretrained(tmp_path / "baked", variant="fp16")


def test_a_unet_in_pieces_is_baked_piece_by_piece(base, make_adapter, noise, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(base, source)
    (source / "unet/diffusion_pytorch_model.safetensors").unlink()
    UNet2DConditionModel.from_pretrained(base / "unet").save_pretrained(
        source / "unet", max_shard_size="40kB"
    )
    assert len(list((source / "unet").glob("*-of-*.safetensors"))) > 1
    adapter = make_adapter()
    bake_image([adapter], source, tmp_path / "pieces")
    bake_image([adapter], base, tmp_path / "whole")
    pieces, whole = (UNet2DConditionModel.from_pretrained(tmp_path / n / "unet") for n in ("pieces", "whole"))
    assert all(torch.equal(t, pieces.state_dict()[n]) for n, t in whole.state_dict().items())


def test_what_cannot_be_baked_is_refused_and_leaves_nothing(base, v_base, pipe, make_adapter, tmp_path):
    out = tmp_path / "out"
    pipe.save_pretrained(tmp_path / "inflated")
    for adapter, onto, target, said in (
        (make_adapter(parts=("t_attn",), preset="lite"), base, out, "T-Attn"),
        (make_adapter(), tmp_path / "inflated", out, "inflated checkpoint, no image model"),
        (make_adapter(), tmp_path / "nowhere", out, "No base at"),
    ):
        with pytest.raises((AdapterError, BaseModelError), match=said):
            bake_image([adapter], onto, target)
    with pytest.raises(AdapterError, match="no layout of a video model"):
        bake([make_adapter()], pipe, out, layout="image")
    assert not out.exists()
