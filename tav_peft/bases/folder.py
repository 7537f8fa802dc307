"""Bases in folders of diffusers layout: whether one is whole and fit, and which of its files to load."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tav_peft.bases import unfit
from tav_peft.bases.checkpoint_file import check_checkpoint
from tav_peft.errors import BaseModelError

_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
_MOST, _MOST_LAYERS = 1 << 20, 1000  # far above any model's
_LAYOUT = "A base in diffusers layout has unet/, vae/, text_encoder/, tokenizer/ and scheduler/."


def loading_options(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Look into a base's folder and say how diffusers is to load it: the variant, where only one is there.

    `given` are the caller's own options; parts that are among them need not be in the folder.

    Raises:
        BaseModelError: when a part is missing, damaged or a pickle of more than tensors, or the model is no base.

    """
    index = read_config(folder / "model_index.json")
    present = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[0]}
    reason = _reason(folder, present, given)
    if reason is not None:
        raise BaseModelError(f"{folder} is no base, but {reason}")
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        if name not in given and (name not in present or not (folder / name).is_dir()):
            raise BaseModelError(f"{folder} lacks its {name}. {_LAYOUT}")
    models = [name for name in _CLASSES if name in present and name not in given]
    for name in present:
        if name.startswith("tokenizer") and name not in given:
            _check_tokenizer(folder, name)
    for name in models:
        _check_sizes(folder / name / "config.json")
    found = {name: weight_files(folder, name) for name in models}
    variant = given.get("variant") or _variant(found)
    chosen = {
        name: files.get(variant) or files.get(None) or next(iter(files.values()))
        for name, files in found.items()
    }
    for files in chosen.values():
        for file in files:
            check_checkpoint(file)
    options: dict[str, Any] = {} if variant is None else {"variant": variant}
    if chosen and all(file.suffix == ".bin" for files in chosen.values() for file in files):
        options["use_safetensors"] = False  # or diffusers calls it an error that there are none
    return options


def read_config(file: Path) -> dict[str, Any]:
    """Read a part's JSON config.

    Raises:
        BaseModelError: when it is missing or broken.

    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise BaseModelError(f"{file} is missing or broken. {_LAYOUT}") from None
    return found


def _check_sizes(file: Path) -> None:
    """Refuse a config whose sizes no model has, before a library makes the model that it asks for."""

    def told(key: str, value: Any) -> None:
        for name, inner in value.items() if isinstance(value, dict) else ():
            told(name, inner)
        for inner in value if isinstance(value, list) else ():
            told(key, inner)
        most = _MOST_LAYERS if "layers" in key else _MOST
        if isinstance(value, (int, float)) and abs(value) > most:
            raise BaseModelError(f"{file} is damaged: {key} is {value}, and in no model more than {most}.")

    told("", read_config(file))


def check_loaded(folder: Path, parts: Mapping[str, Any]) -> None:
    """Refuse a base of which libraries made up what its files lack, or whose tokenizer has more words than it embeds.

    `parts` are the loaded parts by name; those that are None, or not of this folder, are left out.

    Raises:
        BaseModelError: naming the part.

    """
    for name, model in parts.items():
        if name not in _CLASSES or model is None or not (folder / name).is_dir():
            continue
        missing = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
        if name.startswith("text_encoder"):  # whose missing tensors transformers draws at random
            missing = sorted({_plain(key) for key in model.state_dict()} - _names_in(folder / name, model))
        if missing:
            raise BaseModelError(
                f"{folder} lacks {len(missing)} tensors of its {name}, first {missing[0]}. Get the file again."
            )
        if name.startswith("text_encoder"):
            _check_taken_over(folder / name, model)
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and tokenizer is not None:
            _check_together(folder, name, tokenizer, model.config)


def _check_together(folder: Path, name: str, tokenizer: Any, encoder: Any) -> None:
    last, words = max(tokenizer.get_vocab().values()), encoder.vocab_size
    longest, positions = tokenizer.model_max_length, encoder.max_position_embeddings
    if last >= words or not isinstance(longest, int) or longest > positions:
        raise BaseModelError(
            f"{folder}: its tokenizer has words up to number {last} and texts of up to {str(longest)[:40]} of them, its "
            f"{name} {words} words and {positions} places. They are not of one model; get the base again."
        )


def _check_taken_over(folder: Path, model: Any) -> None:
    """Refuse a text encoder without the numbers of its safetensors files: some transformers know none of their names.

    The first row of each tensor is looked at; of several variants it may be any one's.
    """
    own = {_plain(key): tensor for key, tensor in model.state_dict().items()}
    taken: dict[str, bool] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensor = own.get(_plain(key))
                if tensor is not None and tensor.is_floating_point() and not tensor.is_meta:
                    row = opened.get_slice(key)[:1].to(tensor)
                    taken[key] = taken.get(key, False) or row.equal(tensor[:1]) or bool(row.isnan().any())
    lost = [key for key, found in taken.items() if not found]
    if lost:
        raise BaseModelError(
            f"{folder} has {len(lost)} tensors that transformers {version('transformers')} did not take over, first "
            f"{lost[0]}. Install a version of it that tav-peft allows: pip install -U tav-peft."
        )


def _names_in(folder: Path, model: Any) -> set[str]:
    """Name the tensors in a part's safetensors files; those of pickles are not looked at, and taken for whole."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= {_plain(key) for key in opened.keys()}  # noqa: SIM118
    return names or {_plain(key) for key in model.state_dict()}


