"""Bases in one file: told apart, loaded bit for bit as the folders they were made of, or refused with the reason."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from tav_peft.bases import locate, prediction_type, single_file
from tav_peft.bases.ldm_keys import to_single_file
from tav_peft.cli.main import app
from tav_peft.errors import BaseModelError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe
from tav_peft.tuning import tune

KINDS = [("sd1", "base"), ("sd2", "v_base"), ("sdxl", "xl_base")]
MODELS = {"sd1": ("unet", "vae", "text_encoder"), "sd2": ("unet", "vae", "text_encoder")}
MODELS["sdxl"] = (*MODELS["sd1"], "text_encoder_2")
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


@pytest.fixture
def offline(monkeypatch):
    """Fail where anything asks the network."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def tensors(base, ldm):
    return ldm("sd1", base)


@pytest.fixture
def file(tensors, tmp_path):
    path = tmp_path / "dream.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def shipped(monkeypatch, tmp_path, base, v_base, xl_base):
    """Put the tiny configs in the place of those of Stable Diffusion; the tokenizer is the shipped one."""
    configs = tmp_path / "configs"
    shutil.copytree(single_file._CONFIGS / "clip_tokenizer", configs / "clip_tokenizer")
    for kind, folder in (("sd1", base), ("sd2", v_base), ("sdxl", xl_base)):
        shutil.copytree(folder, configs / kind)
        scheduler = configs / kind / "scheduler" / "scheduler_config.json"
        scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    monkeypatch.setattr(single_file, "_CONFIGS", configs)
    return configs


def refused(path, said, **options):
    with pytest.raises(BaseModelError, match=said) as caught:
        TuneAVideoPipeline.from_pretrained(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path.name) in str(caught.value)


# -- what loads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "folder"), KINDS)
def test_a_file_is_the_folder_it_was_made_of(kind, folder, ldm, tmp_path, request, noise, offline):
    folder = request.getfixturevalue(folder)
    save_file(ldm(kind, folder), tmp_path / "model.safetensors")
    one = TuneAVideoPipeline.from_pretrained(tmp_path / "model.safetensors", config=folder)
    other = TuneAVideoPipeline.from_pretrained(folder)
    for part in MODELS[kind]:
        mine, theirs = getattr(one, part), getattr(other, part)
        assert type(mine) is type(theirs)
        assert not mine.training
        assert not any(p.requires_grad for p in mine.parameters())
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    # what they make of text, latents and pixels is bit for bit the same too
    told, expected = one.encode_prompts(["a man", ""]), other.encode_prompts(["a man", ""])
    assert torch.equal(told.text, expected.text)
    latents = noise(2, 4, 2, 8, 8)
    made = [pipe.unet(latents, 500, told.text, added_cond_kwargs=told.added).sample for pipe in (one, other)]
    assert torch.equal(*made)
    assert torch.equal(*(pipe.vae.decode(latents[:, :, 0]).sample for pipe in (one, other)))
    assert one.scheduler.config.prediction_type == other.scheduler.config.prediction_type
    assert one.base_name == "model.safetensors"
    assert one.base_fingerprint == other.base_fingerprint


def test_diffusers_own_loader_makes_the_same_of_it(file, base):
    judge = StableDiffusionPipeline.from_single_file(
        str(file), config=str(base), local_files_only=True, safety_checker=None
    )
    pipe = TuneAVideoPipeline.from_pretrained(file, config=base)
    for part in MODELS["sd1"]:
        mine, theirs = getattr(pipe, part).state_dict(), getattr(judge, part).state_dict()
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_weights_are_in_the_precision_asked_for_and_hang_on_no_file(tensors, file, base):
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, file)
    assert TuneAVideoPipeline.from_pretrained(file, config=base).unet.dtype == torch.float32
    pipe = TuneAVideoPipeline.from_pretrained(file, config=base, dtype=torch.float16)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float16}
    with file.open("r+b") as opened:  # other values over the same bytes on the disk
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(pipe.unet.conv_in.weight, half[f"{UNET}input_blocks.0.0.weight"])
    assert torch.equal(pipe.vae.post_quant_conv.weight, half[f"{VAE}post_quant_conv.weight"])


