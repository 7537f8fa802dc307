"""A CLIP in transformers' layout gives the unit vectors that transformers computes; what is none is refused by name."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from tav_peft.errors import BaseModelError, TavError
from tav_peft.scoring.clip_model import ClipModel


def by_hand(picture, side=32):
    """CLIP's own way, in numpy: the shorter side to `side` bicubically, its middle, standard mean and deviation."""
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    resized = Image.fromarray(picture).resize(
        (int(width * scale), int(height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    cut = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor((cut - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


def test_pictures_become_the_models_unit_vectors(tiny_clip, clip_folder, clip):
    wide = np.repeat(clip.pixels, 2, axis=2)
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        hidden = model.vision_model(torch.stack([by_hand(picture) for picture in wide])).pooler_output
        expected = hidden @ model.visual_projection.weight.T
    expected /= expected.square().sum(dim=1, keepdim=True).sqrt()
    assert torch.allclose(tiny_clip.images(wide), expected, atol=1e-5)
    assert expected.std(dim=0).max() > 1e-3  # the frames differ


def test_each_text_is_as_if_it_were_alone(tiny_clip, clip_folder):
    texts = ["a man", "a man skiing in a ring"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    expected = []
    with torch.no_grad():
        for text in texts:
            hidden = model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output[0]
            projected = model.text_projection.weight @ hidden
            expected.append(projected / projected.norm())
    assert torch.allclose(tiny_clip.texts(texts), torch.stack(expected), atol=1e-5)
    assert (expected[0] - expected[1]).norm() > 1e-2


def test_many_frames_are_seen_in_parts_and_come_out_the_same(tiny_clip, clip):
    many = np.concatenate([clip.pixels] * 15)
    assert torch.allclose(tiny_clip.images(many), tiny_clip.images(clip.pixels).repeat(15, 1), atol=1e-6)


def test_a_prompt_that_is_too_long_is_refused(tiny_clip, caplog):
    with pytest.raises(TavError, match=r"A prompt has \d+ tokens, .*tiny-clip reads 24"):
        tiny_clip.texts(["man " * 30])
    assert caplog.text == ""  # the tokenizer warned of the same, less plainly


def test_a_folder_that_is_no_clip_is_refused_by_name(base):
    with pytest.raises(BaseModelError, match="cannot be loaded as a CLIP"):
        ClipModel.load(base)


def test_a_clip_without_some_of_its_tensors_is_refused(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_folder, tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match="lacks 1 of a CLIP's tensors"):
        ClipModel.load(tmp_path / "cut")
