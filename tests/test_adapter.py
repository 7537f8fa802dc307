"""Adapter files: what is saved comes back to the bit, and what is no adapter is refused with the reason."""

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tav_peft.adapter import LATENTS, Adapter, split_name
from tav_peft.errors import AdapterError
from tav_peft.hashes import HEADER_HASH, TENSORS_HASH
from tav_peft.recipe import ModelSection
from tav_peft.tensor_file import read_tensors, write_tensors

MODULE = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def file(make_adapter, tmp_path):
    return make_adapter("hybrid").save(tmp_path / "motion.safetensors")


@pytest.fixture
def changed(file):
    """Write the file again with other tensors or other header entries, and give its path."""

    def write(tensors=None, **header):
        old, metadata = read_tensors(file)
        metadata = {**metadata, **header, TENSORS_HASH: None, HEADER_HASH: None}
        metadata = {name: value for name, value in metadata.items() if value is not None}
        return write_tensors(file, old if tensors is None else tensors, metadata)

    return write


def edit_header(file, **changes):
    return json.dumps({**json.loads(read_tensors(file)[1]["tav_peft"]), **changes})


# -- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_a_saved_adapter_comes_back_to_the_bit(preset, dtype, make_adapter, tmp_path):
    adapter = make_adapter(preset, dtype=dtype, alpha=3.5)
    loaded = Adapter.load(adapter.save(tmp_path / "motion.safetensors"))
    assert set(loaded.tensors) == set(adapter.tensors)
    for name, tensor in adapter.tensors.items():
        assert loaded.tensors[name].dtype == dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert loaded.peft_config == adapter.peft_config
    assert loaded.provenance == adapter.provenance
    assert loaded.subset == adapter.subset


def test_two_saves_are_the_same_bytes(make_adapter, tmp_path):
    files = [make_adapter(seed=1).save(tmp_path / f"{n}.safetensors") for n in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loaded_adapter_saves_to_the_same_bytes(file, tmp_path):
    again = Adapter.load(file).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == file.read_bytes()


def test_the_file_is_an_ordinary_safetensors_file(file):
    assert set(load_file(file)) == set(Adapter.load(file).tensors)


def test_latents_travel_in_the_file_and_are_no_weights(make_adapter, noise, tmp_path):
    plain = make_adapter()
    latents = noise(1, 4, 3, 8, 8)
    carrying = Adapter({**plain.tensors, LATENTS: latents}, plain.peft_config, plain.provenance)
    loaded = Adapter.load(carrying.save(tmp_path / "motion.safetensors"))
    assert torch.equal(loaded.latents, latents)
    assert set(loaded.weights) == set(plain.tensors)
    assert loaded.summary()["carries_latents"]
    assert plain.latents is None
    assert not plain.summary()["carries_latents"]


def test_the_summary_counts_each_part(make_adapter):
    summary = make_adapter("hybrid", rank=2, dtype=torch.float16).summary()
    widths = [16, 32, 32, 32, 32, 16, 16]  # the tiny UNet's seven transformer blocks: down, middle, up
    lora, temporal = sum(2 * 2 * w for w in widths), sum(4 * w * w + w for w in widths)
    assert summary["parts"]["st_attn"] == {"tensors": 14, "parameters": lora, "bytes": 2 * lora}
    assert summary["parts"]["cross_attn"] == summary["parts"]["st_attn"]
    assert summary["parts"]["t_attn"] == {"tensors": 35, "parameters": temporal, "bytes": 2 * temporal}
    assert summary["parameters"] == 2 * lora + temporal
    assert (summary["preset"], summary["rank"], summary["alpha"]) == ("hybrid", 2, 2)


def test_editing_defaults_are_those_of_the_recipe(make_adapter):
    assert make_adapter().provenance.editing["guidance_scale"] == 12.5


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_adapter_and_nothing_else(call, file, make_adapter, monkeypatch):
    before = file.read_bytes()

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(AdapterError, match="No space left on device"):
        make_adapter(seed=2).save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_file_from_before_there_were_variants_is_of_the_papers(file, changed):
    header = json.loads(edit_header(file))
    assert header.pop("model") == {"attention": "sparse_causal", "group_norm": "joint"}
    assert Adapter.load(changed(tav_peft=json.dumps(header))).provenance.model == ModelSection()


def test_the_variant_travels_in_the_file(file, changed):
    variant = {"attention": "full", "group_norm": "frame"}
    loaded = Adapter.load(changed(tav_peft=edit_header(file, model=variant)))
    assert loaded.provenance.model == ModelSection(**variant)
    with pytest.raises(AdapterError, match=r"model\.attention"):
        Adapter.load(changed(tav_peft=edit_header(file, model={"attention": "ful"})))


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attn1.to_q.lora_A.weight", "lora_A.weight"),
        ("attn2.to_q.diff", "diff"),
        ("attn_temp.to_out.0.bias", "bias"),
        ("attn_temp.to_v.lora_B.weight", "lora_B.weight"),
    ],
)
def test_a_tensors_name_is_a_module_and_a_kind(name, kind):
    assert split_name(f"{MODULE}.{name}") == (f"{MODULE}.{name}".removesuffix(f".{kind}"), kind)


@pytest.mark.parametrize(
    "name",
    [
        f"{MODULE}.attn1.to_k.diff",
        f"{MODULE}.norm_temp.weight",
        f"{MODULE}.attn1.to_q.lora_A",
        f"unet.{MODULE}.attn1.to_q.diff",
        f"base_model.model.{MODULE}.attn1.to_q.lora_A.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "conv_in.weight",
    ],
)
def test_a_tensor_of_another_name_is_refused(name, changed):
    path = changed({**read_tensors(changed())[0], name: torch.zeros(2)})
    with pytest.raises(AdapterError, match="1 tensors that belong to no part of an adapter, first '"):
        Adapter.load(path)


