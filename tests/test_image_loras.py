"""Ordinary LoRAs and textual inversions beside adapters: each adds its update, and comes off without a trace."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from tav_peft.errors import AdapterError, TavError
from tav_peft.formats import kohya
from tav_peft.pipeline import TuneAVideoPipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1")


def output_of(pipe, noise):
    latents, states = noise(1, 4, 3, 8, 8, seed=3), noise(1, 7, pipe.unet.config.cross_attention_dim, seed=4)
    with torch.no_grad():
        return pipe.unet(latents, 501, states).sample


def state_of(pipe):
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def same(pipe, state):
    now = state_of(pipe)
    return now.keys() == state.keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in now.items()
    )


def random_loras(model, seed, targets=TARGETS, alpha=3.0):
    """A PEFT model of random LoRAs, rank 2, on a 2-D UNet or a text encoder."""
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=alpha, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(params=["diffusers", "kohya", "peft"])
def style(request, base, tmp_path):
    """A style LoRA in one of the field's forms, and the update that it makes, by parameter of the 2-D UNet."""
    model = random_loras(UNet2DConditionModel.from_pretrained(base / "unet"), 1)
    updates = {
        name.removeprefix("base_model.model.") + ".weight": layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and "default" in layer.r
    }
    assert len(updates) > 20
    tensors = {n.replace(".default", ""): t.detach() for n, t in model.named_parameters() if "lora_" in n}
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    if request.param == "peft":
        model.save_pretrained(tmp_path / "style")
        return tmp_path / "style", updates
    if request.param == "diffusers":
        # the metadata say alpha, as diffusers itself writes them
        config = model.peft_config["default"].to_dict() | {"target_modules": list(TARGETS)}
        StableDiffusionPipeline.save_lora_weights(
            tmp_path / "style", unet_lora_layers=plain, unet_lora_adapter_metadata=config
        )
        return tmp_path / "style", updates
    flat = {}
    for name, tensor in plain.items():
        module, kind = name.split(".lora_")
        key = "lora_unet_" + module.replace(".", "_")
        # an alpha of its own for each module, the same update
        alpha = 1.0 + len(module) % 4
        flat[f"{key}.lora_{'down' if kind[0] == 'A' else 'up'}.weight"] = (
            tensor if kind[0] == "A" else tensor * (3.0 / alpha)
        )
        flat[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(flat, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors", updates


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_lora_acts_in_every_frame_as_its_update_in_the_weights_does(style, strength, pipe, noise):
    file, updates = style
    pipe.load_lora_weights(file, "style", strength)
    ours = output_of(pipe, noise)
    pipe.unload_adapter("style")
    plain = output_of(pipe, noise)
    for name, update in updates.items():
        pipe.unet.get_parameter(name).data += strength * update
    torch.testing.assert_close(ours, output_of(pipe, noise), rtol=0, atol=2e-5)
    assert (ours - plain).abs().max() > 0.01


@pytest.mark.parametrize("preset", ["paper", "lite"])
@pytest.mark.parametrize("first", ["adapter", "style"])
def test_a_lora_and_an_adapter_add_up_in_either_order_with_a_strength_each(
    preset, first, style, pipe, make_adapter, noise
):
    file, updates = style
    adapter, before = make_adapter(preset), state_of(pipe)
    loads = {
        "adapter": lambda: pipe.load_adapter(adapter, "clip"),
        "style": lambda: pipe.load_lora_weights(file, "style"),
    }
    for name in (first, *({"adapter", "style"} - {first})):
        loads[name]()
    assert sorted(pipe.adapters) == ["clip", "style"]
    pipe.set_adapters(["clip", "style"], [{"st_attn": 0.5, "t_attn": 0.0}, 0.7])
    both = output_of(pipe, noise)
    pipe.set_adapters("style", 0.7)
    alone = output_of(pipe, noise)
    pipe.unload_adapter("clip")
    torch.testing.assert_close(output_of(pipe, noise), alone, rtol=0, atol=2e-5)
    pipe.unload_adapter("style")
    assert same(pipe, before)
    for name, update in updates.items():
        pipe.unet.get_parameter(name).data += 0.7 * update
    torch.testing.assert_close(output_of(pipe, noise), alone, rtol=0, atol=2e-5)
    pipe.load_adapter(adapter, "clip", {"st_attn": 0.5, "t_attn": 0.0})
    torch.testing.assert_close(output_of(pipe, noise), both, rtol=0, atol=2e-5)


def test_two_loras_and_two_adapters_come_off_in_any_order(style, pipe, make_adapter, tmp_path):
    file, _ = style
    before = state_of(pipe)
    pipe.load_lora_weights(file, "one")
    pipe.load_adapter(make_adapter("hybrid"), "clip")
    pipe.load_lora_weights(file, "two", 0.3)
    pipe.load_adapter(make_adapter("lite", seed=1), "other")
    for name in ("one", "other", "two", "clip"):
        pipe.unload_adapter(name)
    assert same(pipe, before)
    assert pipe.adapters == []


def test_a_lora_for_the_text_encoder_changes_what_prompts_mean(base, pipe, tmp_path):
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), encoder)
    tensors = {
        name.replace(".default", ""): torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
        for name, tensor in encoder.named_parameters()
        if "lora_" in name
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=tensors)
    before, plain = state_of(pipe), pipe.encode_prompts(["a red cat"]).text
    pipe.load_lora_weights(tmp_path, "words")
    changed = pipe.encode_prompts(["a red cat"]).text
    assert (changed - plain).abs().max() > 0.01
    pipe.set_adapters([])
    assert torch.equal(pipe.encode_prompts(["a red cat"]).text, plain)
    pipe.unload_adapter("words")
    assert same(pipe, before)


