"""Masks from the cross-attention: the processor is exact, tokens are found, and on pocket the object is."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tav_peft.conditions import token_places
from tav_peft.cross_attention import attention_map, attention_mask, recording
from tav_peft.errors import TavError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED
from tav_peft.pocket.world import cut_out


def test_recording_changes_no_output_and_leaves_no_trace(pipe, noise, make_adapter):
    pipe.load_adapter(make_adapter())
    told, x = pipe.encode_prompts(["a man"]), noise(1, 4, 3, 8, 8)
    before = {name: module.processor for name, module in pipe.unet.named_modules() if name.endswith("attn2")}
    with torch.no_grad():
        plain = pipe.predict(x, 300, told)
        with recording(pipe.unet, [1, 2]) as processors:
            recorded = pipe.predict(x, 300, told)
        again = pipe.predict(x, 300, told)
    torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-5)  # softmax by hand instead of fused
    assert torch.equal(plain, again)
    after = {name: module.processor for name, module in pipe.unet.named_modules() if name.endswith("attn2")}
    assert after == before
    assert [p.seen[0].shape[0] for p in processors] == [3] * len(before)


def test_what_is_recorded_is_the_attention_to_the_tokens(pipe, noise):
    told, x = pipe.encode_prompts(["a man"]), noise(1, 4, 3, 8, 8)
    with torch.no_grad(), recording(pipe.unet, range(24)) as everything:
        pipe.predict(x, 300, told)
    with torch.no_grad(), recording(pipe.unet, [2]) as one:
        pipe.predict(x, 300, told)
    for all_tokens, single in zip(everything, one, strict=True):
        torch.testing.assert_close(all_tokens.seen[0], torch.ones_like(all_tokens.seen[0]))  # a softmax
        assert (single.seen[0] > 0).all()
        assert (single.seen[0] < 1).all()


@pytest.mark.parametrize(("word", "places"), [("man", [2]), ("is skiing", [3, 4, 5]), ("a man", [1, 2])])
def test_a_words_tokens_are_found_in_the_caption(pipe, word, places):
    tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer("a man is skiing").input_ids)
    assert tokens[1:-1] == ["a</w>", "man</w>", "i", "s</w>", "skiing</w>"]
    assert token_places(pipe.tokenizer, "a man is skiing", word) == places


@pytest.mark.parametrize("word", ["fox", "", "skiing man", "man is skiing a"])
def test_a_word_that_is_not_in_the_caption_is_refused(pipe, word):
    with pytest.raises(TavError, match=f"The caption 'a man is skiing' does not have '{word}'"):
        token_places(pipe.tokenizer, "a man is skiing", word)


def test_a_word_that_the_model_sees_nowhere_gives_no_mask(pipe, clip):
    # a random model looks at all places alike
    inversion = pipe.invert(clip, num_inference_steps=4)
    with pytest.raises(TavError, match="does not look for 'man' in one place of this clip"):
        attention_mask(pipe, inversion, "a man", "man")
    with pytest.raises(TavError, match="threshold 1: give more than 0 and less than 1"):
        attention_mask(pipe, inversion, "a man", "man", threshold=1)


@pytest.mark.parametrize("name", ["fox-grass", "penguin-snow"])
def test_on_pocket_the_object_is_found_where_it_is(name):
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    truth = next(clip for clip in SHIPPED if clip.name == name)
    inversion = pipe.invert(truth.render(), num_inference_steps=20, depth=0.4)
    outline = np.stack([cut_out(dataclasses.replace(truth.scene.actors[0], x=x, y=y)) for x, y in truth.path])
    covered = F.interpolate(torch.from_numpy(outline)[:, None], (16, 16), mode="area")[:, 0]
    word = name.partition("-")[0]
    exact = attention_mask(pipe, inversion, truth.caption, word, grow=0) > 0
    there = covered >= 0.3
    assert (exact & there).sum() / (exact | there).sum() > 0.75  # 0.86 and 0.89 were seen
    grown = attention_mask(pipe, inversion, truth.caption, word) > 0
    assert grown[covered > 0].float().mean() > 0.99
    assert grown.float().mean() < 0.4
    shown = attention_map(pipe, inversion, truth.caption, word)
    assert torch.equal(shown.amax((1, 2)), torch.ones(8))