# -- refusals ----------------------------------------------------------------------------------------------


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        Adapter.load(tmp_path / "motion.safetensors")


def test_an_adapter_cut_anywhere_is_an_error(file):
    whole = file.read_bytes()
    for part in (0.0, 0.01, 0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(AdapterError, match="not a whole safetensors file"):
            Adapter.load(file)


def test_a_foreign_safetensors_file_is_refused(file, base):
    shutil.copy(base / "unet" / "diffusion_pytorch_model.safetensors", file)
    with pytest.raises(AdapterError, match=r"not a tav-peft adapter \(its header has no 'tav_peft' entry\)"):
        Adapter.load(file)


def test_a_pickle_in_disguise_is_refused(file):
    torch.save({"w": torch.zeros(2)}, file)
    with pytest.raises(AdapterError, match="is a pickle"):
        Adapter.load(file)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(bad, changed):
    tensors, _ = read_tensors(changed())
    name = f"{MODULE}.attn_temp.to_q.weight"
    tensors[name][3, 3] = bad
    with pytest.raises(AdapterError, match=f"{name} holds NaN or infinity"):
        Adapter.load(changed(tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_another_dtype_is_refused(dtype, file):
    tensors, metadata = read_tensors(file)
    name = f"{MODULE}.attn_temp.to_q.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file, metadata)
    with pytest.raises(
        AdapterError, match=f"{name} has dtype {dtype}, allowed are float32, float16 and bfloat16"
    ):
        Adapter.load(file)


def test_a_file_without_tensors_is_refused(changed):
    with pytest.raises(AdapterError, match="holds no adapter tensors"):
        Adapter.load(changed({}))


def test_a_newer_format_is_refused_by_its_number(file, changed):
    path = changed(tav_peft=edit_header(file, format_version=2))
    with pytest.raises(
        AdapterError, match=r"has format version 2, this tav-peft reads up to 1\. Update tav-peft"
    ):
        Adapter.load(path)


@pytest.mark.parametrize("entry", ["tav_peft", "peft_config"])
@pytest.mark.parametrize("text", ["{", "", "{'r': 4}", "\x00"])
def test_broken_json_in_the_header_is_refused(entry, text, changed):
    with pytest.raises(AdapterError, match="its header holds broken JSON"):
        Adapter.load(changed(**{entry: text}))


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null", "{}"])
def test_a_header_of_another_shape_is_refused(text, changed):
    with pytest.raises(AdapterError, match="its header is not that of a tav-peft adapter"):
        Adapter.load(changed(tav_peft=text))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("surprise", 1),
        ("step", "many"),
        ("subset", {}),
        ("subset", {"preset": "huge", "parts": ["t_attn"], "blocks": ["up"]}),
        ("subset", {"preset": "lite", "parts": 3, "blocks": ["up"]}),
        ("base", {"name": "x"}),
    ],
)
def test_a_header_with_impossible_fields_is_refused(field, value, file, changed):
    with pytest.raises(AdapterError, match="its header is not that of a tav-peft adapter: "):
        Adapter.load(changed(tav_peft=edit_header(file, **{field: value})))


@pytest.mark.parametrize(
    "config",
    ["null", "[]", "3", '"lora"', "{}", '{"peft_type": "LOHA", "r": 2}', '{"peft_type": "LORA", "warp": 1}',
     '{"peft_type": "LORA", "r": 0}', '{"peft_type": "LORA", "target_modules": "(attn1"}'],
)  # fmt: skip
def test_a_config_that_peft_would_not_take_is_refused(config, changed):
    with pytest.raises(AdapterError, match="PEFT config"):
        Adapter.load(changed(peft_config=config))


def test_a_dense_adapter_with_a_lora_config_is_refused(make_adapter, tmp_path):
    dense, lora = make_adapter("paper"), make_adapter("lite")
    path = Adapter(dense.tensors, lora.peft_config, dense.provenance).save(tmp_path / "mixed.safetensors")
    with pytest.raises(AdapterError, match="PEFT config"):
        Adapter.load(path)


def test_the_fingerprint_is_of_the_update_alone(make_adapter, tmp_path):
    adapter = make_adapter("hybrid", seed=1)
    assert Adapter.load(adapter.save(tmp_path / "a.safetensors")).fingerprint == adapter.fingerprint
    with_latents = dataclasses.replace(
        adapter, tensors={**adapter.tensors, LATENTS: torch.zeros(1, 4, 1, 2, 2)}
    )
    assert with_latents.fingerprint == adapter.fingerprint
    others = [
        make_adapter("hybrid", seed=2),
        make_adapter("hybrid", seed=1, alpha=7.0),
        make_adapter("paper", seed=1),
    ]
    assert len({each.fingerprint for each in (adapter, *others)}) == 4


def test_a_number_that_has_changed_since_is_told_by_the_hash_in_the_file(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # the last bit of a last number, still a finite one
    with pytest.raises(
        AdapterError, match=r"motion\.safetensors has changed since it was written: its tensors"
    ):
        Adapter.load(file)
    assert Adapter.load(file, hashes=False).provenance.step == 5
    file.write_bytes(whole.replace(b'\\"step\\": 5', b'\\"step\\": 6'))
    for read in (Adapter.load, Adapter.open):
        with pytest.raises(AdapterError, match="has changed since it was written: its header's entries"):
            read(file)