def test_our_own_kohya_export_is_such_a_lora(pipe, make_adapter, noise, tmp_path):
    adapter = make_adapter("lite")
    kohya.write(adapter, tmp_path / "spatial.safetensors")
    pipe.load_adapter(adapter, strength={"t_attn": 0.0})
    expected = output_of(pipe, noise)
    pipe.unload_adapter()
    pipe.load_lora_weights(tmp_path / "spatial.safetensors", "spatial")
    torch.testing.assert_close(output_of(pipe, noise), expected, rtol=0, atol=2e-5)


def test_an_inversion_remembers_the_loras_it_was_made_with(style, pipe, clip):
    pipe.load_lora_weights(style[0], "style", 0.5)
    inversion = pipe.invert(clip, num_inference_steps=2)
    inversion.check_made_with(pipe.inverted_with() | {"clip": clip.fingerprint})
    pipe.set_adapters("style", 0.6)
    with pytest.raises(AdapterError, match="another adapter, or at another strength"):
        inversion.check_made_with(pipe.inverted_with() | {"clip": clip.fingerprint})


def test_what_is_no_lora_of_this_base_is_refused_and_leaves_nothing(pipe, make_adapter, tmp_path):
    before = state_of(pipe)
    files = {
        "loha": {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)},
        "dora": {"lora_unet_x.dora_scale": torch.ones(2, 1), "lora_unet_x.lora_up.weight": torch.ones(2, 2)},
        "other": {
            "unet.nowhere.lora_A.weight": torch.ones(2, 4),
            "unet.nowhere.lora_B.weight": torch.ones(4, 2),
        },
        "wide": {
            f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{kind}.weight": torch.ones(
                shape
            )
            for kind, shape in (("A", (2, 99)), ("B", (99, 2)))
        },
        "nothing": {"weight": torch.ones(2)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(AdapterError, match=f"{name}.safetensors"):
            pipe.load_lora_weights(tmp_path / f"{name}.safetensors", "style")
    with pytest.raises(AdapterError, match="Load it with load_adapter"):
        pipe.load_lora_weights(make_adapter().save(tmp_path / "clip.safetensors"), "style")
    torch.save({}, tmp_path / "lora.bin")
    with pytest.raises(AdapterError, match="is a pickle"):
        pipe.load_lora_weights(tmp_path / "lora.bin", "style")
    assert same(pipe, before)
    assert pipe.adapters == []


def test_names_are_taken_once_and_a_lora_has_no_parts(style, pipe, make_adapter):
    pipe.load_lora_weights(style[0], "style")
    for load in (
        lambda: pipe.load_lora_weights(style[0], "style"),
        lambda: pipe.load_adapter(make_adapter(), "style"),
    ):
        with pytest.raises(AdapterError, match="'style' is loaded already"):
            load()
    with pytest.raises(TavError, match="has no parts"):
        pipe.set_adapters("style", {"st_attn": 1.0})


def test_sdxl_takes_loras_too(xl_base, xl_pipe, noise, tmp_path):
    model = random_loras(UNet2DConditionModel.from_pretrained(xl_base / "unet"), 3, ("to_k",))
    tensors = {
        n.removeprefix("base_model.model.").replace(".default", ""): t.detach()
        for n, t in model.named_parameters()
        if "lora_" in n
    }
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    before = state_of(xl_pipe)
    xl_pipe.load_lora_weights(tmp_path, "style")
    changed = [name for name, _ in xl_pipe.unet.named_parameters() if "lora_" in name]
    assert len(changed) == len(tensors)
    xl_pipe.unload_adapter("style")
    assert same(xl_pipe, before)


# -- swapping, and words -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_an_adapter_takes_anothers_place_without_new_layers(preset, pipe, make_adapter, noise):
    first, second = make_adapter(preset, seed=1), make_adapter(preset, seed=2)
    before = state_of(pipe)
    pipe.load_adapter(first, "clip", {"st_attn": 0.5})
    layers = [id(module) for module in pipe.unet.modules()]
    pipe.load_adapter(second, "clip", hotswap=True)
    assert [id(module) for module in pipe.unet.modules()] == layers
    swapped = output_of(pipe, noise)
    pipe.unload_adapter("clip")
    assert same(pipe, before)
    pipe.load_adapter(second, "clip", {"st_attn": 0.5})
    assert torch.equal(output_of(pipe, noise), swapped)


def test_only_an_adapter_of_the_same_config_takes_anothers_place(pipe, make_adapter, noise):
    pipe.load_adapter(make_adapter("lite", seed=1), "clip")
    before = output_of(pipe, noise)
    for other in (make_adapter("lite", rank=4), make_adapter("paper"), make_adapter("lite", blocks=("up",))):
        with pytest.raises(AdapterError, match="its layers cannot take its tensors"):
            pipe.load_adapter(other, "clip", hotswap=True)
    with pytest.raises(AdapterError, match="No adapter named 'nobody'"):
        pipe.load_adapter(make_adapter(), "nobody", hotswap=True)
    assert torch.equal(output_of(pipe, noise), before)


def test_a_textual_inversion_of_several_vectors_is_a_word_of_prompts(pipe, tmp_path):
    width = pipe.text_encoder.config.hidden_size
    made = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    save_file({"<robot>": made}, tmp_path / "robot.safetensors")
    plain = pipe.encode_prompts(["a red cat"]).text
    pipe.load_textual_inversion(tmp_path / "robot.safetensors")
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("a <robot>", pipe.tokenizer)).input_ids
    words = pipe.text_encoder.get_input_embeddings().weight
    vectors = load_file(tmp_path / "robot.safetensors")["<robot>"]
    assert all(any(torch.equal(words[i], vector) for i in ids) for vector in vectors)
    longest = pipe.tokenizer.model_max_length
    padded = pipe.tokenizer("a <robot> <robot>_1", padding="max_length", max_length=longest)
    by_hand = pipe.text_encoder(torch.tensor([padded.input_ids]))[0]
    torch.testing.assert_close(pipe.encode_prompts(["a <robot>"]).text, by_hand)
    assert torch.equal(pipe.encode_prompts(["a red cat"]).text, plain)
    pipe.unload_textual_inversion()
    assert torch.equal(pipe.encode_prompts(["a red cat"]).text, plain)


