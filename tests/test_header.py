"""The header alone: the same facts as of the whole file, without torch, and nothing told of a damaged one."""

import json
import subprocess
import sys

import pytest
import torch

from tav_peft.adapter import LATENTS, Adapter
from tav_peft.formats import peft
from tav_peft.header import read_header


@pytest.fixture
def file(make_adapter, tmp_path):
    return make_adapter("hybrid", dtype=torch.float16).save(tmp_path / "a.safetensors")


@pytest.mark.parametrize("preset", ["lite", "hybrid", "paper"])
def test_the_header_tells_what_the_whole_file_tells(preset, make_adapter, tmp_path):
    adapter = make_adapter(preset, parts=("st_attn", "t_attn"), dtype=torch.bfloat16)
    latents = {LATENTS: torch.zeros(1, 4, 3, 8, 8)}
    adapter = Adapter({**adapter.tensors, **latents}, adapter.peft_config, adapter.provenance)
    header = read_header(adapter.save(tmp_path / "a.safetensors"))
    assert header.summary() == adapter.summary()
    assert header.summary()["carries_latents"]
    assert header.provenance == adapter.provenance.model_dump(mode="json")


def test_what_is_no_whole_adapter_of_this_version_has_no_header(file, make_adapter, tmp_path):
    whole = file.read_bytes()
    damaged = {
        "cut": whole[:-1], "longer": whole + b"0", "short": whole[:100], "empty": b"", "text": b"not a header" * 20,
        "newer": whole.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'),
        "other": whole.replace(b'"peft_config"', b'"qeft_config"'),
        "name": whole.replace(b"attn1.to_q.lora_A", b"attn1.to_r.lora_A"),
    }  # fmt: skip
    assert read_header(file) is not None
    for name, content in damaged.items():
        assert content != whole, name
        (tmp_path / name).write_bytes(content)
        assert read_header(tmp_path / name) is None, name
    assert read_header(tmp_path / "nothing") is None
    assert read_header(peft.write(make_adapter(), tmp_path / "folder")) is None


def test_reading_it_imports_neither_torch_nor_peft(file):
    code = (
        "import sys; from pathlib import Path; from tav_peft.header import read_header; "
        "import json; told = read_header(Path(sys.argv[1])).summary(); "
        "print(json.dumps([told['preset'], *sorted({'torch', 'peft', 'diffusers'} & set(sys.modules))]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["hybrid"]
