"""Bases in folders: every way their weights are kept in loads alike, what is unfit is refused with the reason."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tav_peft.errors import BaseModelError
from tav_peft.pipeline import TuneAVideoPipeline

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "mine")


def weights_of(folder, part):
    """The one file of weights of a part."""
    (file,) = [file for file in (folder / part).iterdir() if file.suffix in (".safetensors", ".bin")]
    return file


def as_pickle(file):
    """Keep a part's weights as they were before safetensors, under the name they had then."""
    stem = "pytorch_model" if file.stem.split(".")[0] == "model" else "diffusion_pytorch_model"
    torch.save(
        load_file(file), file.with_name(file.name.replace(file.stem.split(".")[0], stem)).with_suffix(".bin")
    )
    file.unlink()


def in_half(file):
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def as_variant(file, variant="fp16"):
    file.rename(file.with_suffix(f".{variant}{file.suffix}"))


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder, said, **options):
    with pytest.raises(BaseModelError, match=said) as caught:
        TuneAVideoPipeline.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# -- what loads --------------------------------------------------------------------------------------------


def same(one, other):
    return all(
        torch.equal(a, b)
        for part in PARTS
        for a, b in zip(getattr(one, part).parameters(), getattr(other, part).parameters(), strict=True)
    )


@pytest.mark.parametrize("parts", [PARTS, ("unet",), ("vae",), ("text_encoder",)])
def test_weights_in_bin_files_are_those_in_safetensors(parts, folder, pipe, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    for part in parts:
        as_pickle(weights_of(folder, part))
    assert same(TuneAVideoPipeline.from_pretrained(folder), pipe)
    if parts == PARTS:  # diffusers calls it an error that there are no safetensors, and the fallback unsafe
        assert "unsafe" not in caplog.text


@pytest.mark.parametrize("parts", [PARTS, ("unet",), ("vae",), ("text_encoder",)])
@pytest.mark.parametrize("pickled", [True, False])
def test_a_variant_that_is_alone_needs_not_be_named(parts, pickled, folder):
    for part in parts:
        in_half(weights_of(folder, part))
    expected = TuneAVideoPipeline.from_pretrained(folder)
    for part in parts:
        as_variant(weights_of(folder, part))
        if pickled:
            as_pickle(weights_of(folder, part))
    loaded = TuneAVideoPipeline.from_pretrained(folder)
    assert same(loaded, expected)
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.float32


def test_of_several_variants_fp16_is_taken_and_the_plain_one_before_it(folder, pipe):
    whole = weights_of(folder, "unet")
    half = shutil.copytree(folder, folder.with_name("half"))
    in_half(weights_of(half, "unet"))
    shutil.copy(weights_of(half, "unet"), whole.with_suffix(".fp16.safetensors"))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(whole).items()}
    for other in ("bf16", "non_ema"):
        save_file(zeros, whole.with_suffix(f".{other}.safetensors"), {"format": "pt"})
    assert same(TuneAVideoPipeline.from_pretrained(folder), pipe)
    whole.unlink()
    assert same(TuneAVideoPipeline.from_pretrained(folder), TuneAVideoPipeline.from_pretrained(half))
    assert not TuneAVideoPipeline.from_pretrained(folder, variant="bf16").unet.conv_in.weight.any()


def test_a_pickle_beside_safetensors_is_not_looked_at(folder, pipe):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK and no weights")
    assert same(TuneAVideoPipeline.from_pretrained(folder), pipe)


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline"])
def test_a_plain_model_loads_whatever_pipeline_it_was_saved_from(name, folder, pipe):
    change(
        folder / "model_index.json",
        _class_name=name,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],  # whose folders are not there
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    assert same(TuneAVideoPipeline.from_pretrained(folder), pipe)


def test_the_scheduler_of_an_early_folder_is_read(folder, pipe):
    early = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.2.2", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "skip_prk_steps": True, "tensor_format": "pt",
    }  # fmt: skip
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(early))
    change(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    loaded = TuneAVideoPipeline.from_pretrained(folder)
    assert torch.equal(loaded.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert loaded.scheduler.config.steps_offset == 1


def test_a_part_given_needs_not_be_in_the_folder(folder, pipe):
    shutil.rmtree(folder / "vae")
    assert TuneAVideoPipeline.from_pretrained(folder, vae=pipe.vae).vae is pipe.vae


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("unet", r"unet/config\.json is missing"),
        ("vae", "lacks its vae"),
        ("text_encoder", "lacks its text_encoder"),
        ("tokenizer", "lacks its tokenizer"),
        ("scheduler", "lacks its scheduler"),
    ],
)
def test_a_part_that_is_missing_is_named(part, said, folder):
    shutil.rmtree(folder / part)
    refused(folder, f"{said}.*A base in diffusers layout has unet/, vae/")


@pytest.mark.parametrize(
    ("part", "size"),
    [
        ("vae", {"latent_channels": 2**31}),
        ("text_encoder", {"num_hidden_layers": 5000}),
        ("unet", {"sample_size": [2e9, 8]}),
    ],
)
def test_a_config_of_sizes_that_no_model_has_is_refused_before_the_model_is_made(part, size, folder):
    ((key, _),) = size.items()
    change(folder / part / "config.json", **size)
    refused(
        folder, rf"{part}/config\.json is damaged: {key} is (2147483648|5000|2000000000\.0), and in no model"
    )


