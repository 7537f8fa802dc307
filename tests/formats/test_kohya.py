"""kohya's LoRA file: stock diffusers adds to a 2-D UNet what we add, by keys, alphas, metadata and hashes of kohya's."""

import dataclasses
import hashlib
import json
from io import BytesIO

import pytest
import torch
from safetensors.torch import load_file, save

from tav_peft.errors import AdapterError
from tav_peft.formats import kohya
from tav_peft.formats.keys import SCHEMES, flat_names, modules_by_name
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.updates import Updates

PRESETS = ["hybrid", "lite", "paper"]
TOLERANCE = 2e-7  # alpha and a scale times a weight are rounded to float32; the rest is float64
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_stock_pipeline_adds_what_we_add(
    scheme, preset, make_adapter, image_pipe, by_hand, flat, output, complaints, tmp_path
):
    adapter = make_adapter(preset, rank=3, alpha=6)
    file = kohya.write(adapter, tmp_path / "lora.safetensors", keys=scheme)
    image_pipe.load_lora_weights(file, unet_config=image_pipe.unet.config)
    ours = output(by_hand(adapter))
    assert (ours - output(flat)).abs().max() > 0.01
    assert (output(image_pipe.unet) - ours).abs().max() <= TOLERANCE
    assert complaints() == []


