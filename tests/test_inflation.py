"""Inflation: the recorded outputs of the original, and what stays the 2-D UNet's."""

import functools
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from tav_peft.errors import BaseModelError
from tav_peft.inflation import InflatedUNet, inflate, is_temporal
from tav_peft.presets import Subset
from tav_peft.trainable import trainable

RECORDED = Path(__file__).parent / "recorded"  # see its README
SHARED = Path(__file__).parents[1].parent / "shared" / "fixtures" / "official"
SHARED_FOLDERS = [SHARED / "sd1-tiny", SHARED / "sd2-tiny"]
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs ../shared/fixtures/official, which is not here"
)
FOLDERS = [
    pytest.param(RECORDED / "sd1-tiny", id="carried sd1-tiny"),
    *(pytest.param(folder, marks=needs_shared, id=f"shared {folder.name}") for folder in SHARED_FOLDERS),
]
# of the recorded range; measured are 1.3e-5 and 1.4e-6, the same code in float64 is 0.4e-5 away from its own record
TOLERANCE = {"sd1-tiny": 5e-5, "sd2-tiny": 1e-5}


class Original:
    """A folder of recorded numbers, and the inflated UNet that must reproduce them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flat = UNet2DConditionModel.from_pretrained(folder / "checkpoint" / "unet").eval()
        self.unet = inflate(self.flat)
        self.forward = load_file(folder / "forward.safetensors")

    def put_t_attn(self, which: str) -> None:
        state = load_file(self.folder / f"tattn_{which}.safetensors")
        assert set(state) == {name for name in self.unet.state_dict() if is_temporal(name)}
        self.unet.load_state_dict(state, strict=False)

    @torch.no_grad()
    def call(self, case: str, latents: Tensor | None = None) -> Tensor:
        timestep = self.forward["b2_timesteps" if case == "b2_" else f"{case}timestep"]
        latents = self.forward[f"{case}latents"] if latents is None else latents
        return self.unet(latents, timestep, self.forward[f"{case}text"]).sample

    def assert_near(self, got: Tensor, recorded: str) -> None:
        expected = self.forward[recorded]
        assert got.shape == expected.shape
        distance = (got - expected).abs().max() / (expected.max() - expected.min())
        assert distance < TOLERANCE[self.folder.name]


@pytest.fixture(scope="module")
def originals():
    return functools.cache(Original)


@pytest.mark.parametrize(
    "case", ["", "b2_", "odd_", "f1_"], ids=["5 frames", "batch 2", "odd sizes", "1 frame"]
)
@pytest.mark.parametrize("t_attn", ["fresh", "random"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_outputs_are_those_recorded_from_the_original(folder, t_attn, case, originals):
    original = originals(folder)
    original.put_t_attn(t_attn)
    original.assert_near(original.call(case), f"{case}out_{t_attn}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_fresh_inflation_is_the_original_with_t_attn_off(folder):
    original = Original(folder)
    original.assert_near(original.call(""), "out_tattn_off")
    repeated = original.forward["latents"][:, :, :1].expand(-1, -1, 5, -1, -1)
    original.assert_near(original.call("", repeated), "same_frames_out_tattn_off")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_clip_is_not_its_frames_one_by_one(folder):
    original = Original(folder)
    assert (original.call("") - original.forward["per_frame_2d_out"]).abs().max() > 0.1


def test_a_transformer_of_sd2_gives_what_was_recorded():
    tensors = load_file(RECORDED / "sd2-tiny" / "transformer.safetensors")
    given, expected, text = (tensors.pop(name) for name in ("transformer.in", "transformer.out", "text"))
    config = UNet2DConditionModel._dict_from_json_file(RECORDED / "sd2-tiny" / "config.json")
    unet = InflatedUNet.from_config(config)
    transformer = unet.get_submodule("down_blocks.1.attentions.0").eval()
    transformer.load_state_dict(tensors)
    frames = given.shape[2]
    unet.frame_count.value = frames
    with torch.no_grad():
        folded = given.transpose(1, 2).flatten(0, 1)  # (b f) c h w
        states = text.repeat_interleave(frames, dim=0)
        (out,) = transformer(folded, encoder_hidden_states=states, return_dict=False)
    out = out.unflatten(0, (-1, frames)).transpose(1, 2)  # b c f h w
    assert (out - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


# -- the 2-D UNet inside -----------------------------------------------------------------------------------


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
