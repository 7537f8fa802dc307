"""Inflation: what is added to the 2-D UNet, and what stays its own."""

import inspect

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from tav_peft.errors import BaseModelError, RecipeError
from tav_peft.presets import Subset
from tav_peft.recipe import ModelSection
from tav_peft.unet.inflation import InflatedUNet, inflate, is_temporal
from tav_peft.unet.trainable import trainable


@pytest.fixture(params=["base", "v_base"])
def flat(request) -> UNet2DConditionModel:  # here of both bases
    folder = request.getfixturevalue(request.param)
    return UNet2DConditionModel.from_pretrained(folder / "unet").eval()


@pytest.fixture
def text() -> Tensor:
    return torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_equal_frames_are_each_the_2d_unet_untuned(flat, text, noise):
    image = noise(1, 4, 8, 8)
    expected = flat(image, 7, text).sample
    got = inflate(flat)(image[:, :, None].expand(-1, -1, 4, -1, -1), 7, text).sample
    for i in range(4):
        torch.testing.assert_close(got[:, :, i], expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@torch.no_grad()
def test_one_frame_is_the_2d_unet(flat, text, noise):
    image = noise(2, 4, 8, 8)
    both = text.expand(2, -1, -1)
    got = inflate(flat)(image[:, :, None], torch.tensor([7, 900]), both).sample[:, :, 0]
    expected = flat(image, torch.tensor([7, 900]), both).sample
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@torch.no_grad()
def test_untuned_without_anything_between_frames_it_is_the_2d_unet_on_each_frame(flat, text, noise):
    """Per-frame Stable Diffusion: not a bit differs from the 2-D UNet on the frames as a batch."""
    unet, clips = inflate(flat, attention="frame", group_norm="frame"), noise(2, 4, 3, 8, 8)
    texts, timesteps = torch.cat([text, -text]), torch.tensor([7, 700])
    got = unet(clips, timesteps, texts).sample
    folded = clips.transpose(1, 2).flatten(0, 1)
    expected = flat(folded, timesteps.repeat_interleave(3), texts.repeat_interleave(3, dim=0)).sample
    assert torch.equal(got.transpose(1, 2).flatten(0, 1), expected)
    for b in range(2):
        for i in range(3):
            alone = flat(clips[b : b + 1, :, i], timesteps[b], texts[b : b + 1]).sample
            torch.testing.assert_close(
                got[b : b + 1, :, i], alone, rtol=0, atol=2e-6 * alone.abs().max().item()
            )


# what is the 2-D UNet again where all frames are equal, whichever of them a frame sees
@pytest.mark.parametrize("attention", ["causal", "full", "frame"])
@torch.no_grad()
def test_equal_frames_are_each_the_2d_unet_in_every_variant(flat, text, attention, noise):
    image = noise(1, 4, 8, 8)
    expected = flat(image, 7, text).sample
    got = inflate(flat, attention=attention)(image[:, :, None].expand(-1, -1, 4, -1, -1), 7, text).sample
    for i in range(4):
        torch.testing.assert_close(got[:, :, i], expected, rtol=0, atol=2e-6 * expected.abs().max().item())


VARIANTS = [
    ModelSection(attention=attention, group_norm=group_norm)
    for attention in ("sparse_causal", "causal", "full", "frame")
    for group_norm in ("joint", "frame")
]


@torch.no_grad()
def test_every_variant_is_another_function_of_the_same_weights(flat, text, noise):
    unet, clip = inflate(flat), noise(1, 4, 4, 8, 8)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    outputs = []
    for variant in VARIANTS:
        unet.variant = variant
        outputs.append(unet(clip, 7, text).sample)
    for i, output in enumerate(outputs):
        assert all((output - other).abs().max() > 1e-3 for other in outputs[:i])
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.attention}-{v.group_norm}")
def test_switched_at_run_time_it_is_what_inflation_gives(flat, text, variant, noise):
    clip, switched = noise(1, 4, 3, 8, 8), inflate(flat)
    before = switched(clip, 7, text).sample
    expected = inflate(flat, **variant.model_dump())(clip, 7, text).sample
    with switched.as_variant(variant):
        assert torch.equal(switched(clip, 7, text).sample, expected)
    assert switched.variant == ModelSection()
    assert torch.equal(switched(clip, 7, text).sample, before)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sparse_causal", "causal"])
def test_causal_attention_lets_no_later_frame_in(flat, text, attention, noise):
    unet, clip = inflate(flat, attention=attention, group_norm="frame"), noise(1, 4, 4, 8, 8)
    changed = clip.clone()
    changed[:, :, 2] += 1
    same = (unet(clip, 7, text).sample == unet(changed, 7, text).sample).all(dim=(0, 1, 3, 4))
    assert same.tolist() == [True, True, False, False]


def test_an_unknown_variant_is_refused(flat):
    with pytest.raises(RecipeError, match=r"model: attention: .* not 'ful'\. Did you mean 'full'\?"):
        inspect.unwrap(inflate)(flat, attention="ful")


@torch.no_grad()
def test_fresh_t_attn_changes_no_bit(flat, text, monkeypatch, noise):
    unet, clip = inflate(flat), noise(1, 4, 3, 8, 8)
    with_t_attn = unet(clip, 7, text).sample
    blocks = [module for module in unet.modules() if hasattr(module, "attn_temp")]
    assert len(blocks) == 7
    for block in blocks:
        monkeypatch.setattr(block.attn_temp, "forward", torch.zeros_like)
    assert torch.equal(unet(clip, 7, text).sample, with_t_attn)


def test_fresh_t_attn_starts_at_zero_output_and_unit_norm(flat):
    state = inflate(flat).state_dict()
    for name, tensor in state.items():
        if "attn_temp.to_out.0." in name or name.endswith("norm_temp.bias"):
            assert not tensor.any(), name
        elif name.endswith("norm_temp.weight"):
            assert (tensor == 1).all()