@pytest.mark.parametrize("how", ["plain", "wrapped", "lightning", "old format"])
def test_a_ckpt_is_read_without_running_it(how, tensors, base, tmp_path, monkeypatch):
    path = tmp_path / "dream.ckpt"
    content = tensors if how == "plain" else {"state_dict": tensors, "global_step": 470_000}
    if how == "lightning":  # as in Stable Diffusion's first checkpoints
        name = "pytorch_lightning.callbacks.model_checkpoint"
        module = types.ModuleType(name)
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
        content["callbacks"] = {module.ModelCheckpoint: {"best": torch.ones(1)}}
    torch.save(content, path, _use_new_zipfile_serialization=how != "old format")
    if how == "lightning":
        monkeypatch.delitem(sys.modules, name)
    pipe = TuneAVideoPipeline.from_pretrained(path, config=base)
    assert torch.equal(pipe.unet.conv_in.weight, tensors[f"{UNET}input_blocks.0.0.weight"])


def test_what_a_base_does_not_need_is_left_out(tensors, file, base):
    extra = {
        "model_ema.decay": torch.ones(()),
        "alphas_cumprod": torch.ones(1000),
        f"{TEXT}text_model.embeddings.position_ids": torch.arange(24)[None],
        f"{VAE}loss.logvar": torch.zeros(()),
    }
    save_file(tensors | extra, file)
    assert TuneAVideoPipeline.from_pretrained(file, config=base).text_encoder is not None


def test_the_older_names_of_the_text_encoder_are_known(tensors, file, base):
    save_file({name.replace(f"{TEXT}text_model.", TEXT): tensor for name, tensor in tensors.items()}, file)
    states = TuneAVideoPipeline.from_pretrained(file, config=base).encode_prompts(["a man"]).text
    expected = TuneAVideoPipeline.from_pretrained(base).encode_prompts(["a man"]).text
    assert torch.equal(states, expected)


def test_linear_layers_of_the_vae_may_lie_as_such(tensors, file, base):
    flat = {name: t.flatten(1) if ".attn_1." in name and t.ndim == 4 else t for name, t in tensors.items()}
    assert sum(tensor.ndim for tensor in flat.values()) < sum(tensor.ndim for tensor in tensors.values())
    save_file(flat, file)
    weight = (
        TuneAVideoPipeline.from_pretrained(file, config=base).vae.encoder.mid_block.attentions[0].to_q.weight
    )
    assert torch.equal(weight, flat[f"{VAE}encoder.mid.attn_1.q.weight"])


def test_a_part_given_is_used_instead_of_the_files(tensors, file, base, pipe):
    save_file({name: t for name, t in tensors.items() if not name.startswith(VAE)}, file)
    refused(file, "lacks 1.. of the 1.. tensors of the vae of Stable Diffusion 1.x", config=base)
    assert TuneAVideoPipeline.from_pretrained(file, config=base, vae=pipe.vae).vae is pipe.vae


@pytest.mark.parametrize(
    ("kind", "tokenizer", "padding"),
    [
        ("sd1", "tokenizer", 49407),
        ("sd2", "tokenizer", 0),
        ("sdxl", "tokenizer", 49407),
        ("sdxl", "tokenizer_2", 0),
    ],
)
def test_the_shipped_tokenizers_give_clips_own_numbers(kind, tokenizer, padding, offline):
    words = single_file._tokenizer(single_file._CONFIGS / kind / tokenizer)
    ids = words(["a photo of a cat"], padding="max_length", max_length=words.model_max_length).input_ids[0]
    assert ids[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[7:] == [padding] * 70
    assert len(words) == 49408


def test_the_shipped_vocabulary_is_what_its_merges_make():
    folder = single_file._CONFIGS / "clip_tokenizer"
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    words = list(vocabulary)
    assert len(merges) == 49408 - 2 * 256 - 2
    assert words[512:-2] == [merge.replace(" ", "") for merge in merges]
    assert words[256:512] == [f"{symbol}</w>" for symbol in words[:256]]
    assert list(vocabulary.values()) == list(range(49408))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "width"), [("sd1", 768), ("sd2", 1024)])
def test_a_file_of_stable_diffusions_own_size_needs_no_config(kind, width, tmp_path, offline):
    """Random weights in half precision, 2.1 and 2.6 GB; `pytest -m slow`."""
    with init_empty_weights():
        shapes = {part: single_file._empty(part, single_file._CONFIGS / kind) for part in MODELS[kind]}
    names = to_single_file(kind, {part: model.state_dict() for part, model in shapes.items()})
    tensors = {name: torch.randn(t.shape, dtype=torch.float16) / 50 for name, t in names.items()}
    tensors["model_ema.decay"] = torch.ones(())
    save_file(tensors, tmp_path / "model.safetensors")
    pipe = TuneAVideoPipeline.from_pretrained(
        tmp_path / "model.safetensors", dtype=torch.float16, prediction_type="epsilon"
    )
    assert torch.equal(pipe.unet.conv_out.weight, tensors[f"{UNET}out.2.weight"])
    assert pipe.encode_prompts(["a photo of a cat"]).text.shape == (1, 77, width)