def test_what_is_no_textual_inversion_is_refused(pipe, tmp_path):
    save_file({"<robot>": torch.ones(2, 3)}, tmp_path / "narrow.safetensors")
    (tmp_path / "text.safetensors").write_text("a text")
    for name in ("narrow", "text", "nothing"):
        with pytest.raises(AdapterError, match=f"{name}.safetensors cannot be loaded as a textual inversion"):
            pipe.load_textual_inversion(tmp_path / f"{name}.safetensors")


def test_stock_peft_agrees_with_the_updates_that_these_tests_count_from(base, tmp_path, noise):
    flat = UNet2DConditionModel.from_pretrained(base / "unet")
    model = random_loras(UNet2DConditionModel.from_pretrained(base / "unet"), 1)
    model.save_pretrained(tmp_path)
    latents, states = noise(1, 4, 8, 8), noise(1, 7, flat.config.cross_attention_dim)
    with torch.no_grad():
        expected = model(latents, 9, states).sample
        loaded = PeftModel.from_pretrained(flat, tmp_path)
        assert torch.equal(loaded(latents, 9, states).sample, expected)


def test_pocket_takes_a_lora(noise, tmp_path):
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    before = state_of(pipe)
    module = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v"
    width = pipe.unet.get_submodule(module).weight.shape[0]
    save_file(
        {f"unet.{module}.lora_{k}.weight": noise(*s) for k, s in (("A", (1, width)), ("B", (width, 1)))},
        tmp_path / "lora.safetensors",
    )
    plain = output_of(pipe, noise)
    pipe.load_lora_weights(tmp_path / "lora.safetensors", "one")
    assert not torch.equal(output_of(pipe, noise), plain)
    pipe.unload_adapter("one")
    assert same(pipe, before)
