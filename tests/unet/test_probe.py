"""A probe tells adapters and bases apart, and is the same wherever it is taken."""

import dataclasses
import logging
import math

import pytest
import torch

from tav_peft import tuning
from tav_peft.adapter import ProbeInfo
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import ModelSection, Recipe
from tav_peft.unet import philox
from tav_peft.unet.probe import distance, probe, probed, tolerance


def changed(adapter, **provenance):
    return dataclasses.replace(adapter, provenance=adapter.provenance.model_copy(update=provenance))


def info(precision="fp32", device="cpu", values=(0.5, -1.0), std=2.0):
    return ProbeInfo(name="probe-1", precision=precision, device=device, values=values, mean=0.0, std=std)


def drawn(what, *shape):
    return (philox.unit(f"probe-1:{what}", math.prod(shape)) * math.sqrt(3)).reshape(shape)


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_a_probe_is_the_output_on_an_input_drawn_by_name(preset, pipe, make_adapter):
    adapter = make_adapter(preset)
    taken = probe(adapter, pipe.unet)
    pipe.load_adapter(adapter)
    with torch.no_grad():
        output = pipe.unet(drawn("latents", 1, 4, 3, 8, 8), 500, drawn("text", 1, 8, 32)).sample
    # rounded to seven digits; the deviation is of all 768 numbers, the values every 51st, from first to last
    assert taken.mean == pytest.approx(output.mean().item(), abs=1e-7)
    assert taken.std == pytest.approx(output.std().item(), rel=1e-6)
    places = [i * 767 // 15 for i in range(16)]
    assert taken.values == pytest.approx(output.flatten()[places].tolist(), rel=1e-6)
    assert (taken.name, taken.precision, taken.device) == ("probe-1", "fp32", "cpu")


def test_a_probe_leaves_the_unet_as_it_was(pipe, make_adapter):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    probe(changed(make_adapter("hybrid"), model=ModelSection(attention="full")), pipe.unet)
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert pipe.unet.variant == ModelSection()


def other_seed(make_adapter):
    return make_adapter(seed=1)


def other_scale(make_adapter):
    adapter = make_adapter()
    return dataclasses.replace(adapter, peft_config={**adapter.peft_config, "lora_alpha": 2.02})


def other_number(make_adapter):
    adapter = make_adapter()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"
    tensor = adapter.tensors[name].clone()
    tensor[0] += 1
    return dataclasses.replace(adapter, tensors={**adapter.tensors, name: tensor})


def other_variant(make_adapter):
    return changed(make_adapter(), model=ModelSection(group_norm="frame"))


@pytest.mark.parametrize("change", [other_seed, other_scale, other_number, other_variant])
def test_another_adapter_has_another_probe(change, pipe, make_adapter):
    one, other = probe(make_adapter(), pipe.unet), probe(change(make_adapter), pipe.unet)
    assert distance(one, one) == 0
    assert distance(one, other) > tolerance(one, other)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_another_precision_is_within_its_tolerance_and_outside_of_float32s(
    dtype, precision, pipe, base, make_adapter
):
    exact = probe(make_adapter(), pipe.unet)
    rounded = probe(make_adapter(), TuneAVideoPipeline.from_pretrained(base, dtype=dtype).unet)
    assert rounded.precision == precision
    assert tolerance(exact, exact) < distance(exact, rounded) < tolerance(exact, rounded)


def test_float32_on_a_gpu_is_trusted_no_more_than_float16():
    assert tolerance(info(), info()) < tolerance(info(), info(device="cuda")) == tolerance(info("fp16"))


def test_a_distance_is_in_deviations_of_the_claimed_output():
    assert distance(info(), info(values=(0.5, -1.5))) == 0.25
    assert distance(info(), info(std=3.0)) == 0.5
    assert distance(info(), info(values=(0.5,))) == math.inf


def test_an_output_that_is_not_finite_is_no_probe(pipe, make_adapter, caplog):
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = math.inf
    with caplog.at_level(logging.WARNING):
        assert probed(make_adapter(), pipe.unet).provenance.probe is None
    assert "output in fp32 is not finite" in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "xl_pipe"])
def test_a_tuning_ends_with_a_probe_of_what_is_saved(kind, request, clip):
    pipe = request.getfixturevalue(kind)
    recipe = Recipe().override(["training.steps=1", "adapter.dtype=fp16", "model.attention=causal"])
    tuned = tuning.tune(pipe, clip, "a man", recipe)
    assert tuned.provenance.probe == probe(tuned, pipe.unet)


def test_sdxl_is_told_a_pooled_text_and_sizes(xl_pipe, clip, monkeypatch):
    tuned = tuning.tune(xl_pipe, clip, "a man", Recipe().override(["training.steps=1"]))
    seen, forward = [], xl_pipe.unet.forward
    monkeypatch.setattr(
        xl_pipe.unet, "forward", lambda *given, **more: seen.append(more) or forward(*given, **more)
    )
    probe(tuned, xl_pipe.unet)
    (told,) = [more["added_cond_kwargs"] for more in seen]
    assert told["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    width = xl_pipe.text_encoder_2.config.projection_dim
    assert torch.equal(told["text_embeds"], drawn("text_embeds", 1, width))
