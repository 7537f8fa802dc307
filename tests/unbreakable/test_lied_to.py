"""Files that lie: loaded equal or refused in one line that names the file; nothing hangs, crashes, writes or runs."""

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tav_peft.adapter import LATENTS, Adapter
from tav_peft.formats import kohya, peft
from tav_peft.inversion import Inversion
from tav_peft.recipe import shipped_text
from tav_peft.tensor_file import read_tensors
from tav_peft.trail import Trail
from tav_peft.video.clip import Clip

from . import lies


@pytest.fixture
def sources(tmp_path, base, pipe, clip, ldm, make_adapter, noise, square):
    """A valid file or folder of each kind."""
    folder = tmp_path / "sources"
    folder.mkdir()
    plain = make_adapter("lite", parts=("st_attn", "t_attn"), blocks=("mid",))
    plain.save(folder / "adapter.safetensors")
    preview = b"RIFF\x04\x00\x00\x00WEBP"
    carrying = {**plain.tensors, LATENTS: noise(1, 4, 3, 8, 8)}
    Adapter(carrying, plain.peft_config, plain.provenance, preview).save(folder / "bundle.safetensors")
    peft.write(make_adapter("hybrid", blocks=("mid",)), folder / "peft")
    kohya.write(plain, folder / "kohya.safetensors")
    foreign, _ = read_tensors(folder / "kohya.safetensors")
    save_file(foreign, folder / "foreign.safetensors", {"ss_network_dim": "2", "ss_network_alpha": "2"})
    save_file({"<robot>": noise(1, 32)}, folder / "words.safetensors")
    (folder / "recipe.yaml").write_text(shipped_text("man-skiing"))
    Inversion(noise(3, 4, 3, 8, 8), 2, {"clip": "c", "fps": 8.0}).save(folder / "inversion.safetensors")
    Trail(folder / "resume" / "a.safetensors").save_state(
        "key", {"losses": noise(5), "parameter/x": noise(4, 4)}
    )
    shutil.copyfile(square, folder / "clip.mp4")
    Clip.read(square).write(folder / "clip.gif")
    shutil.copytree(base, folder / "base")
    (folder / "pictures").mkdir()
    from PIL import Image

    for i, frame in enumerate(clip.pixels):
        Image.fromarray(frame).save(folder / "pictures" / f"{i}.png")
    _shard(base, folder / "sharded")
    tensors = ldm("sd1", base)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "single.safetensors")
    torch.save({"state_dict": tensors}, folder / "single.ckpt")
    state = pipe.unet.state_dict()
    torch.save(
        {n: t + 0.01 for n, t in state.items() if "to_q.weight" in n or "attn_temp" in n}, folder / "run.pth"
    )
    return folder


def _shard(base, folder):
    """The same base, its UNet in two files with an index."""
    from safetensors.torch import load_file

    shutil.copytree(base, folder)
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names, where = sorted(tensors), {}
    for number, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, folder / "unet" / file, {"format": "pt"})
        where |= dict.fromkeys(own, file)
    size = sum(t.numel() * 4 for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def run_lies(sources, cases, seed, *kinds):
    script = Path(lies.__file__)
    line = [sys.executable, "-P", str(script), str(sources), str(cases), str(seed), *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False, cwd=sources, env=environment)
    assert done.returncode == 0
    return [json.loads(text) for text in done.stdout.splitlines()]


def table(lines):
    counts = collections.defaultdict(collections.Counter)
    for line in lines:
        counts[line["kind"]][line["outcome"]] += 1
    outcomes = [*sorted(lies.RIGHT), *sorted({line["outcome"] for line in lines} - lies.RIGHT)]
    rows = [["kind", "cases", *outcomes]]
    rows += [[kind, str(sum(n.values())), *(str(n[each]) for each in outcomes)] for kind, n in counts.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_mutated_file_is_loaded_equal_or_refused_in_one_line(sources, cases):
    lines = run_lies(sources, cases, cases)
    print(f"\n{len(lines)} mutations\n{table(lines)}")
    assert len(lines) >= cases
    assert {line["kind"] for line in lines} == set(lies.KINDS)
    refused = collections.Counter(line["kind"] for line in lines if line["outcome"] == "refused")
    assert all(refused[kind] for kind in lies.HASHED)
    wrong = [line for line in lines if line["outcome"] not in lies.RIGHT]
    assert not wrong, "\n".join(str(line) for line in wrong[:20])
