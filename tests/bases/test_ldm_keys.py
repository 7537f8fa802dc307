"""The names of single files, against diffusers' own converter and the names and sizes that are published."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as judge
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tav_peft.bases.ldm_keys import places, to_single_file

CONFIGS = Path(__file__).parents[2] / "tav_peft" / "bases" / "configs"
CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
# parameters of the published models
PUBLISHED = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


def empty(kind, part):
    """Make a part of Stable Diffusion in its full size, without memory."""
    with init_empty_weights():
        if part.startswith("text"):
            return CLASSES[part](CLIPTextConfig.from_pretrained(CONFIGS / kind / part))
        return CLASSES[part].from_config(CLASSES[part].load_config(CONFIGS / kind / part))


def judged(kind, part, model, checkpoint):
    """Let diffusers convert a part of a single file to its own names."""
    if part == "unet":
        return judge.convert_ldm_unet_checkpoint(checkpoint, dict(model.config))
    if part == "vae":
        return judge.convert_ldm_vae_checkpoint(checkpoint, dict(model.config))
    if kind == "sd1" or (kind == "sdxl" and part == "text_encoder"):
        found = judge.convert_ldm_clip_checkpoint(checkpoint)
    else:
        prefix = "cond_stage_model.model." if kind == "sd2" else "conditioner.embedders.1.model."
        found = judge.convert_open_clip_checkpoint(model, checkpoint, prefix=prefix)
    if part == "text_encoder":  # transformers 5 has no such prefix here
        return {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
    return found


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_shipped_configs_have_the_sizes_of_the_published_models(kind):
    sizes = {part: sum(p.numel() for p in empty(kind, part).parameters()) for part in PUBLISHED[kind]}
    assert sizes == PUBLISHED[kind]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_diffusers_finds_every_tensor_of_a_full_size_file(kind):
    models = {part: empty(kind, part) for part in PUBLISHED[kind]}
    checkpoint = to_single_file(kind, {part: model.state_dict() for part, model in models.items()})
    for part, model in models.items():
        found = judged(kind, part, model, checkpoint)
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert judge.infer_diffusers_model_type(checkpoint) == {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}[kind]


@pytest.mark.parametrize(("kind", "folder"), [("sd1", "base"), ("sd2", "v_base"), ("sdxl", "xl_base")])
def test_diffusers_reads_the_same_values(kind, folder, ldm, request):
    folder = request.getfixturevalue(folder)
    checkpoint = ldm(kind, folder)
    for part in PUBLISHED[kind]:
        model = CLASSES[part].from_pretrained(folder / part)
        found, expected = judged(kind, part, model, checkpoint), model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("kind", "folder"), [("sd1", "base"), ("sd2", "v_base"), ("sdxl", "xl_base")])
def test_there_and_back_is_the_same(kind, folder, ldm, request):
    folder = request.getfixturevalue(folder)
    checkpoint = ldm(kind, folder)
    for part in PUBLISHED[kind]:
        expected = CLASSES[part].from_pretrained(folder / part).state_dict()
        for name, place in places(kind, part, expected).items():
            assert torch.equal(place.take(checkpoint[place.key]), expected[name])


@pytest.mark.parametrize(
    ("kind", "part", "name", "published"),
    [
        ("sd1", "unet", "conv_in.weight", "input_blocks.0.0.weight"),
        ("sd1", "unet", "down_blocks.0.downsamplers.0.conv.bias", "input_blocks.3.0.op.bias"),
        ("sd1", "unet", "up_blocks.0.upsamplers.0.conv.bias", "output_blocks.2.1.conv.bias"),
        ("sd1", "unet", "up_blocks.1.upsamplers.0.conv.bias", "output_blocks.5.2.conv.bias"),
        (
            "sd1",
            "unet",
            "up_blocks.3.resnets.2.conv_shortcut.bias",
            "output_blocks.11.0.skip_connection.bias",
        ),
        ("sd1", "unet", "mid_block.resnets.1.conv1.bias", "middle_block.2.in_layers.2.bias"),
        ("sdxl", "unet", "add_embedding.linear_2.bias", "label_emb.0.2.bias"),
        ("sd1", "vae", "decoder.up_blocks.0.resnets.0.conv1.bias", "decoder.up.3.block.0.conv1.bias"),
        ("sd1", "vae", "encoder.mid_block.attentions.0.to_q.bias", "encoder.mid.attn_1.q.bias"),
        ("sd2", "text_encoder", "encoder.layers.22.self_attn.k_proj.bias", "resblocks.22.attn.in_proj_bias"),
    ],
)
def test_known_tensors_are_where_the_published_files_have_them(kind, part, name, published):
    assert places(kind, part, empty(kind, part).state_dict())[name].key.endswith(f".{published}")
