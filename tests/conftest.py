"""Small things to test with: random bases in the layout of Stable Diffusion's, clips for them, and their adapters."""

import copy
import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import beartype
from jaxtyping import install_import_hook

beartype.lenient = beartype.beartype(
    conf=beartype.BeartypeConf(is_pep484_tower=True)
)  # an int is a float too
# Every call of the library's functions that name shapes is checked against them; this must come before their import.
install_import_hook(
    [
        f"tav_peft.{module}"
        for module in (
            "autoencoding",
            "conditions",
            "control.steering",
            "inversion",
            "masks",
            "objective",
            "pipeline",
            "tuning",
            "unet.attention",
            "unet.inflation",
            "unet.temporal_init",
            "unet.trainable",
            "windows",
        )
    ],
    "beartype.lenient",
)

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tav_peft.adapter import Adapter, BaseModelInfo, ClipInfo, Provenance, TemporalInit
from tav_peft.bases.ldm_keys import to_single_file
from tav_peft.methods import json_config
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.presets import BLOCKS, PARTS, Subset
from tav_peft.recipe import Recipe
from tav_peft.unet import temporal_init
from tav_peft.unet.inflation import InflatedUNet, inflate, is_temporal
from tav_peft.video.clip import Clip

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keep what tests put into the cache out of the user's, and the user's out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


WIDTH, TOKENS = 32, 24  # of the text states
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SD2 = {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)}
MERGES = ["a n</w>", "i n", "in g</w>", "m an</w>", "s k", "sk i", "ski ing</w>"]


def _randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give each weight another random value, so that no test passes because a layer does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5 / fan_in**0.5)
    return model.eval()


def _write_tokenizer(folder: Path) -> int:
    symbols = sorted(string.ascii_lowercase + string.digits + string.punctuation)
    words = [*symbols, *(f"{s}</w>" for s in symbols), *(merge.replace(" ", "") for merge in MERGES)]
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    marks |= {"unk_token": marks["eos_token"], "pad_token": marks["eos_token"]}
    vocab = {word: n for n, word in enumerate([*words, marks["bos_token"], marks["eos_token"]])}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **marks}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    return len(vocab)


def _write_base(folder: Path, *, seed: int, unet: dict | None = None, scheduler: dict | None = None) -> Path:
    torch.manual_seed(seed)
    size = _write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **(scheduler or {})}
    vae.save_pretrained(folder / "vae")
    _randomise(UNet2DConditionModel(**(TINY_UNET | (unet or {}))), seed).save_pretrained(folder / "unet")
    encoder = CLIPTextModel(text)  # last, as versions of transformers draw its weights in different ways
    for name, parameter in encoder.named_parameters():
        nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
    _randomise(encoder, seed).save_pretrained(folder / "text_encoder")
    DDIMScheduler(**schedule).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A folder as of Stable Diffusion 1.x, tiny and random."""
    return _write_base(tmp_path_factory.mktemp("bases") / "tiny", seed=1)


@pytest.fixture(scope="session")
def v_base(tmp_path_factory) -> Path:
    """A folder as of Stable Diffusion 2.1: v-prediction, linear projections, attention in float32."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-v"
    return _write_base(folder, seed=2, unet=SD2, scheduler={"prediction_type": "v_prediction"})