def _plain(name: str) -> str:
    return name.removeprefix("text_model.")  # which transformers 5 does without


def _reason(folder: Path, present: Mapping[str, str], given: Container[str]) -> str | None:
    """Say why a pipeline with these parts is no base, or None."""
    if "unet" not in present and "unet" not in given:
        return (
            "a model without a UNet, such as Stable Diffusion 3 or Flux. Use Stable Diffusion 1.x, 2.x or XL."
        )
    if "text_encoder" not in present and "text_encoder_2" in present:
        return "the refiner of SDXL. Use the SDXL base model."
    for name, expected in _CLASSES.items():
        found = present.get(name, expected)
        if name not in given and found != expected:
            return f"a model whose {name} is of the class {found}, not {expected}. {unfit.PLAIN}"
    if "unet" in given:
        return None
    return unfit.reason_of_channels(read_config(folder / "unet" / "config.json").get("in_channels", 4))


def _check_tokenizer(folder: Path, name: str) -> None:
    # without files, transformers would make a tokenizer without words
    if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise BaseModelError(
            f"{folder} lacks its tokenizer: {name}/ has neither vocab.json nor tokenizer.json. {_LAYOUT}"
        )


def weight_files(folder: Path, part: str) -> dict[str | None, list[Path]]:
    """List a part's files of weights by variant, None for the plain ones; safetensors where there is a choice.

    Raises:
        BaseModelError: when there are none.

    """
    found: dict[str | None, list[Path]] = {}
    for suffix in (".bin", ".safetensors"):
        named = [(_WEIGHTS.fullmatch(file.name), file) for file in sorted((folder / part).glob(f"*{suffix}"))]
        variants = {match["variant"] for match, _ in named if match}
        found |= {v: [file for match, file in named if match and match["variant"] == v] for v in variants}
    if not found:
        raise BaseModelError(f"{folder} has no weights of its {part}: none in {part}/. {_LAYOUT}")
    return found


def _variant(found: Mapping[str, Mapping[str | None, list[Path]]]) -> str | None:
    """Choose fp16, or else the first there is, where a part has no plain weights."""
    variants = sorted(
        {variant for files in found.values() if None not in files for variant in files if variant},
        key=lambda variant: (variant != "fp16", variant),
    )
    return variants[0] if variants else None