# -- tuning and editing on a file --------------------------------------------------------------------------


def test_a_dreambooth_file_is_tuned_on_and_edited_with(file, base, clip, caplog, noise):
    recipe = Recipe.load("lite").override(["training.steps=2"])
    pipe = TuneAVideoPipeline.from_pretrained(file, config=base)
    adapter = tune(pipe, clip, "a man is skiing", recipe)
    assert adapter.provenance.base.name == "dream.safetensors"
    pipe.load_adapter(adapter)
    edit = pipe("a man", inversion=pipe.invert(clip, num_inference_steps=2)).latents
    # the folder the file was made of is the same base to the adapter
    folder = TuneAVideoPipeline.from_pretrained(base)
    folder.load_adapter(adapter)
    assert "another base" not in caplog.text
    assert torch.equal(folder("a man", inversion=folder.invert(clip, num_inference_steps=2)).latents, edit)


def test_the_commands_tune_and_edit_with_a_file(file, shipped, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip.write(tmp_path / "square.mp4")

    def tav(*arguments):
        done = CliRunner().invoke(app, [*arguments, "--base", str(file), "--device", "cpu", "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    settings = ("--recipe", "lite", "--steps", "2", "--frames", "3", "--size", "32")
    tuned = tav("tune", "square.mp4", "--prompt", "a man is skiing", *settings)
    edits = tav("edit", tuned["adapter"], "--prompt", "a man", "--steps", "2")["edits"]
    assert Path(edits[0]["clip"]).stat().st_size > 0


# -- what a UNet predicts ----------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A UNet that gives back so much of its noise, and for the rest a picture."""

    config = types.SimpleNamespace(in_channels=4, cross_attention_dim=8)

    def __init__(self, likeness: float) -> None:
        super().__init__()
        self.likeness = likeness

    def forward(self, noisy, timestep, _text):
        picture = torch.linspace(-1, 1, noisy.numel()).reshape(noisy.shape)
        assert timestep == 999
        return types.SimpleNamespace(sample=self.likeness * noisy - (1 - self.likeness**2) ** 0.5 * picture)


def test_noise_and_velocity_are_told_apart():
    a = 0.00466  # cumulative alpha of Stable Diffusion's last timestep
    assert prediction_type.tell(Denoiser(1.0)) == "epsilon"
    assert prediction_type.tell(Denoiser(a**0.5)) == "v_prediction"
    assert prediction_type.tell(Denoiser(0.4)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_trained_unet_shows_that_it_predicts_noise(dtype):
    unet = UNet2DConditionModel.from_pretrained(Path(locate("pocket")) / "unet", dtype=dtype)
    assert prediction_type.tell(unet) == "epsilon"
    assert unet.dtype == dtype


@pytest.fixture
def v2_file(v_base, ldm, tmp_path, shipped):
    """A Stable Diffusion 2.x in one file, beside tiny configs for its kind."""
    path = tmp_path / "two.safetensors"
    save_file(ldm("sd2", v_base), path)
    return path


@pytest.mark.parametrize("told", ["epsilon", "v_prediction"])
def test_stable_diffusion_2_is_taken_for_what_it_does(told, v2_file, monkeypatch, caplog):
    monkeypatch.setattr(prediction_type, "tell", lambda _unet: told)
    assert TuneAVideoPipeline.from_pretrained(v2_file).scheduler.config.prediction_type == told
    assert f"taken for a model with prediction_type {told}" in caplog.text


def test_stable_diffusion_2_that_does_not_show_it_asks(v2_file, monkeypatch):
    monkeypatch.setattr(prediction_type, "tell", lambda _unet: None)
    refused(v2_file, r"Give prediction_type \(--prediction-type\)")
    for given in ("epsilon", "v_prediction"):
        pipe = TuneAVideoPipeline.from_pretrained(v2_file, prediction_type=given)
        assert pipe.scheduler.config.prediction_type == given
    with pytest.raises(BaseModelError, match="prediction_type 'v': give one of epsilon, v_prediction"):
        TuneAVideoPipeline.from_pretrained(v2_file, prediction_type="v")


def test_the_marks_of_a_v_model_are_heeded(tensors, file, shipped):
    assert TuneAVideoPipeline.from_pretrained(file).scheduler.config.prediction_type == "epsilon"
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    numbers = TuneAVideoPipeline.from_pretrained(file).scheduler.config
    assert (numbers.prediction_type, numbers.rescale_betas_zero_snr) == ("v_prediction", True)


def test_a_folder_is_loaded_for_the_prediction_type_given(base):
    pipe = TuneAVideoPipeline.from_pretrained(base, prediction_type="v_prediction")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.steps_offset == 1


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        (9, "an inpainting model"),
        (5, "a depth-to-image model"),
        (8, "InstructPix2Pix"),
        (7, "an upscaler"),
        (6, "inputs of its own"),
    ],
)
def test_a_unet_of_other_inputs_is_refused(channels, said, tensors, file, base):
    tensors[f"{UNET}input_blocks.0.0.weight"] = torch.zeros(16, channels, 3, 3)
    save_file(tensors, file)
    refused(file, f"is no base, but .*{said}.*takes {channels} channels.*plain text-to-image", config=base)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "LoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoRA"),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn_temp.to_q.weight",
            "an adapter of a tuned clip",
        ),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "AnimateDiff"),
        (f"{UNET}input_blocks.1.1.time_stack.0.norm1.weight", "a video model"),
        (f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3 or Flux"),
        ("double_blocks.0.img_attn.qkv.weight", "Stable Diffusion 3 or Flux"),
        ("decoder.conv_in.weight", "a VAE alone"),
        (f"{VAE}decoder.conv_in.weight", "a VAE alone"),
        ("down_blocks.0.resnets.0.conv1.weight", "model_index.json"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder alone"),
        ("emb_params", "a textual inversion"),
        ("weight", "without a UNet"),
    ],
)
def test_what_is_no_base_is_named(name, said, tmp_path):
    path = tmp_path / "thing.safetensors"
    save_file({name: torch.zeros(2, 2)}, path)
    refused(path, f"is no base, but .*{said}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("conditioner.embedders.0.model.transformer.resblocks.0.ln_1.bias", "the refiner of SDXL"),
        ("edm_mean", "EDM"),
        ("edm_vpred.sigma_max", "EDM"),
        ("embedder.model.visual.proj", "unCLIP"),
        ("model_lora.lora_up.weight", "LoRA"),
    ],
)
def test_a_whole_model_of_another_family_is_named(name, said, tensors, file, base):
    save_file(tensors | {name: torch.zeros(2)}, file)
    refused(file, f"is no base, but .*{said}", config=base)


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    refused(tmp_path / "empty.safetensors", "is no base")