def _write_xl_base(folder: Path) -> Path:
    """Add to a tiny base what SDXL has: a second text encoder, whose pooled text and the sizes enter the UNet."""
    sizes = {"time_ids": 6 * 8}
    _write_base(
        folder, seed=3,
        unet={
            "cross_attention_dim": 2 * WIDTH, "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "attention_head_dim": (2, 4),
            "projection_class_embeddings_input_dim": WIDTH + sizes["time_ids"],
        },
    )  # fmt: skip
    second = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    torch.manual_seed(4)
    _randomise(CLIPTextModelWithProjection(second), 4).save_pretrained(folder / "text_encoder_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("safety_checker", "requires_safety_checker"):
        del index[name]
    index |= {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def xl_base(tmp_path_factory) -> Path:
    """A folder as of Stable Diffusion XL: two text encoders, added conditions, transformers of several blocks."""
    return _write_xl_base(tmp_path_factory.mktemp("bases") / "tiny-xl")


@pytest.fixture
def xl_pipe(xl_base) -> TuneAVideoPipeline:
    return TuneAVideoPipeline.from_pretrained(xl_base)


@pytest.fixture(scope="session")
def ldm() -> Callable[[str, Path], dict[str, Tensor]]:
    """Give the tensors of a folder's base by the names they have in a single file; kind is sd1, sd2 or sdxl."""

    def tensors(kind: str, folder: Path) -> dict[str, Tensor]:
        parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        if kind == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection
        loaded = {name: part.from_pretrained(folder / name).state_dict() for name, part in parts.items()}
        return {name: tensor.clone() for name, tensor in to_single_file(kind, loaded).items()}

    return tensors


@pytest.fixture(scope="session")
def _loaded(base) -> TuneAVideoPipeline:
    return TuneAVideoPipeline.from_pretrained(base)


@pytest.fixture
def pipe(_loaded) -> TuneAVideoPipeline:
    """The tiny base as a pipeline; each test has its own."""
    return copy.deepcopy(_loaded)


@pytest.fixture
def v_pipe(v_base) -> TuneAVideoPipeline:
    return TuneAVideoPipeline.from_pretrained(v_base)


@pytest.fixture
def flat(base) -> UNet2DConditionModel:
    """The 2-D UNet of the tiny base."""
    return UNet2DConditionModel.from_pretrained(base / "unet").eval()


@pytest.fixture
def unet(flat) -> InflatedUNet:
    """The tiny base's UNet, inflated."""
    return inflate(flat)


@pytest.fixture
def run(unet, noise) -> Callable[..., Tensor]:
    """Run an inflated UNet, that of `unet` if no other is given, on fixed latents of three frames."""
    inputs = noise(1, 4, 3, 8, 8), 500, noise(1, 24, 32)

    def forward(model: InflatedUNet = unet) -> Tensor:
        with torch.no_grad():
            return model(*inputs).sample

    return forward


@pytest.fixture
def noise() -> Callable[..., Tensor]:
    """Draw normal numbers of a shape, the same for the same seed."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def clip() -> Clip:
    """Three frames of 32x32, which are latents of 8x8: a square that moves over a gradient."""
    pixels = np.zeros((3, 32, 32, 3), np.uint8)
    pixels[..., 0] = np.arange(0, 256, 8, dtype=np.uint8)
    for i, frame in enumerate(pixels):
        frame[8:16, 4 + 6 * i : 12 + 6 * i] = (250, 180, 40)
    return Clip(pixels, 10.0, "square.mp4", (0, 2, 4))


@pytest.fixture
def inversion(pipe, clip):
    """The clip, inverted in four steps by the tiny base."""
    return pipe.invert(clip, num_inference_steps=4)


@pytest.fixture
def make_adapter(_loaded) -> Callable[..., Adapter]:
    """Make adapters of random tensors that fit the tiny base."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _loaded.unet.state_dict().items()}
    temporal = {name: torch.Size(shape) for name, shape in shapes.items() if is_temporal(name)}
    architecture = {
        "block_out_channels": [16, 32], "layers_per_block": 1, "cross_attention_dim": WIDTH,
        "transformer_layers_per_block": 1,
    }  # fmt: skip

    def make(
        preset: str = "lite", *, seed: int = 0, rank: int = 2, alpha: float | None = None,
        parts: tuple[str, ...] = tuple(PARTS), blocks: tuple[str, ...] = tuple(BLOCKS),
        dtype: torch.dtype = torch.float32, temporal_seed: int = 0,
    ) -> Adapter:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        subset = Subset(preset, parts, blocks)
        dense = {"paper": parts, "hybrid": ("t_attn",), "lite": ()}[preset]
        tensors = {}
        for name, shape in shapes.items():
            module, _, kind = name.rpartition(".")
            part = next((part for part in parts if module.endswith(PARTS[part])), None)
            if part is None or not module.startswith(tuple(BLOCKS[block] for block in blocks)):
                continue
            if part not in dense and kind == "weight":
                tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator)
                tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.1
            elif part in dense and part == "t_attn":
                first = temporal_init.initial(name, torch.Size(shape), temporal_seed)
                tensors[name] = first + torch.randn(shape, generator=generator) * 0.1
            elif part in dense:
                tensors[f"{module}.diff"] = torch.randn(shape, generator=generator) * 0.1
        config = subset.peft_config([name.rpartition(".")[0] for name in shapes], rank=rank, alpha=alpha)
        provenance = Provenance(
            caption="a square", base=BaseModelInfo(name="tiny", fingerprint="0" * 64, architecture=architecture),
            clip=ClipInfo(name="square.mp4", fingerprint="1" * 64, frames=3, height=32, width=32, fps=10.0,
                          indices=(0, 2, 4)),
            temporal_init=TemporalInit(name=temporal_init.NAME, seed=temporal_seed,
                                       fingerprint=temporal_init.fingerprint(temporal, temporal_seed)),
            subset={"preset": preset, "parts": list(parts), "blocks": list(blocks)}, step=5,
            recipe=Recipe(prompt="a square").model_dump(mode="json"), versions={"tav-peft": "0"},
        )  # fmt: skip
        plain = None if config is None else json_config(config)
        return Adapter({name: tensor.to(dtype) for name, tensor in tensors.items()}, plain, provenance)

    return make


@pytest.fixture(scope="session")
def fork(tmp_path_factory) -> Iterator[Callable[..., SimpleNamespace]]:
    """Run a command, or code, in a fork of a process that has imported everything; see `forking.py`."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("forking.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path_factory.mktemp("forking"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400", "NO_COLOR": "1"},
    )  # fmt: skip

    def run(folder: Path, *tav: object, **request: object) -> SimpleNamespace:
        if "code" not in request:
            request["tav"] = [str(each) for each in tav]
        process.stdin.write(json.dumps({"folder": str(folder), **request}) + "\n")
        process.stdin.flush()
        return SimpleNamespace(**json.loads(process.stdout.readline()))

    yield run
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()
