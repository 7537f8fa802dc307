"""Cut the part that this repository carries out of the complete recordings.

    python tests/original/carry.py ../shared/fixtures/official/sd1-tiny tests/recorded/sd1-tiny

What is left out proves nothing that the rest does not: a second set of T-Attn weights, inputs of modules that are the
outputs of others, latents that stand in a trajectory too, gradients and predictions of runs whose losses and weights
are here. The two runs of one seed were given the same latents, noise and first weights, which are kept once.
"""

import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

FILES = (
    "facts.json", "noise_floor.json", "train_nogc.json", "train_official.json", "checkpoint/model_index.json",
    "checkpoint/scheduler", "checkpoint/text_encoder", "checkpoint/tokenizer", "checkpoint/unet",
    "tattn_random.safetensors", "text.safetensors",
)  # fmt: skip
TENSORS = {
    "forward": r"latents|text|timestep|out_random|out_tattn_off|per_frame_2d_out|(b2|odd|f1)_(?!out_fresh).*",
    "trace": r"(attn1|attn2|attn_temp|ff|block|transformer|resnet|resnet_norm2)\.out",
    "inversion": "trajectory",
    "sampling": "latents_per_step|no_cfg_final_latents|noise_seed33|seed33_negative_final_latents",
    "train_nogc": "loss|grad_norm|final.*",
    "train_official": "loss|grad_norm|final.*",
}
DRAWN = ("train_nogc", "latents|noise|timesteps|text|init.*")


def main(source: Path, target: Path) -> None:
    """Copy whole files and chosen tensors; what else is in the target goes."""
    shutil.rmtree(target, ignore_errors=True)
    for name in FILES:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, target / name)
    for file, wanted in TENSORS.items():
        _cut(source / f"{file}.safetensors", target / f"{file}.safetensors", wanted)
    run, wanted = DRAWN
    _cut(source / f"{run}.safetensors", target / "train_draws.safetensors", wanted)


def _cut(source: Path, target: Path, wanted: str) -> None:
    tensors = {name: tensor for name, tensor in load_file(source).items() if re.fullmatch(wanted, name)}
    save_file(tensors, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