def test_tensors_missing_left_over_or_of_another_size_are_named(tensors, file, base):
    lacking = dict(tensors)
    del lacking[f"{UNET}out.2.bias"]
    save_file(lacking, file)
    refused(
        file,
        r"lacks 1 of the \d+ tensors of the unet .* first model\.diffusion_model\.out\.2\.bias",
        config=base,
    )
    save_file(tensors | {f"{UNET}label_emb.0.0.weight": torch.zeros(2)}, file)
    refused(file, r"1 tensors of its unet are others, first model\.diffusion_model\.label_emb", config=base)
    save_file(tensors | {f"{TEXT}text_model.final_layer_norm.bias": torch.zeros(31)}, file)
    refused(file, "1 tensors of its text_encoder are others, .*final_layer_norm", config=base)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(TEXT)}, file)
    refused(file, "has no text encoder", config=base)
    save_file(tensors, file)
    refused(file, r"lacks \d+ of the 686 tensors of the unet of Stable Diffusion 1.x")


def test_a_config_folder_without_the_configs_is_refused(file, tmp_path):
    with pytest.raises(BaseModelError, match=r"unet/config\.json is missing or broken"):
        TuneAVideoPipeline.from_pretrained(file, config=tmp_path)


class Code:
    """What a pickle runs when it is opened without care."""

    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(zipped, tensors, tmp_path, base, capsys):
    path = tmp_path / "evil.ckpt"
    content = {"state_dict": tensors, "hook": Code()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, "could run code when read. Use the model's .safetensors", config=base)
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.ckpt", "old.ckpt", "text.ckpt", "zero.safetensors"])
def test_a_damaged_file_is_refused(name, tensors, tmp_path, base):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name != "old.ckpt")
    content = {"text": b"hello " * 50, "zero": b""}.get(path.stem, path.read_bytes()[:-1000])
    path.write_bytes(content)
    refused(path, "is not a whole checkpoint", config=base)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n")
    refused(path, "git lfs pull")


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "is not a whole checkpoint")
