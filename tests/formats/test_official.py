"""Runs of the original code become adapters and folders for it again, tensor by tensor."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError, TavError
from tav_peft.formats import official, official_folder, official_run
from tav_peft.formats import read as read_adapter
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import ModelSection, Recipe
from tav_peft.sources import read_as_tuned
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import inflate, is_temporal
from tav_peft.verification import verify

SHARED = Path(__file__).parents[2].parent / "shared" / "fixtures" / "official" / "sd1-tiny"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs ../shared/fixtures/official, which is not here"
)
QUERIES = ("attn1.to_q.weight", "attn2.to_q.weight")
UP = "up_blocks.1.attentions.0.transformer_blocks.0"
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0"
CONFIG = {
    "pretrained_model_path": "./checkpoints/stable-diffusion-v1-4",
    "output_dir": "./outputs/man-skiing",
    "train_data": {
        "video_path": "data/man-skiing.mp4", "prompt": "a man is skiing", "n_sample_frames": 3,
        "width": 32, "height": 48, "sample_start_idx": 1, "sample_frame_rate": 2,
    },
    "validation_data": {
        "prompts": ["mickey mouse is skiing", "a panda is skiing"], "video_length": 3, "width": 32, "height": 48,
        "num_inference_steps": 50, "guidance_scale": 12.5, "use_inv_latent": True, "num_inv_steps": 50,
    },
    "learning_rate": 3.0e-05, "max_train_steps": 500, "seed": 33, "adam_beta1": 0.9, "adam_weight_decay": 0.01,
    "mixed_precision": "fp16", "gradient_checkpointing": True, "trainable_modules": ["attn1.to_q"],
}  # fmt: skip
LOVEU = {
    "train_data": {
        "video_path": "./data/DAVIS_480p/480p_frames/bmx-rider", "prompt": "a trick on a bike",
        "height": 480, "width": 480, "num_frames": 32, "frame_rate": 1,
    },
    "validation_data": {"prompts": {"style": "grayscale", "object": "a unicycle"}, "guidance_scale": 12.5},
    "max_train_steps": 500,
}  # fmt: skip


def is_tuned(name):
    return ".attn_temp." in name or name.endswith(QUERIES)


@pytest.fixture
def tuned(pipe):
    """The UNet after a run: of the down blocks only the temporal attention differs, by its random start."""
    generator = torch.Generator().manual_seed(5)
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    for name, tensor in state.items():
        step = torch.randn(tensor.shape, generator=generator)
        if ".attn_temp." in name:
            tensor.copy_(step * 0.1)
        elif name.endswith(QUERIES) and not name.startswith("down_blocks"):
            tensor.add_(step * 1e-3)
    # as long tuning does to a few: far smaller than it was
    state[f"{UP}.attn1.to_q.weight"][0, 0] = 1.2345678e-4
    pipe.unet.state_dict()[f"{UP}.attn1.to_q.weight"][0, 0] = 0.03
    return state


@pytest.fixture
def run(tuned, tmp_path):
    """An output folder, as far as importing reads it."""
    folder = tmp_path / "man-skiing"
    (folder / "unet").mkdir(parents=True)
    (folder / "inv_latents").mkdir()
    torch.save(tuned, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "inv_latents" / "ddim_latent-500.pt").write_bytes(b"not read")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def rewrite(run, state):
    torch.save(state, run / "unet" / "diffusion_pytorch_model.bin")
    return run


def assert_equal(found, expected):
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# -- exactly -----------------------------------------------------------------------------------------------


def test_base_and_adapter_are_the_runs_weights_bit_for_bit(run, tuned, pipe, tmp_path):
    made = official.read(run, pipe)
    assert (made.inexact, made.deviation, made.energy, made.base_checked) == (0, 0.0, {}, True)
    file = made.adapter.save(tmp_path / "adapter.safetensors")
    pipe.load_adapter(file)
    assert_equal(pipe.unet.state_dict(), tuned)


def test_what_it_claims_can_be_verified(run, pipe, tmp_path):
    file = official.read(run, pipe).adapter.save(tmp_path / "adapter.safetensors")
    told = {claim.name: claim.verdict for claim in verify(file, pipe)}
    assert {told[name] for name in ("tensors", "config", "base", "modules", "t_attn", "probe")} == {"holds"}


def test_an_update_has_double_precision_only_where_single_would_round_the_weight(run, tuned, pipe):
    base = pipe.unet.state_dict()[f"{UP}.attn1.to_q.weight"].clone()
    rounded = base + (tuned[f"{UP}.attn1.to_q.weight"] - base)
    assert not torch.equal(rounded, tuned[f"{UP}.attn1.to_q.weight"])
    tensors = official.read(run, pipe).adapter.tensors
    assert tensors[f"{UP}.attn1.to_q.diff"].dtype == torch.float64
    assert tensors[f"{UP}.attn2.to_q.diff"].dtype == torch.float32
    assert tensors[f"{UP}.attn_temp.to_q.weight"].dtype == torch.float32


def test_modules_that_the_run_never_moved_are_kept_too(run, pipe):
    tensors = official.read(run, pipe).adapter.tensors
    assert not tensors[f"{DOWN}.attn1.to_q.diff"].any()
    assert tensors[f"{DOWN}.attn_temp.to_out.0.bias"].any()


def test_taking_the_adapter_off_gives_the_base_back(run, pipe):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_adapter(official.read(run, pipe).adapter)
    pipe.unload_adapter()
    assert_equal(pipe.unet.state_dict(), before)


def test_a_run_in_half_precision_is_exact_too(run, tuned, pipe):
    halved = {name: tensor.half() for name, tensor in tuned.items()}
    made = official.read(rewrite(run, halved), pipe)
    assert made.inexact == 0
    pipe.load_adapter(made.adapter)
    state = pipe.unet.state_dict()
    assert_equal(
        {n: state[n] for n in halved if is_tuned(n)}, {n: t.float() for n, t in halved.items() if is_tuned(n)}
    )


def test_half_strength_of_a_double_update_is_half_way(run, tuned, pipe):
    name = f"{UP}.attn1.to_q.weight"
    base = pipe.unet.state_dict()[name].clone()
    pipe.load_adapter(official.read(run, pipe).adapter, strength=0.5)
    found = pipe.unet.state_dict()[name]
    assert found.dtype == torch.float32
    assert (found - (base + tuned[name]) / 2).abs().max() < 1e-7


# -- as LoRA -----------------------------------------------------------------------------------------------


def test_the_energy_kept_is_that_of_the_largest_singular_values(run, tuned, pipe, noise):
    name, base = f"{UP}.attn1.to_q", pipe.unet.state_dict()[f"{UP}.attn1.to_q.weight"]
    U, V = (torch.linalg.qr(noise(len(base), 3, seed=seed))[0] for seed in (1, 2))
    tuned[f"{name}.weight"] = base + U @ torch.diag(torch.tensor([0.03, 0.02, 0.01])) @ V.T
    made = official.read(rewrite(run, tuned), pipe, rank=2)
    assert made.energy[name] == pytest.approx(13 / 14, abs=1e-4)
    tensors = made.adapter.tensors
    lost = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] - (
        tuned[f"{name}.weight"] - base
    )
    assert torch.linalg.matrix_norm(lost, 2) == pytest.approx(0.01, rel=1e-3)
    assert made.deviation >= lost.abs().max()
    assert made.inexact > 0


def test_a_module_that_was_not_tuned_is_a_lora_that_adds_nothing(run, pipe):
    made = official.read(run, pipe, rank=2)
    assert not made.adapter.tensors[f"{DOWN}.attn1.to_q.lora_B.weight"].any()
    assert made.energy[f"{DOWN}.attn1.to_q"] == 1.0


def test_at_full_rank_the_loras_are_the_updates_and_t_attn_is_exact(run, tuned, pipe):
    made = official.read(run, pipe, rank=16)
    narrow = [kept for name, kept in made.energy.items() if name.startswith(("down_blocks.0", "up_blocks.1"))]
    assert narrow == pytest.approx([1.0] * len(narrow))
    pipe.load_adapter(made.adapter)
    state = {name.replace(".base_layer", ""): t for name, t in pipe.unet.state_dict().items()}
    assert_equal(
        {n: t for n, t in state.items() if is_temporal(n)}, {n: t for n, t in tuned.items() if is_temporal(n)}
    )
    assert made.adapter.provenance.subset["preset"] == "hybrid"
    assert made.adapter.provenance.recipe["adapter"]["rank"] == 16


def test_a_rank_that_no_module_has_is_refused(run, pipe):
    with pytest.raises(AdapterError, match=r"Rank 17 is more than .* has, which is 16\. Give at most that\."):
        official.read(run, pipe, rank=17)


# -- the forms of a run ------------------------------------------------------------------------------------

FORMS = [
    "unet",
    "unet/diffusion_pytorch_model.bin",
    "checkpoint-7",
    "checkpoint-8",
    "checkpoints/tuneavideo-9.pth",
]


@pytest.fixture
def forms(run, tuned):
    trained = {f"module.{name}": tensor for name, tensor in tuned.items() if is_tuned(name)}
    for name in ("checkpoint-7", "checkpoint-8", "checkpoints"):
        (run / name).mkdir()
    save_file(tuned, run / "checkpoint-7" / "model.safetensors")
    torch.save(tuned, run / "checkpoint-8" / "pytorch_model.bin")
    torch.save({"state_dict": trained}, run / "checkpoints" / "tuneavideo-9.pth")
    return run


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_run_gives_the_same_adapter(form, forms, pipe):
    made, expected = official.read(forms / form, pipe), official.read(forms, pipe).adapter
    assert_equal(made.adapter.tensors, expected.tensors)
    assert made.base_checked == (not form.endswith(".pth"))
    steps = {"checkpoint-7": 7, "checkpoint-8": 8, "checkpoints/tuneavideo-9.pth": 9}
    assert made.adapter.provenance.step == steps.get(form, 500)
    assert made.adapter.provenance.caption == "a man is skiing"


def test_a_run_that_did_not_finish_says_what_it_has(forms, pipe):
    shutil.rmtree(forms / "unet")
    with pytest.raises(AdapterError, match=r"no finished run.* It has checkpoint-7, checkpoint-8.*name one"):
        official.read(forms, pipe)


def test_an_empty_folder_and_a_wrong_name_are_refused(tmp_path, pipe):
    with pytest.raises(AdapterError, match="Give the output folder of a run"):
        official.read(tmp_path, pipe)
    with pytest.raises(AdapterError, match=r"nothing\.bin does not exist"):
        official.read(tmp_path / "nothing.bin", pipe)


def test_a_run_in_the_place_of_an_adapter_is_told_how_to_become_one(run):
    with pytest.raises(AdapterError, match=rf"`tav import {run} --base …`"):
        read_adapter(run)


# -- where it comes from -----------------------------------------------------------------------------------


def test_the_runs_config_is_remembered(run, pipe):
    provenance = official.read(run, pipe).adapter.provenance
    assert (provenance.caption, provenance.step) == ("a man is skiing", 500)
    assert provenance.base.name == "tiny"
    clip = provenance.clip
    assert (clip.name, clip.frames, clip.width, clip.height) == ("man-skiing.mp4", 3, 32, 48)
    assert (clip.indices, clip.fit, clip.fingerprint) == ((1, 3, 5), "squash", "")
    recipe = Recipe.model_validate(provenance.recipe)
    assert recipe.edits == ("mickey mouse is skiing", "a panda is skiing")
    assert (recipe.training.steps, recipe.training.lr, recipe.training.seed) == (500, 3e-5, 33)
    assert (recipe.training.precision, recipe.training.gradient_checkpointing) == ("fp16", True)
    assert "beta2" not in provenance.recipe["training"]
    assert provenance.editing == {"guidance_scale": 12.5, "num_inference_steps": 50}


def test_a_clip_is_read_as_the_run_read_it(run, pipe, clip, tmp_path):
    adapter = official.read(run, pipe).adapter
    longer = type(clip)(clip.pixels.repeat(3, axis=0), 10.0, "long.mp4", tuple(range(9)))
    longer.write(tmp_path / "long.mp4")
    found = read_as_tuned(adapter, tmp_path / "long.mp4")
    assert (found.frames, found.width, found.height, found.indices) == (3, 32, 48, (1, 3, 5))


def test_a_config_of_the_loveu_code_is_remembered(run, pipe):
    (run / "config.yaml").write_text(yaml.safe_dump(LOVEU, sort_keys=False))
    provenance = official.read(run, pipe).adapter.provenance
    assert (provenance.clip.name, provenance.clip.frames, provenance.clip.indices) == ("bmx-rider", 32, ())
    assert provenance.recipe["edits"] == ["grayscale", "a unicycle"]
    assert provenance.recipe["clip"] == {"frames": 32, "stride": 1, "size": [480, 480], "fit": "squash"}


def test_without_a_config_nothing_is_made_up(run, pipe):
    (run / "config.yaml").unlink()
    provenance = official.read(run, pipe).adapter.provenance
    assert (provenance.caption, provenance.step, provenance.clip) == ("", 0, official_run.UNKNOWN_CLIP)
    assert set(provenance.recipe) == {"name", "description", "adapter"}
    with pytest.raises(TavError, match="Give the clip"):
        pipe.noise(provenance.clip)


def test_a_caption_that_is_given_counts(run, pipe):
    assert official.read(run, pipe, caption="a skier").adapter.provenance.caption == "a skier"


def test_a_config_of_something_else_is_passed_over(run, pipe):
    (run / "config.yaml").write_text("model: other\n")
    assert official.read(run, pipe).adapter.provenance.caption == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train_data: {width: wide}", r"train_data\.width: Input should be a valid integer"),
        ("train_data: {n_sample_frames: 0}", r"train_data\.n_sample_frames: Input should be greater"),
        ("train_data: [", "while parsing"),
        ("train_data: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("train_data: {}\nlearning_rate: 3", r"training\.lr: Input should be less"),
    ],
)
def test_a_damaged_config_is_told(text, reason, run, pipe):
    (run / "config.yaml").write_text(text)
    with pytest.raises(AdapterError, match=reason):
        official.read(run, pipe)


# -- what is refused ---------------------------------------------------------------------------------------


def test_another_base_than_the_runs_is_refused(run, tuned, pipe):
    for name, tensor in tuned.items():
        if not is_tuned(name) and "norm_temp" not in name:
            tensor.add_(1e-3)
    with pytest.raises(AdapterError, match=r"was not tuned on tiny: \d+ of \d+ tensors"):
        official.read(rewrite(run, tuned), pipe)


def test_a_run_that_tuned_more_is_refused(run, tuned, pipe):
    tuned[f"{UP}.attn1.to_k.weight"][0, 0] += 1e-6
    with pytest.raises(
        AdapterError, match=rf"tuned more .* 1 of \d+ tensors .*first {UP}\.attn1\.to_k\.weight"
    ):
        official.read(rewrite(run, tuned), pipe)


def test_a_run_that_tuned_the_temporal_norm_is_refused(run, tuned, pipe):
    tuned[f"{UP}.norm_temp.bias"][0] = 0.1
    with pytest.raises(AdapterError, match="tuned 1 tensors of norm_temp"):
        official.read(rewrite(run, tuned), pipe)


def test_a_unet_without_temporal_attention_is_refused(run, tuned, pipe):
    flat = {name: tensor for name, tensor in tuned.items() if not is_temporal(name)}
    with pytest.raises(AdapterError, match="no temporal attention"):
        official.read(rewrite(run, flat), pipe)


def test_missing_and_unknown_tensors_are_counted(run, tuned, pipe):
    del tuned["conv_in.weight"]
    tuned["other.weight"] = torch.zeros(1)
    with pytest.raises(
        AdapterError, match=r"1 missing, first conv_in.weight; 1 unexpected, first other.weight"
    ):
        official.read(rewrite(run, tuned), pipe)


def test_a_part_of_the_trained_tensors_is_refused(forms, tuned, pipe):
    file = forms / "checkpoints" / "tuneavideo-9.pth"
    torch.save({f"{UP}.attn_temp.to_q.weight": tuned[f"{UP}.attn_temp.to_q.weight"]}, file)
    with pytest.raises(AdapterError, match=r"\d+ missing, first"):
        official.read(file, pipe)


def test_another_width_is_refused(run, tuned, pipe):
    tuned[f"{UP}.attn1.to_q.weight"] = torch.zeros(8, 8)
    with pytest.raises(AdapterError, match=r"has shape \(8, 8\), this base needs \(16, 16\)"):
        official.read(rewrite(run, tuned), pipe)


def test_a_run_that_diverged_is_refused(run, tuned, pipe):
    tuned[f"{UP}.attn_temp.to_q.weight"][0, 0] = float("nan")
    with pytest.raises(AdapterError, match=rf"{UP}.attn_temp.to_q.weight holds NaN"):
        official.read(rewrite(run, tuned), pipe)


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(write, run, pipe):
    write({"conv_in.weight": Malicious()}, run / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(AdapterError, match=r"diffusion_pytorch_model\.bin is"):
        official.read(run, pipe)


def test_a_file_that_is_cut_short_is_refused(run, pipe):
    file = run / "unet" / "diffusion_pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(AdapterError, match="is not a whole checkpoint"):
        official.read(run, pipe)


@pytest.mark.parametrize(
    "odd", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.int64)]
)
def test_tensors_that_are_no_plain_numbers_are_refused(odd, run, tuned, pipe):
    with pytest.raises(AdapterError, match=r"conv_in\.weight is no plain tensor"):
        official.read(rewrite(run, tuned | {"conv_in.weight": odd}), pipe)


def test_a_base_with_adapters_or_in_half_precision_is_refused(run, pipe, make_adapter):
    pipe.load_adapter(make_adapter())
    with pytest.raises(AdapterError, match=r"Adapters are loaded \(default\)"):
        official.read(run, pipe)
    pipe.unload_adapter()
    with pytest.raises(AdapterError, match=r"loaded in torch\.float16"):
        official.read(run, pipe.to(torch.float16))


# -- back to the original ----------------------------------------------------------------------------------


def load(file):
    return torch.load(file, weights_only=True)


def unet_of(folder):
    return load(folder / "unet" / "diffusion_pytorch_model.bin")


def test_an_imported_run_is_exported_as_it_was(run, tuned, pipe, tmp_path):
    adapter = official.read(run, pipe).adapter
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    folder = official_folder.write(adapter, tmp_path / "out", pipe)
    assert_equal(unet_of(folder), tuned)
    assert_equal(pipe.unet.state_dict(), before)
    assert_equal(official.read(folder, pipe).adapter.tensors, adapter.tensors)


@pytest.mark.parametrize("preset", ["hybrid", "lite"])
def test_a_lora_is_merged_into_the_weights(preset, make_adapter, pipe, flat, noise, tmp_path):
    adapter = make_adapter(preset, alpha=3)
    folder = official_folder.write(adapter, tmp_path / "out", pipe)
    merged, attached = inflate(flat), inflate(flat)
    merged.load_state_dict(unet_of(folder), assign=True)  # not into the weights that both share
    inputs = noise(1, 4, 3, 8, 8), 500, noise(1, 24, 32)
    with torch.no_grad():
        plain = attached(*inputs).sample
        Attachments(attached).attach("it", adapter)
        ours, theirs = attached(*inputs).sample, merged(*inputs).sample
    assert (ours - plain).abs().max() > 0.01
    assert (ours - theirs).abs().max() < 1e-4  # x·(W + BA) where ours is x·W + (x·A)·B


def test_the_files_are_no_larger_than_their_tensors(make_adapter, pipe, tmp_path):
    folder = official_folder.write(make_adapter("lite"), tmp_path / "out", pipe)
    for file in folder.rglob("*.bin"):
        state = load(file)
        names = sum(len(name) for name in state)
        assert (
            file.stat().st_size < sum(t.nbytes for t in state.values()) + 4 * names + 200 * len(state) + 2000
        )


def test_vae_text_encoder_and_tokenizer_have_the_old_names_and_the_same_content(make_adapter, pipe, tmp_path):
    folder = official_folder.write(make_adapter(), tmp_path / "out", pipe)
    vae = load(folder / "vae" / "diffusion_pytorch_model.bin")
    middle = "decoder.mid_block.attentions.0"
    assert torch.equal(vae[f"{middle}.query.weight"], pipe.vae.state_dict()[f"{middle}.to_q.weight"])
    assert {name.split(".")[4] for name in vae if name.startswith(middle)} == {
        "group_norm", "query", "key", "value", "proj_attn",
    }  # fmt: skip
    text = load(folder / "text_encoder" / "pytorch_model.bin")
    assert all(name.startswith("text_model.") for name in text)
    assert text["text_model.embeddings.position_ids"].tolist() == [list(range(24))]
    # today's libraries know the old names too
    assert_equal(
        AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=False).state_dict(),
        pipe.vae.state_dict(),
    )
    again = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=False)
    assert_equal(again.state_dict(), pipe.text_encoder.state_dict())
    words = ["a man, skiing", "", "!?"]
    assert (
        CLIPTokenizer.from_pretrained(folder / "tokenizer")(words).input_ids
        == pipe.tokenizer(words).input_ids
    )


def test_the_configs_are_in_the_originals_words(make_adapter, pipe, tmp_path):
    folder = official_folder.write(make_adapter(), tmp_path / "out", pipe)
    index, unet, scheduler = (
        json.loads((folder / name).read_text())
        for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    assert (index["_class_name"], index["unet"]) == ("TuneAVideoPipeline", ["models", "UNet3DConditionModel"])
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert unet["_class_name"] == "UNet3DConditionModel"
    assert unet["down_block_types"] == ["CrossAttnDownBlock3D", "CrossAttnDownBlock3D"]
    assert (unet["mid_block_type"], unet["attention_head_dim"]) == ("UNetMidBlock3DCrossAttn", 4)
    assert "addition_embed_type" not in unet
    assert (scheduler["prediction_type"], scheduler["steps_offset"]) == ("epsilon", 1)
    assert "timestep_spacing" not in scheduler


def test_v_prediction_and_heads_by_level_are_kept(v_base, make_adapter, tmp_path):
    pipe = TuneAVideoPipeline.from_pretrained(v_base)
    folder = official_folder.write(make_adapter(), tmp_path / "out", pipe)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    assert (unet["attention_head_dim"], unet["use_linear_projection"]) == ([2, 4], True)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("kind", "written"), [(PNDMScheduler, "PNDMScheduler"), (EulerDiscreteScheduler, "DDIMScheduler")]
)
def test_the_bases_scheduler_is_kept_where_the_original_has_it(kind, written, base, make_adapter, tmp_path):
    copied = shutil.copytree(base, tmp_path / "base")
    kind(beta_schedule="scaled_linear").save_pretrained(copied / "scheduler")
    folder = official_folder.write(
        make_adapter(), tmp_path / "out", TuneAVideoPipeline.from_pretrained(copied)
    )
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", written]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["beta_schedule"]) == (written, "scaled_linear")
    assert ("skip_prk_steps" in scheduler) == (written == "PNDMScheduler")


def test_a_schedule_that_the_original_has_not_is_refused(base, make_adapter, tmp_path):
    copied = shutil.copytree(base, tmp_path / "base")
    DDIMScheduler(rescale_betas_zero_snr=True).save_pretrained(copied / "scheduler")
    with pytest.raises(AdapterError, match="scheduler of this base has rescale_betas_zero_snr True"):
        official_folder.write(make_adapter(), tmp_path / "out", TuneAVideoPipeline.from_pretrained(copied))


def changed(adapter, **provenance):
    return Adapter(adapter.tensors, adapter.peft_config, adapter.provenance.model_copy(update=provenance))


def test_an_adapter_that_the_original_cannot_run_is_refused(make_adapter, pipe, tmp_path):
    cases = {
        "attention full and group_norm joint": changed(make_adapter(), model=ModelSection(attention="full")),
        "2 temporal attentions side by side": changed(make_adapter(), temporal_branches=2),
    }
    for reason, adapter in cases.items():
        with pytest.raises(AdapterError, match=reason):
            official_folder.write(adapter, tmp_path / "out", pipe)
    pipe.load_adapter(make_adapter())
    with pytest.raises(AdapterError, match="Adapters are loaded"):
        official_folder.write(make_adapter(), tmp_path / "out", pipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "setting", "reason"),
    [
        ("vae", {"scaling_factor": 0.13025}, "scales its latents by 0.13025, the original code by 0.18215"),
        ("vae", {"use_quant_conv": False}, "The VAE of this base has use_quant_conv False"),
        (
            "unet",
            {"addition_embed_type": "text_time"},
            "The UNet of this base has addition_embed_type text_time",
        ),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "blocks of the type UNetMidBlock2D"),
    ],
)
def test_a_base_that_the_original_cannot_run_is_refused(part, setting, reason, make_adapter, pipe, tmp_path):
    getattr(pipe, part).register_to_config(**setting)
    with pytest.raises(AdapterError, match=reason):
        official_folder.write(make_adapter(), tmp_path / "out", pipe)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(make_adapter, pipe, tmp_path, monkeypatch):
    folder = official_folder.write(make_adapter(), tmp_path / "out", pipe)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    saved = torch.save

    def full(state, stream):
        if "conv_in.weight" in state:
            saved(state, stream)
        else:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(AdapterError, match="No space left on device"):
        official_folder.write(make_adapter(seed=1), folder, pipe)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert list(tmp_path.iterdir()) == [folder]
    assert not any(".lora_" in name for name in pipe.unet.state_dict())


def test_an_old_folder_is_replaced_whole(make_adapter, pipe, tmp_path):
    folder = tmp_path / "out"
    (folder / "samples").mkdir(parents=True)
    official_folder.write(make_adapter(), folder, pipe)
    assert not (folder / "samples").exists()
    assert (folder / "unet" / "config.json").exists()


def test_a_file_in_the_place_of_the_folder_is_left_alone(make_adapter, pipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="is a file"):
        official_folder.write(make_adapter(), tmp_path / "file", pipe)
    assert (tmp_path / "file").read_text() == "mine"


def test_another_base_is_told(make_adapter, pipe, tmp_path, caplog):
    official_folder.write(make_adapter(), tmp_path / "out", pipe)
    assert "was tuned on another base" in caplog.text


# -- what the original wrote -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_pipe():
    return TuneAVideoPipeline.from_pretrained(SHARED / "checkpoint")


@needs_shared
def test_a_run_of_the_original_is_imported_bit_for_bit(shared_pipe):
    made = official.read(SHARED / "official_pipeline", shared_pipe)
    assert (made.inexact, made.base_checked) == (0, True)
    shared_pipe.load_adapter(made.adapter)
    try:
        assert_equal(shared_pipe.unet.state_dict(), unet_of(SHARED / "official_pipeline"))
    finally:
        shared_pipe.unload_adapter()


@needs_shared
def test_the_exported_folder_is_the_one_that_the_original_wrote(shared_pipe, tmp_path):
    theirs = SHARED / "official_pipeline"
    folder = official_folder.write(official.read(theirs, shared_pipe).adapter, tmp_path / "out", shared_pipe)
    files = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    left_out = {Path("inv_latents/ddim_latent-5.pt")}
    assert files == {file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file()} - left_out
    for file in files:
        if file.suffix == ".bin":
            ours, recorded = load(folder / file), load(theirs / file)
            assert_equal(ours, recorded)
            assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in recorded.items()}
        elif file.suffix == ".json":
            ours, recorded = (json.loads((place / file).read_text()) for place in (folder, theirs))
            assert list(ours) == list(recorded)
            assert ours | {"_name_or_path": ""} == recorded | {"_name_or_path": ""}
        else:
            assert (folder / file).read_text() == (theirs / file).read_text()
