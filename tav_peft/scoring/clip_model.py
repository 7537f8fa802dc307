"""Any CLIP in transformers' layout, as pictures and texts to unit vectors; `pocket-clip` comes with the package."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from tav_peft.errors import BaseModelError, TavError

POCKET = "pocket-clip"
_BATCH = 32  # frames seen at once, so that a long clip needs no more memory than a short one

# without torchvision transformers 5 has this class only; with it, it resizes as CLIP's own code does, by PIL
_Processor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


@dataclasses.dataclass(frozen=True, eq=False)
class ClipModel:
    """A CLIP (Radford et al. 2021) with its tokenizer and its way of preparing pictures."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any

    @classmethod
    def load(cls, name: str | Path = POCKET) -> ClipModel:
        """Load a CLIP: `pocket-clip`, a folder, or a hub id; a checkpoint of PickScore's is one too.

        Raises:
            BaseModelError: when there is none of that name, or it is no CLIP in transformers' layout.

        """
        place = str(files("tav_peft.pocket") / "clip") if name == POCKET else str(name)
        try:
            model, report = CLIPModel.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError(f"it lacks {len(report['missing_keys'])} of a CLIP's tensors")
            tokenizer = CLIPTokenizer.from_pretrained(place)
            processor = _Processor.from_pretrained(place)
        except (OSError, ValueError, ImportError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BaseModelError(
                f"{name} cannot be loaded as a CLIP: {reason}. Give {POCKET}, a folder in transformers' layout "
                "(config, weights, tokenizer and preprocessor), or a hub id."
            ) from error
        return cls(str(name), model.eval(), tokenizer, processor)

    @property
    def scale(self) -> float:
        """The learnt scale of its cosines, the exponential of `logit_scale`."""
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def images(self, pixels: Any) -> Tensor:
        """Give a unit vector for each of some pictures, uint8 (count, height, width, 3): (count, features)."""
        parts = []
        for at in range(0, len(pixels), _BATCH):
            pictures = [Image.fromarray(picture) for picture in pixels[at : at + _BATCH]]
            prepared = self.processor(images=pictures, return_tensors="pt").pixel_values
            parts.append(_pooled(self.model.get_image_features(prepared)))
        return _unit(torch.cat(parts))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Give a unit vector for each of some texts, (count, features).

        Raises:
            TavError: when a text is longer than the model reads.

        """
        tokens = self.tokenizer(list(texts), padding=True, verbose=False)
        most, longest = self.model.config.text_config.max_position_embeddings, max(map(len, tokens.input_ids))
        if longest > most:
            raise TavError(f"A prompt has {longest} tokens, {self.name} reads {most}. Shorten it.")
        asked = {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}
        return _unit(_pooled(self.model.get_text_features(**asked)))


@functools.lru_cache(maxsize=2)
def shared(name: str) -> ClipModel:
    """Load a CLIP once for all scores of a run."""
    return ClipModel.load(name)


def _pooled(output: Any) -> Tensor:
    """Take the projected features; transformers before 5 gave them bare."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)