def test_names_are_those_of_the_2d_unet_with_t_attn_after_every_transformer_block(flat):
    names = set(flat.state_dict())
    blocks = {
        name.removesuffix(".attn1.to_q.weight") for name in names if name.endswith(".attn1.to_q.weight")
    }
    assert len(blocks) == 7
    kinds = [f"attn_temp.{kind}.weight" for kind in ("to_q", "to_k", "to_v", "to_out.0")]
    kinds += ["attn_temp.to_out.0.bias", "norm_temp.weight", "norm_temp.bias"]
    assert set(inflate(flat).state_dict()) == names | {
        f"{block}.{kind}" for block in blocks for kind in kinds
    }


@torch.no_grad()
def test_the_2d_unet_stays_as_it_is_and_shares_its_weights(flat, text, noise):
    image = noise(1, 4, 8, 8)
    before, state = flat(image, 7, text).sample, {k: v.clone() for k, v in flat.state_dict().items()}
    unet = inflate(flat)
    unet(noise(1, 4, 3, 8, 8), 7, text)
    assert torch.equal(flat(image, 7, text).sample, before)
    assert type(flat) is UNet2DConditionModel
    assert list(flat.state_dict()) == list(state)
    for name, parameter in flat.named_parameters():
        assert torch.equal(parameter, state[name])
        assert parameter.data_ptr() == unet.get_parameter(name).data_ptr()


@torch.no_grad()
def test_each_video_of_a_batch_has_its_own_text_and_timestep(flat, text, noise):
    unet, clips = inflate(flat), noise(2, 4, 3, 8, 8)
    texts, timesteps = torch.cat([text, -text]), torch.tensor([7, 700])
    both = unet(clips, timesteps, texts).sample
    for n in range(2):
        alone = unet(clips[n : n + 1], int(timesteps[n]), texts[n : n + 1]).sample
        torch.testing.assert_close(both[n : n + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_tuple_is_returned_when_asked(flat, text, noise):
    unet, clip = inflate(flat), noise(1, 4, 2, 8, 8)
    (out,) = unet(clip, 7, text, return_dict=False)
    assert torch.equal(out, unet(clip, 7, text).sample)


def test_dtype_and_mode_are_the_2d_unets(flat):
    assert inflate(flat.bfloat16().train()).training
    assert {p.dtype for p in inflate(flat).parameters()} == {torch.bfloat16}
    assert not inflate(flat.eval()).training


def test_reset_temporal_gives_what_inflation_with_that_seed_gives(flat):
    reset, inflated = inflate(flat), inflate(flat, temporal_seed=9)
    assert not torch.equal(_queries(reset), _queries(inflated))
    reset.reset_temporal(9)
    assert reset.temporal_seed == inflated.temporal_seed == 9
    assert torch.equal(_queries(reset), _queries(inflated))


def _queries(unet: InflatedUNet) -> Tensor:
    return unet.mid_block.attentions[0].transformer_blocks[0].attn_temp.to_q.weight


def test_saved_and_loaded_it_gives_the_same_bits(flat, text, tmp_path, noise):
    unet, clip = inflate(flat), noise(1, 4, 3, 8, 8)
    for name, parameter in unet.named_parameters():
        if is_temporal(name):
            parameter.data += 0.1
    unet.save_pretrained(tmp_path / "unet")
    loaded = InflatedUNet.from_pretrained(tmp_path / "unet")
    assert list(loaded.state_dict()) == list(unet.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(clip, 7, text).sample, unet(clip, 7, text).sample)


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_gradient_checkpointing_gives_every_trainable_tensor_the_same_gradient(flat, text, preset, noise):
    """The original's own checkpointing left the down blocks without any."""
    unet, clip = inflate(flat), noise(1, 4, 3, 8, 8)
    for name, parameter in unet.named_parameters():
        if is_temporal(name):  # with its zero output a fresh T-Attn gives its q, k and v the gradient 0
            parameter.data += noise(*parameter.shape) * 0.1

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        with trainable(unet, Subset(preset), rank=2) as part:
            for name, parameter in part.parameters.items():
                if "lora_B" in name:  # else A gets the gradient 0
                    parameter.data += 0.1
            unet.train()
            if checkpointing:
                unet.enable_gradient_checkpointing()
            unet(clip, 7, text).sample.square().mean().backward()
            unet.disable_gradient_checkpointing()
            return {name: parameter.grad for name, parameter in part.parameters.items()}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 7 * {"paper": 7, "hybrid": 9, "lite": 12}[preset]
    assert sum(name.startswith("down_blocks") for name in plain) == len(plain) * 2 // 7
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}"
        )


# -- what cannot be inflated -------------------------------------------------------------------------------


def test_an_inflated_unet_is_refused(flat):
    with pytest.raises(BaseModelError, match="inflated already"):
        inflate(inflate(flat))


def test_another_kind_of_model_is_refused():
    with pytest.raises(BaseModelError, match=r"this is a AutoencoderKL\. Use a Stable Diffusion base"):
        inspect.unwrap(inflate)(
            AutoencoderKL(norm_num_groups=4, block_out_channels=(8,))
        )  # not as checked in tests


def test_a_unet_without_transformer_blocks_is_refused():
    plain = UNet2DConditionModel(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    with pytest.raises(BaseModelError, match="no transformer blocks"):
        inflate(plain)


@pytest.mark.parametrize("option", ["only_cross_attention", "dual_cross_attention"])
def test_attn1_that_is_no_self_attention_is_refused(option, flat):
    flat.register_to_config(**{option: True})
    with pytest.raises(BaseModelError, match=f"sets {option}"):
        inflate(flat)
