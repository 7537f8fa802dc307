"""Files of 150 MB in less memory than they take: each tool reads, makes and writes one update at a time."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,  # each run reads and makes 75 million numbers
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "adapter_files.py"
PEAK = """
import json, sys
import torch
from tav_peft.tools.casting import cast_file
from tav_peft.tools.comparing import compare
from tav_peft.tools.ranks import RankRule
from tav_peft.tools.resizing import resize_file
from tav_peft.tools.spectra import measure

def megabytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1000

# what the first call of the linear algebra takes once and for all is none of an adapter's
torch.linalg.svd(torch.randn(64, 64)), torch.linalg.eigh(torch.eye(64))
one, other, out, call = sys.argv[1:]
before = megabytes("VmRSS")
eval(call)
print(json.dumps({"above": megabytes("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two adapters of the preset paper in Stable Diffusion 1.5's shapes, 149 MB each; the benchmark makes them."""
    write, folder = runpy.run_path(str(BENCHMARK))["write_adapter"], tmp_path_factory.mktemp("large")
    return [write(folder / f"{n}.safetensors", decaying=bool(n)) for n in range(2)]


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ("cast_file(one, 'bf16', output=out)", 148.7),
        ("cast_file(one, 'fp32', output=out)", 297.4),
        ("resize_file(one, RankRule(4), output=out)", 99.6),
        ("resize_file(one, RankRule(4), output=out, preset='lite')", 1.2),
        ("resize_file(other, RankRule(64, energy=0.9), output=out, preset='lite')", 5),
        ("measure(other)", 0),
        ("compare(one, other)", 0),
    ],
)
def test_a_file_of_150_mb_is_worked_on_in_little_memory(call, written, large, tmp_path):
    assert all(148e6 < file.stat().st_size < 150e6 for file in large)
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-P", "-c", PEAK, *map(str, large), str(out), call]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    above = json.loads(done.stdout)["above"]
    size = out.stat().st_size / 1e6 if written else 0
    print(f"\n{call}: {above:.0f} MB above the library, {size:.1f} MB written")
    assert size == pytest.approx(written, abs=6)
    assert above < 100
