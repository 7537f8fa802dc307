"""Merging files: what is written is what merging in memory gives, with few tensors in memory at a time."""

import json
import subprocess
import sys

import pytest
import torch

from tav_peft.adapter import LATENTS, Adapter, BaseModelInfo, ClipInfo, Provenance, TemporalInit
from tav_peft.errors import AdapterError
from tav_peft.formats import peft
from tav_peft.merging import merge, merge_files
from tav_peft.presets import BLOCKS, PARTS, Subset
from tav_peft.tensor_file import FileTensors
from tav_peft.unet import temporal_init
from tav_peft.unet.inflation import InflatedUNet, is_temporal


@pytest.fixture
def files(make_adapter, tmp_path):
    presets = ("paper", "lite")
    return [
        make_adapter(preset, seed=n).save(tmp_path / f"{preset}.safetensors")
        for n, preset in enumerate(presets)
    ]


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
def test_files_are_merged_as_adapters_in_memory_are(method, files, tmp_path):
    weights = [0.5, {"t_attn": 2.0}]
    streamed = tmp_path / "streamed.safetensors"
    told = merge_files(files, weights, method, output=streamed)
    merged, report = merge(files, weights, method)
    assert streamed.read_bytes() == merged.save(tmp_path / "whole.safetensors").read_bytes()
    assert told == report
    assert report.info.adapters[0].name == "paper.safetensors"


def test_a_peft_folder_is_merged_too(files, tmp_path):
    folder = peft.write(Adapter.load(files[1]), tmp_path / "folder")
    merged, _ = merge([files[0], folder], [0.5, 2.0])
    again, _ = merge(files, [0.5, 2.0])
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in merged.tensors.items())


def test_a_dry_run_reports_the_same_and_writes_nothing(files, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert merge_files(files, method="ties", output=None) == merge(files, method="ties")[1]
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_may_be_merged_over_itself(files):
    expected, _ = merge(files)
    merge_files(files, output=files[0])
    assert all(torch.equal(t, expected.tensors[name]) for name, t in Adapter.load(files[0]).tensors.items())


def test_each_parameter_is_made_once(files, tmp_path, monkeypatch):
    seen = []
    original = FileTensors.__getitem__
    monkeypatch.setattr(
        FileTensors, "__getitem__", lambda self, name: seen.append(name) or original(self, name)
    )
    done = []
    merge_files(files, output=tmp_path / "out.safetensors", progress=lambda *counts: done.append(counts))
    assert done == [(n, 49) for n in range(1, 50)]
    # once to check its values, once for its hash, and once to merge
    names = [name for name in seen if name != LATENTS]  # those are asked for and not there
    assert {name: names.count(name) for name in names} == dict.fromkeys(names, 3)


def test_a_damaged_tensor_leaves_nothing_behind(files, make_adapter, tmp_path):
    adapter = make_adapter("paper")
    name = next(iter(adapter.tensors))
    broken = Adapter({**adapter.tensors, name: adapter.tensors[name] * torch.nan}, None, adapter.provenance)
    broken.save(tmp_path / "broken.safetensors")
    with pytest.raises(AdapterError, match=rf"broken\.safetensors: {name} holds NaN"):
        merge_files([files[0], tmp_path / "broken.safetensors"], output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# -- memory ------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from tav_peft import merging, pipeline

def megabytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1000

one, other, out, settings = sys.argv[1:]
before = megabytes("VmRSS")
report = merging.merge_files([one, other], [0.7, 0.4], output=out, **json.loads(settings))
print(json.dumps({"above": megabytes("VmHWM") - before, "error": report.error}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two adapters of the preset paper in Stable Diffusion 1.5's shapes: 148.7 MB each, random, in half precision."""
    with torch.device("meta"):
        unet = InflatedUNet(sample_size=64, cross_attention_dim=768)
    names = Subset("paper").dense_modules([name for name, _ in unet.named_modules()])
    shapes = {
        name: p.shape
        for module in names
        for name, p in unet.get_submodule(module).named_parameters(prefix=module)
    }
    return [_write(tmp_path_factory.mktemp("large") / f"{n}.safetensors", shapes, n) for n in range(2)]


def _write(path, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        update = torch.randn(shape, generator=generator) * 0.002
        if is_temporal(name):
            tensors[name] = (temporal_init.initial(name, shape, 0) + update).half()
        else:
            tensors[name.replace(".weight", ".diff")] = update.half()
    clip = ClipInfo(name="", fingerprint="", frames=8, height=512, width=512, fps=8.0, indices=())
    init = TemporalInit(name=temporal_init.NAME, seed=0, fingerprint="")
    provenance = Provenance(
        caption="", base=BaseModelInfo(name="", fingerprint="", architecture={}), clip=clip, temporal_init=init,
        subset={"preset": "paper", "parts": list(PARTS), "blocks": list(BLOCKS)}, step=1, recipe={}, versions={},
    )  # fmt: skip
    return Adapter(tensors, None, provenance).save(path)


@pytest.mark.slow  # each merge reads, hashes, checks and writes 75 million numbers
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "settings", [{}, {"method": "dare_ties"}, {"t_attn": "concat"}, {"method": "svd", "rank": 16}], ids=str
)
def test_two_adapters_of_150_mb_are_merged_in_400_mb(settings, large, tmp_path):
    assert all(148e6 < file.stat().st_size < 150e6 for file in large)
    command = [
        sys.executable,
        "-P",
        "-c",
        PEAK,
        *map(str, large),
        str(tmp_path / "out"),
        json.dumps(settings),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    print(f"\n{settings}: {told['above']:.0f} MB above the interpreter, error {told['error']:.1e}")
    assert told["above"] < 400
    assert (tmp_path / "out").stat().st_size > 90e6
