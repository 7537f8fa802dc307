"""What each spatio-temporal attention costs as a clip gets longer: operations, exactly, and seconds, measured.

    OMP_NUM_THREADS=1 python benchmarks/attention_cost.py benchmarks/results/attention_cost

Writes a CSV and a log-log plot, and prints tables in Markdown. Operations are counted on tensors without values (two for
a multiply-add), of the scores and values of ST-Attn in the first transformer block and of a whole forward of the UNet.
Seconds are the best of up to three runs, of the whole ST-Attn module of that block with its projections, and for pocket
of a whole forward; CPU seconds, since other programs disturb them less.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from machine import operations
from matplotlib import pyplot
from sd15_size import UNET as SD15

from tav_peft.bases import locate
from tav_peft.recipe import ModelSection
from tav_peft.unet.attention import SEES, SpatioTemporalAttention
from tav_peft.unet.inflation import InflatedUNet, inflate

FRAMES = (2, 4, 8, 16, 32)
COLUMNS = ("base", "latents", "what", "variant", "frames", "operations", "cpu_seconds")
# of the scores: pairs of tokens for m frames, in units of N²
PAIRS = {"frame": "m", "sparse_causal": "2m", "causal": "m(m+1)/2", "full": "m²"}
COLOURS = {"frame": "#7a7a7a", "sparse_causal": "#0072b2", "causal": "#d55e00", "full": "#009e73"}


def seconds(call: Callable[[], object]) -> float:
    """Run a call up to three times, and give the least CPU seconds."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 20:
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def forward(unet: InflatedUNet, side: int, frames: int) -> Callable[[], object]:
    """Prepare a forward of one clip on the UNet's own device."""
    device = next(unet.parameters()).device
    latents = torch.randn(1, unet.config.in_channels, frames, side, side, device=device)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, device=device)
    return lambda: unet(latents, torch.tensor([500], device=device), text)


def first_st_attn(unet: InflatedUNet, side: int) -> tuple[SpatioTemporalAttention, int]:
    """Find the first ST-Attn of a UNet and how many positions a frame has there."""
    module = next(m for m in unet.modules() if isinstance(m, SpatioTemporalAttention))
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    forward(unet, side, 1)()
    handle.remove()
    return module, seen[0]


def rows(base: str, side: int, shape: InflatedUNet, real: InflatedUNet | None, block_timed: bool):
    """Yield the rows of one base and size: `shape` has no values; `real` is timed as a whole if it is given."""
    module, positions = first_st_attn(shape, side)
    timed = copy.deepcopy(module).to_empty(device="cpu")
    for parameter in timed.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for variant, see in SEES.items():
        for unet in filter(None, (shape, real, timed)):
            unet.frames.model = ModelSection(attention=variant)
        for frames in FRAMES:
            tokens = torch.empty(frames, positions, module.query_dim, device="meta")
            counted = operations(lambda see=see, x=tokens, m=frames: see(module, x, x, x, m))
            timed.frames.count = frames
            given = torch.randn(frames, positions, module.query_dim)
            took = seconds(lambda x=given: timed(x)) if block_timed else ""
            yield base, side, "st_attn", variant, frames, counted, took
            whole = operations(forward(shape, side, frames))
            took = seconds(forward(real, side, frames)) if real is not None else ""
            yield base, side, "unet", variant, frames, whole, took


def series(measured: list[dict], base: str, side: int, what: str, variant: str, key: str) -> list[float]:
    """Take one measure of one variant, in the order of the frames."""
    wanted = (base, side, what, variant)
    return [
        float(row[key])
        for row in measured
        if (row["base"], row["latents"], row["what"], row["variant"]) == wanted
    ]


def table(measured: list[dict], case: tuple[str, int, str], key: str, unit: float, digits: int) -> str:
    """Write one measure as a Markdown table: variants down, frames across, and the fitted exponent of m."""
    lines = [
        "| attention | pairs | " + " | ".join(f"m = {m}" for m in FRAMES) + " | grows as |",
        "|---" * (len(FRAMES) + 3) + "|",
    ]
    for variant in SEES:
        values = series(measured, *case, variant, key)
        power = np.polyfit(np.log(FRAMES), np.log(values), 1)[0]
        cells = " | ".join(f"{value / unit:.{digits}f}" for value in values)
        lines.append(f"| {variant} | {PAIRS[variant]} | {cells} | m^{power:.2f} |")
    return "\n".join(lines)


def plot(measured: list[dict], path: Path) -> None:
    """Draw operations and seconds of ST-Attn, and operations of the whole forward, against frames."""
    panels = (
        (
            ("sd15", 64, "st_attn"),
            "operations",
            "scores and values of ST-Attn,\nfirst block of SD 1.5, 64x64",
        ),
        (("sd15", 32, "st_attn"), "cpu_seconds", "the whole ST-Attn module,\nfirst block of SD 1.5, 32x32"),
        (("sd15", 64, "unet"), "operations", "a forward of SD 1.5's UNet,\n64x64"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    for axis, (case, key, title) in zip(axes, panels, strict=True):
        for variant in SEES:
            values = series(measured, *case, variant, key)
            axis.loglog(FRAMES, values, "o-", color=COLOURS[variant], label=variant.replace("_", "-"))
        axis.set(title=title, xlabel="frames m", ylabel=key.replace("_", " ").replace("cpu", "CPU"))
        axis.set_xticks(FRAMES, [str(m) for m in FRAMES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure pocket and SD 1.5, write the CSV and the plot, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="path of both files, without an ending")
    options = parser.parse_args()
    torch.manual_seed(0)
    pocket = inflate(UNet2DConditionModel.from_pretrained(locate("pocket"), subfolder="unet")).eval()
    with torch.device("meta"):
        small = InflatedUNet.from_config(pocket.config).eval()
        large = InflatedUNet.from_config(SD15).eval()
    cases = (
        ("pocket", 16, small, pocket, True),
        ("sd15", 64, large, None, False),
        ("sd15", 32, large, None, True),
    )
    measured = []
    file = options.output.with_suffix(".csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), file.open("w", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS)
        writer.writeheader()
        for case in cases:
            for values in rows(*case):
                row = dict(zip(COLUMNS, values, strict=True))
                row["cpu_seconds"] = row["cpu_seconds"] and f"{row['cpu_seconds']:.4g}"
                measured.append(row)
                writer.writerow(row)
                target.flush()
    for case, key, unit, digits, title in (
        (("sd15", 64, "st_attn"), "operations", 1e9, 1, "scores and values of ST-Attn, 10⁹ operations"),
        (("sd15", 64, "unet"), "operations", 1e12, 1, "a forward of the UNet, 10¹² operations"),
        (("sd15", 32, "st_attn"), "cpu_seconds", 1, 2, "the whole ST-Attn module, CPU seconds"),
        (("pocket", 16, "st_attn"), "cpu_seconds", 1, 4, "the whole ST-Attn module, CPU seconds"),
        (("pocket", 16, "unet"), "cpu_seconds", 1, 2, "a forward of the UNet, CPU seconds"),
    ):
        base, side, _ = case
        print(f"\n{base}, latents {side}x{side}: {title}\n\n{table(measured, case, key, unit, digits)}")
    plot(measured, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