@pytest.mark.parametrize("longest", [float("nan"), 24.5, 10**9, "many"])
def test_a_tokenizer_of_texts_that_its_encoder_has_no_places_for_is_refused(longest, folder):
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=longest)
    refused(folder, "They are not of one model|cannot be loaded as a base")


def test_a_text_encoder_that_was_made_up_beside_its_file_is_refused(folder, monkeypatch):
    def made_up(path, **_):
        return CLIPTextModel(CLIPTextConfig.from_pretrained(path))

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", made_up)
    refused(
        folder, r"has \d+ tensors that transformers \S+ did not take over, first .* pip install -U tav-peft"
    )


def test_a_tokenizer_without_words_is_refused(folder):
    for file in (folder / "tokenizer").glob("*.[jt]*"):
        if file.name != "tokenizer_config.json":
            file.unlink()
    refused(folder, r"tokenizer/ has neither vocab\.json nor tokenizer\.json")


@pytest.mark.parametrize("part", PARTS)
def test_damaged_weights_are_named_before_anything_is_loaded(part, folder):
    file = weights_of(folder, part)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    refused(folder, f"{file.name} is not a whole checkpoint")
    file.write_bytes(whole)
    as_pickle(file)
    pickled = weights_of(folder, part)
    pickled.write_bytes(pickled.read_bytes()[:-1000])
    refused(folder, f"{pickled.name} is not a whole checkpoint")
    pickled.unlink()
    refused(folder, f"has no weights of its {part}")


def test_of_two_files_the_one_that_will_be_loaded_is_looked_at(folder):
    as_variant(weights_of(folder, "unet"))  # now all parts are loaded as fp16 where they have it
    plain = weights_of(folder, "vae")
    half = plain.with_suffix(".fp16.safetensors")
    half.write_bytes(plain.read_bytes()[:-1000])
    refused(folder, f"{half.name} is not a whole checkpoint")


class Code:
    """What a pickle runs when it is opened without care."""

    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize("part", PARTS)
def test_a_pickle_with_code_is_refused_and_not_run(part, folder, capsys):
    as_pickle(weights_of(folder, part))
    torch.save({"weight": torch.ones(1), "hook": Code()}, weights_of(folder, part))
    refused(folder, r"could run code when read")
    assert "it ran" not in capsys.readouterr().out


def test_a_pickle_of_the_old_format_with_code_is_not_run(folder, capsys):
    as_pickle(weights_of(folder, "text_encoder"))
    file = weights_of(folder, "text_encoder")
    torch.save({"weight": torch.ones(1), "hook": Code()}, file, _use_new_zipfile_serialization=False)
    refused(folder, "cannot be loaded as a base")
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("channels", "said"), [(9, "an inpainting model"), (5, "a depth-to-image model"), (8, "InstructPix2Pix")]
)
def test_a_unet_of_other_inputs_is_refused(channels, said, folder):
    change(folder / "unet" / "config.json", in_channels=channels)
    refused(folder, f"is no base, but .*{said}.*takes {channels} channels")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"unet": [None, None], "transformer": ["diffusers", "FluxTransformer2DModel"]}, "without a UNet"),
        (
            {"text_encoder": [None, None], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
            "refiner",
        ),
        ({"unet": ["tuneavideo", "UNet3DConditionModel"]}, "whose unet is of the class UNet3DConditionModel"),
        (
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "whose text_encoder is of the class T5EncoderModel",
        ),
    ],
)
def test_a_pipeline_of_another_family_is_named(index, said, folder):
    change(folder / "model_index.json", **index)
    refused(folder, f"is no base, but .*{said}")


def test_broken_json_is_named(folder):
    (folder / "model_index.json").write_text("{")
    refused(folder, r"model_index\.json is missing or broken")


def test_what_is_no_base_is_refused_with_what_is_allowed(tmp_path, folder):
    refused(tmp_path / "missing", r"No base at .*a \.safetensors or \.ckpt file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"without model_index\.json\. Give a base in diffusers layout")
    refused(folder / "unet", "It is a part of the base")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "empty", r"give one of them \(model\.safetensors\)")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", "It is an adapter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_another_precision_is_rounded_and_still_the_same_base(dtype, base, pipe):
    rounded = TuneAVideoPipeline.from_pretrained(base, dtype=dtype)
    assert rounded.base_fingerprint == pipe.base_fingerprint
    for name in ("unet", "vae", "text_encoder"):
        whole = getattr(pipe, name).state_dict()
        own = getattr(rounded, name).state_dict()
        assert all(
            torch.equal(own[key], tensor.to(dtype))
            for key, tensor in whole.items()
            if tensor.is_floating_point()
        )


def test_a_part_that_was_given_keeps_its_precision(base, flat):
    pipe = TuneAVideoPipeline.from_pretrained(base, unet=flat, dtype=torch.bfloat16)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float32, torch.bfloat16)
