"""How long the tools take on a 150 MB adapter, beside copying its bytes.

    python benchmarks/adapter_files.py work/adapter-files benchmarks/results/adapter_files.csv

The adapter is made: the preset paper in the shapes of Stable Diffusion 1.5, in half precision. Its updates are random,
and in a second one random with singular values that fall off as 1/n; both stay in the folder. A row is the median
of several runs, with the files in the system's cache, on the machine that the table names. "file" is to read the file as
bytes, to write them and to wait for the disk, as our tools do, before each of the others; "memory" copies the bytes in
memory.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from torch import Tensor

from tav_peft.adapter import Adapter, BaseModelInfo, ClipInfo, Provenance, TemporalInit
from tav_peft.formats import FORMATS, importing, open_adapter
from tav_peft.presets import BLOCKS, PARTS, Subset
from tav_peft.tools.casting import cast_file
from tav_peft.tools.ranks import RankRule
from tav_peft.tools.resizing import resize_file
from tav_peft.unet import temporal_init
from tav_peft.unet.inflation import InflatedUNet, is_temporal

COLUMNS = (
    "operation", "seconds", "times_file", "times_memory", "mb_read", "mb_written", "runs", "machine",
)  # fmt: skip
ARCHITECTURE = {
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768,
    "transformer_layers_per_block": 1,
}  # fmt: skip


def shapes() -> dict[str, torch.Size]:
    """Give the parameters that the preset paper tunes on Stable Diffusion 1.5, by name."""
    with torch.device("meta"):
        unet = InflatedUNet(sample_size=64, cross_attention_dim=768)
    modules = Subset("paper").dense_modules([name for name, _ in unet.named_modules()])
    return {
        name: parameter.shape
        for module in modules
        for name, parameter in unet.get_submodule(module).named_parameters(prefix=module)
    }


def drawn(shape: torch.Size, generator: torch.Generator, *, decaying: bool) -> Tensor:
    """Draw an update: all of it at random, or with singular values that fall off about as 1/n."""
    if not decaying or len(shape) < 2:
        return torch.randn(shape, generator=generator) * 0.002
    U, V = (torch.randn(size, min(shape), generator=generator) / size**0.5 for size in shape)
    return 0.1 * U / torch.arange(1, min(shape) + 1) @ V.T


def write_adapter(path: Path, *, decaying: bool) -> Path:
    """Write an adapter of the preset paper, unless it is there."""
    if path.exists():
        return path
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in shapes().items():
        update = drawn(shape, generator, decaying=decaying)
        if is_temporal(name):
            tensors[name] = (temporal_init.initial(name, shape, 0) + update).half()
        else:
            tensors[name.replace(".weight", ".diff")] = update.half()
    provenance = Provenance(
        caption="a man is skiing",
        base=BaseModelInfo(name="random", fingerprint="0" * 64, architecture=ARCHITECTURE),
        clip=ClipInfo(name="", fingerprint="", frames=8, height=512, width=512, fps=8.0, indices=()),
        temporal_init=TemporalInit(name=temporal_init.NAME, seed=0, fingerprint=""),
        subset={"preset": "paper", "parts": list(PARTS), "blocks": list(BLOCKS)}, step=0, recipe={}, versions={},
    )  # fmt: skip
    return Adapter(tensors, None, provenance).save(path)


def copy(source: Path, to: Path) -> None:
    """Read a file as bytes, write them, and wait for the disk, as our tools do."""
    data = source.read_bytes()
    with to.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def operations(folder: Path) -> dict[str, tuple[Callable[[], object], Path, Path]]:
    """Give what is measured by name, each with the file that it reads and what it writes."""
    paper, decaying = (
        write_adapter(folder / f"{name}.safetensors", decaying=name == "decaying")
        for name in ("random", "decaying")
    )
    out, data = folder / "out.safetensors", paper.read_bytes()
    found: dict[str, tuple[Callable[[], object], Path, Path]] = {
        "file": (lambda: copy(paper, out), paper, out),
        "memory": (lambda: bytearray(data), paper, out),
    }
    for name, form in FORMATS.items():
        exported = folder / (name if name == "peft" else f"{name}.safetensors")
        found[f"export to {name}"] = (
            lambda form=form, to=exported: form.write(open_adapter(paper), to),
            paper,
            exported,
        )
        found[f"import from {name}"] = (
            lambda of=exported: importing.read(of).adapter.save(out),
            exported,
            out,
        )
    found |= {
        "cast to bf16": (lambda: cast_file(paper, "bf16", output=out), paper, out),
        "cast to fp32": (lambda: cast_file(paper, "fp32", output=out), paper, out),
        "resize to rank 4, random updates": (lambda: resize_file(paper, RankRule(4), output=out), paper, out),
        "resize to rank 4, decaying updates": (lambda: resize_file(decaying, RankRule(4), output=out), decaying, out),
        "resize its rank 4 to 2": (
            lambda: resize_file(folder / "rank4.safetensors", RankRule(2), output=out), folder / "rank4.safetensors", out
        ),
    }  # fmt: skip
    resize_file(paper, RankRule(4), output=folder / "rank4.safetensors")
    return found


def clear(path: Path) -> None:
    """Remove what an operation is to write, and let the disk finish, so that no operation pays for another."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.sync()


def size(path: Path) -> float:
    """Give the megabytes of a file, or of a folder's files."""
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files) / 1e6


def main() -> None:
    """Measure every operation in turns, and write and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the adapters are made")
    parser.add_argument("output", type=Path, help="the table, a CSV file")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    todo = operations(options.folder)
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    sizes: dict[str, tuple[float, float]] = {}
    # in turns, so that what else the machine does falls on all alike; the first turn warms up
    for turn in range(options.runs + 1):
        for name, (run, source, to) in todo.items():
            clear(to)
            for each, timed in (
                ("file", todo["file"][0]),
                (name, run),
            ):  # a copy before each, in the same state
                began = time.perf_counter()
                timed()
                if turn:
                    seconds[each].append(time.perf_counter() - began)
            sizes[name] = size(source), size(to) if to.exists() else 0.0
    median = {name: statistics.median(each) for name, each in seconds.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name, took in median.items():
            ratios = (round(took / median[copied], 2) for copied in ("file", "memory"))
            row = (
                name,
                round(took, 3),
                *ratios,
                *(round(mb, 1) for mb in sizes[name]),
                options.runs,
                machine(),
            )
            table.writerow(row)
            print(*row[:7], sep="  ", flush=True)


if __name__ == "__main__":
    main()
