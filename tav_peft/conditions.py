"""What the UNet is told about a video besides its latents: the prompt's states, and what SDXL adds to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tav_peft.errors import TavError
from tav_peft.shapes import TextStates


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """One row for each prompt.

    `text` has the states that the cross-attention reads, (batch, tokens, width). `added` is None, or for SDXL
    `text_embeds` (batch, width), the second encoder's pooled text, and `time_ids` (batch, 6): original height and
    width, top and left of the crop, target height and width, in pixels (Podell et al. 2023, section 2.2).
    """

    text: TextStates
    added: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.text)

    def to(self, dtype: torch.dtype) -> Conditions:
        """Cast every tensor."""
        added = None if self.added is None else {name: rows.to(dtype) for name, rows in self.added.items()}
        return Conditions(self.text.to(dtype), added)

    def rows(self, *index: int) -> Conditions:
        """Take some rows, in the order given."""
        chosen = list(index)
        added = None if self.added is None else {name: rows[chosen] for name, rows in self.added.items()}
        return Conditions(self.text[chosen], added)


def joined(first: Conditions, second: Conditions) -> Conditions:
    """Put the rows of one after the other's."""
    if first.added is None or second.added is None:
        return Conditions(torch.cat([first.text, second.text]))
    pairs = first.added, second.added
    added = {name: torch.cat([each[name] for each in pairs]) for name in first.added}
    return Conditions(torch.cat([first.text, second.text]), added)


@torch.no_grad()
def encode_clip_text(
    prompts: Sequence[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel, device: torch.device
) -> Conditions:
    """Encode prompts as Stable Diffusion 1.x and 2.x do: the text encoder's last states."""
    return Conditions(encoder(_tokens(prompts, tokenizer, device))[0])


@torch.no_grad()
def encode_sdxl_text(
    prompts: Sequence[str],
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    device: torch.device,
    *,
    size: tuple[int, int],
    empty_is_zero: bool = True,
) -> Conditions:
    """Encode prompts as SDXL does: the last but one states of both encoders side by side, pooled text, and sizes.

    `size` is the clip's height and width in pixels. With `empty_is_zero` the empty prompt is all zeros, as SDXL
    learned it (`force_zeros_for_empty_prompt` in its model index).
    """
    states, pooled = [], None
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        output = encoder(_tokens(prompts, tokenizer, device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]  # kept from the second encoder, whose first output is its projected text
    text = torch.cat(states, dim=-1)
    assert pooled is not None
    if empty_is_zero:
        kept = torch.tensor([bool(prompt) for prompt in prompts], device=device)
        text, pooled = text * kept[:, None, None], pooled * kept[:, None]
    sizes = torch.tensor([[*size, 0, 0, *size]], device=device, dtype=text.dtype).expand(len(prompts), -1)
    return Conditions(text, {"text_embeds": pooled, "time_ids": sizes})


def token_places(tokenizer: CLIPTokenizer, caption: str, word: str) -> list[int]:
    """Find the places of a word's tokens (or of several words in a row) among those of a caption.

    Raises:
        TavError: when the caption does not have it.

    """
    tokens, wanted = (tokenizer(text).input_ids[1:-1] for text in (caption, word))  # without start and end
    for first in range(len(tokens) - len(wanted) + 1):
        if wanted and tokens[first : first + len(wanted)] == wanted:
            return [1 + first + i for i in range(len(wanted))]
    raise TavError(f"The caption {caption!r} does not have {word!r}. Give a word of it.")


def _tokens(prompts: Sequence[str], tokenizer: CLIPTokenizer, device: torch.device) -> Tensor:
    limit = tokenizer.model_max_length
    for prompt in prompts:
        count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > limit:
            raise TavError(
                f"The prompt {prompt!r} has {count} tokens, this base reads {limit} (two are marks). Shorten it."
            )
    tokens = tokenizer(list(prompts), padding="max_length", max_length=limit, return_tensors="pt")
    ids: Tensor = tokens.input_ids
    return ids.to(device)
