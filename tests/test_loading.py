"""Loading an adapter reads its file once, and makes no copy of it."""

import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from tav_peft import formats, tensor_file
from tav_peft.formats import peft

RESET = Path("/proc/self/clear_refs")


@pytest.fixture
def fetched(monkeypatch):
    """Count which tensors are taken out of which safetensors file, and how often one is opened."""
    counts = Counter()

    class Counting:
        def __init__(self, path, framework):
            self._file = safe_open(path, framework=framework)
            counts[Path(path).name] += 1

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *failure):
            return self._file.__exit__(*failure)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def get_tensor(self, name):
            counts[name] += 1
            return self._file.get_tensor(name)

    monkeypatch.setattr(tensor_file, "safe_open", Counting)
    return counts


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_each_tensor_of_a_file_is_read_once(preset, pipe, make_adapter, fetched, tmp_path):
    path = make_adapter(preset).save(tmp_path / "motion.safetensors")
    pipe.load_adapter(path)
    assert fetched == Counter([path.name, *make_adapter(preset).tensors])


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_each_tensor_of_an_exported_folder_is_read_once(preset, make_adapter, fetched, tmp_path):
    formats.read(peft.write(make_adapter(preset), tmp_path / "folder"))
    assert len(fetched) > 1
    assert set(fetched.values()) == {1}


SCRIPT = """
    import json, re, sys
    from pathlib import Path

    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from tav_peft.unet import temporal_init
    from tav_peft.adapter import Adapter, BaseModelInfo, ClipInfo, Provenance, TemporalInit
    from tav_peft.unet.auditing import temporal_fingerprint
    from tav_peft.bases import architecture
    from tav_peft.pipeline import TuneAVideoPipeline
    from tav_peft.presets import Subset
    from tav_peft.recipe import Recipe

    def number(file, key):
        return int(re.search(key + r":\\s+(\\d+)", Path(file).read_text())[1])

    def measured(action):
        # writing 5 sets the peak back to what is in use now
        Path("/proc/self/clear_refs").write_text("5")
        memory, read = number("/proc/self/status", "VmRSS"), number("/proc/self/io", "rchar")
        result = action()
        peak = number("/proc/self/status", "VmHWM") - memory
        return result, {"peak": peak * 1024, "read": number("/proc/self/io", "rchar") - read}

    # diffusers' default UNet is Stable Diffusion 1's but for the text width; its pages are never written here
    with torch.device("meta"):
        flat = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half()
    vae = AutoencoderKL(norm_num_groups=1, block_out_channels=(1,))
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": DDIMScheduler()}
    pipe = TuneAVideoPipeline(vae=vae, unet=flat.to_empty(device="cpu"), **parts)
    unet, subset = pipe.unet, Subset("paper")

    random, tensors = torch.rand(1280 * 1280).half(), {}
    for module in subset.dense_modules([name for name, _ in unet.named_modules()]):
        for kind, parameter in unet.get_submodule(module).named_parameters():
            name = f"{module}.{kind if 'attn_temp' in module else 'diff'}"
            tensors[name] = random[: parameter.numel()].view(parameter.shape)
    seed = temporal_init.DEFAULT_SEED
    provenance = Provenance(
        caption="", base=BaseModelInfo(name="", fingerprint=pipe.base_fingerprint, architecture=architecture(unet)),
        clip=ClipInfo(name="", fingerprint="", frames=8, height=512, width=512, fps=8.0, indices=()),
        temporal_init=TemporalInit(
            name=temporal_init.NAME, seed=seed, fingerprint=temporal_fingerprint(unet, seed)
        ),
        subset={"preset": subset.preset, "parts": subset.parts, "blocks": subset.blocks},
        step=0, recipe=Recipe().model_dump(mode="json"), versions={},
    )
    path = Adapter(tensors, None, provenance).save(sys.argv[1])

    adapter, reading = measured(lambda: Adapter.load(path))
    del adapter
    _, loading = measured(lambda: pipe.load_adapter(path))
    updates = sum(2 * tensor.numel() for name, tensor in tensors.items() if name.endswith(".diff"))
    print(json.dumps({"file": path.stat().st_size, "updates": updates, "reading": reading, "loading": loading}))
"""


@pytest.mark.skipif(not RESET.exists(), reason="peak memory is measured by Linux's /proc/self/clear_refs")
def test_an_adapter_of_the_papers_size_is_loaded_without_a_copy_of_it(tmp_path):
    command = [sys.executable, "-P", "-c", textwrap.dedent(SCRIPT), str(tmp_path / "paper.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    print(told)
    assert 148e6 < told["file"] < 149e6
    # the file's pages count as memory while they are mapped; none is read() into a buffer of its own
    assert told["reading"]["peak"] < 1.2 * told["file"]
    assert told["reading"]["read"] < 0.01 * told["file"]
    # on the UNet there are besides, the query projections with their updates, since the base's are kept
    # and what the allocator and PEFT's first use take, some 30 MB; a copy of the file would be 149 MB more
    assert told["loading"]["peak"] < 1.5 * told["file"] + told["updates"]
