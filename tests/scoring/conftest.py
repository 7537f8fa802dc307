"""A tiny random CLIP in transformers' layout, with the tokenizer of the tiny bases."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from tav_peft.scoring.clip_model import ClipModel
from tav_peft.video.clip import Clip


@pytest.fixture(scope="session")
def clip_folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    shutil.copytree(base / "tokenizer", folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    text = CLIPTextConfig(vocab_size=size, max_position_embeddings=24, projection_dim=8, **sizes, **ends)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=8, **sizes)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.logit_scale.data.fill_(1.5)
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def tiny_clip(clip_folder):
    return ClipModel.load(clip_folder)


@pytest.fixture
def other(clip):
    """Another clip of the same size: its own frames, darker and backwards."""
    return Clip(np.ascontiguousarray(clip.pixels[::-1]) // 2, clip.fps)
