"""Assemble pocket's trained parts into the diffusers folder that the package ships, in half precision.

python training/assemble.py work/unet --vae work/vae/vae
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

from train_unet import SCHEDULER, Denoiser, make_tokenizer

MODEL = Path(__file__).parent.parent / "tav_peft" / "pocket" / "model"


def main() -> None:
    """Write tav_peft/pocket/model from the averaged weights of the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=MODEL)
    options = parser.parse_args()
    state = torch.load(options.folder / "checkpoint.pt", weights_only=True)
    shutil.rmtree(options.output, ignore_errors=True)
    tokenizer = make_tokenizer(options.output / "tokenizer")
    model = Denoiser(tokenizer)
    model.load_state_dict({**state["module"], **state["average"]})
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(options.vae),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(options.output)
    config = (
        options.output / "text_encoder" / "config.json"
    )  # else transformers 5 computes in half precision too
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    vae_config = options.output / "vae" / "config.json"  # diffusers notes the folder it came from
    settings = json.loads(vae_config.read_text())
    settings.pop("_name_or_path", None)
    vae_config.write_text(json.dumps(settings, indent=2) + "\n")
    make_tokenizer(options.output / "tokenizer")  # with vocab.json and merges.txt, which older versions read
    size = sum(f.stat().st_size for f in options.output.rglob("*") if f.is_file())
    print(f"{options.output}: {state['step']} steps, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