def as_readers_do(file):
    """Multiply a file out as sd-scripts, A1111 and ComfyUI do: alpha/rank·up·down, by the name without its prefix."""
    tensors = {name: tensor.double() for name, tensor in load_file(file).items()}
    names = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    return {
        name.removeprefix("lora_unet_"): tensors[f"{name}.alpha"]
        / len(tensors[f"{name}.lora_down.weight"])
        * (tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"])
        for name in names
    }


@pytest.mark.parametrize("preset", [*PRESETS, "uneven"])
def test_multiplied_out_it_is_our_update(preset, make_adapter, uneven, tmp_path):
    adapter = uneven if preset == "uneven" else make_adapter(preset, rank=3, alpha=0.7)
    found, updates = as_readers_do(kohya.write(adapter, tmp_path / "a")), Updates(adapter, "it")
    assert len(found) == 14
    for name in updates:
        if ".attn_temp." not in name:
            update = found[name.removesuffix(".weight").replace(".", "_")]
            torch.testing.assert_close(update, updates[name].double(), rtol=1e-6, atol=1e-6)
            if preset == "paper":
                assert torch.equal(update.float(), updates[name])


@pytest.mark.filterwarnings("ignore:.*alpha_pattern keys did not match")  # as newer PEFT says of it
def test_alphas_that_differ_are_what_stock_diffusers_loses(uneven, image_pipe, by_hand, output, tmp_path):
    image_pipe.load_lora_weights(kohya.write(uneven, tmp_path / "lora.safetensors"))
    assert (output(image_pipe.unet) - output(by_hand(uneven))).abs().max() > 100 * TOLERANCE


def test_updates_of_full_rank_have_one_alpha_where_that_is_exact(make_adapter, tmp_path):
    adapter = make_adapter("paper", dtype=torch.float16)
    written = load_file(kohya.write(adapter, tmp_path / "a"))
    assert {float(t) for name, t in written.items() if name.endswith(".alpha")} == {16}
    downs = [t for name, t in written.items() if "lora_down" in name]
    assert {len(down): float(down[0, 0]) for down in downs} == {16: 1, 32: 2}
    assert all(torch.equal(down, down[0, 0] * torch.eye(len(down))) for down in downs)


def test_alpha_is_the_scale_times_the_rank(uneven, tmp_path):
    written = load_file(kohya.write(uneven, tmp_path / "lora.safetensors"))
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    assert written[f"{block}_attn1_to_q.alpha"] == torch.tensor(5 * 2**0.5)
    assert written[f"{block}_attn2_to_q.alpha"] == torch.tensor(0.7 * 3**0.5)
    assert written[f"{block}_attn1_to_q.lora_down.weight"].shape == (2, 32)
    assert len(written) == 3 * 14


def test_the_same_module_is_named_in_both_schemes(make_adapter, tmp_path):
    names = [set(load_file(kohya.write(make_adapter(), tmp_path / "a", keys=keys))) for keys in SCHEMES]
    end = "transformer_blocks_0_attn1_to_q.lora_down.weight"
    assert {
        f"lora_unet_{at}_{end}" for at in ("down_blocks_0_attentions_0", "up_blocks_1_attentions_1")
    } < names[0]
    assert {
        f"lora_unet_{at}_{end}" for at in ("input_blocks_1_1", "output_blocks_3_1", "middle_block_1")
    } < names[1]


@pytest.mark.parametrize(
    "config",
    [
        {"cross_attention_dim": 768},
        {
            "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ],
    ids=["sd1", "sdxl"],
)  # fmt: skip
def test_every_query_projection_of_stable_diffusion_is_found_by_either_name(config):
    with torch.device("meta"):
        unet = InflatedUNet(sample_size=64, **config)
    queries = [name for name, _ in unet.named_modules() if name.endswith(("attn1.to_q", "attn2.to_q"))]
    assert len(queries) in (32, 140)
    keys = ("block_out_channels", "layers_per_block", "transformer_layers_per_block")
    architecture = {key: unet.config[key] for key in keys}
    known = modules_by_name(architecture)
    for scheme in SCHEMES:
        names = flat_names(queries, architecture, scheme)
        assert [known[names[module]] for module in queries] == queries


def test_levels_of_unequal_length_have_no_ldm_names(make_adapter, tmp_path):
    adapter = make_adapter()
    architecture = {**adapter.provenance.base.architecture, "layers_per_block": [1, 2]}
    base = adapter.provenance.base.model_copy(update={"architecture": architecture})
    odd = dataclasses.replace(adapter, provenance=adapter.provenance.model_copy(update={"base": base}))
    with pytest.raises(AdapterError, match="Use diffusers'"):
        kohya.write(odd, tmp_path / "a", keys="ldm")
    kohya.write(odd, tmp_path / "a")


# -- metadata ----------------------------------------------------------------------------------------------


def on(adapter, text_width, prediction_type="epsilon", **clip):
    info = adapter.provenance
    architecture = {**info.base.architecture, "cross_attention_dim": text_width}
    base = info.base.model_copy(update={"architecture": architecture, "prediction_type": prediction_type})
    changed = {"base": base, "clip": info.clip.model_copy(update=clip)}
    return dataclasses.replace(adapter, provenance=info.model_copy(update=changed))


@pytest.mark.parametrize(
    ("width", "prediction_type", "architecture", "version", "v2"),
    [
        (768, "epsilon", "stable-diffusion-v1", "sd_v1", "False"),
        (1024, "epsilon", "stable-diffusion-v2-512", "sd_v2", "True"),
        (1024, "v_prediction", "stable-diffusion-v2-768-v", "sd_v2_v", "True"),
        (2048, "epsilon", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
        (32, "epsilon", "tiny", None, None),
    ],
)
def test_the_header_names_the_kind_of_the_base(
    width, prediction_type, architecture, version, v2, make_adapter, header_of, tmp_path
):
    header = header_of(kohya.write(on(make_adapter(), width, prediction_type), tmp_path / "a"))
    assert header["modelspec.architecture"] == f"{architecture}/lora"
    assert header["modelspec.prediction_type"] == ("v" if prediction_type == "v_prediction" else "epsilon")
    assert (header.get("ss_base_model_version"), header.get("ss_v2")) == (version, v2)


def test_the_header_says_what_a_reader_looks_for(make_adapter, uneven, header_of, tmp_path):
    header = header_of(kohya.write(make_adapter(rank=3, alpha=6), tmp_path / "a"))
    assert (header["ss_network_module"], header["ss_network_dim"]) == ("networks.lora", "3")
    assert (float(header["ss_network_alpha"]), header["ss_network_args"]) == (6, "{}")
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert (header["modelspec.title"], header["modelspec.resolution"]) == ("a square", "32x32")
    assert "3 frames of square.mp4, captioned 'a square'" in header["modelspec.description"]
    assert "modelspec.date" not in header
    assert [each["part"] for each in json.loads(header["tav_peft_left_out"])] == ["t_attn"]
    uneven_header = header_of(kohya.write(uneven, tmp_path / "b"))
    assert (uneven_header["ss_network_dim"], uneven_header["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_what_is_not_known_of_a_clip_is_not_made_up(make_adapter, header_of, tmp_path):
    adapter = on(make_adapter(), 768, name="", frames=0, height=0, width=0)
    header = header_of(kohya.write(adapter, tmp_path / "a"))
    assert "modelspec.resolution" not in header
    assert "of tiny on one clip," in header["modelspec.description"]


@pytest.fixture
def wide(make_adapter, noise):
    """An adapter of more than a megabyte, so that the legacy hash has something to look at."""
    adapter = make_adapter("paper")
    name = f"{BLOCK}.attn1.to_q.diff"
    return dataclasses.replace(adapter, tensors={**adapter.tensors, name: noise(600, 600)})


@pytest.mark.parametrize("size", ["small", "wide"])
def test_the_hashes_are_those_of_the_additional_networks_extension(
    size, wide, make_adapter, header_of, tmp_path
):
    file = kohya.write(wide if size == "wide" else make_adapter(), tmp_path / "a")
    header = header_of(file)
    # as sd-scripts' train_util computes them: of the file that the safetensors library writes with the ss_ entries only
    stream = BytesIO(save(load_file(file), {key: v for key, v in header.items() if key.startswith("ss_")}))
    body = stream.getvalue()[8 + int.from_bytes(stream.read(8), "little") :]
    stream.seek(0x100000)
    assert header["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert header["sshs_legacy_hash"] == hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]
    assert header["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body).hexdigest()}"
    assert (len(body) > 0x110000) == (size == "wide")


def test_the_same_adapter_gives_the_same_bytes(make_adapter, tmp_path):
    one, other = (kohya.write(make_adapter("hybrid"), tmp_path / name).read_bytes() for name in "ab")
    assert one == other
