"""What a tuning leaves beside its adapter: the trail of earlier adapters, the state to resume from, the loss plot."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_peft.adapter import StepProbe
from tav_peft.errors import AdapterError, TuningError
from tav_peft.tensor_file import check_hashes, read_tensors, write_tensors
from tav_peft.whole import whole


@dataclasses.dataclass(frozen=True)
class Trail:
    """Places beside an adapter file `name.safetensors`: `name.trail/` and `name.loss.png`."""

    output: Path

    @property
    def folder(self) -> Path:
        """Folder of the earlier adapters and of the state to resume from."""
        return self.output.with_name(self.output.stem + ".trail")

    @property
    def state(self) -> Path:
        """File to resume from; it is there only while a tuning is unfinished."""
        return self.folder / "resume.safetensors"

    @property
    def lock(self) -> Path:
        """File that a running tuning holds a lock on."""
        return self.output.with_name(f".{self.output.stem}.lock")

    @property
    def plot(self) -> Path:
        """Picture of the loss."""
        return self.output.with_name(self.output.stem + ".loss.png")

    def at_step(self, step: int) -> Path:
        """File of the adapter as it was after a step."""
        return self.folder / f"step-{step:05d}.safetensors"

    def save_state(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Write everything the next step depends on; no pickle. `key` is the hash of the settings."""
        write_tensors(self.state, state, {"key": key}, hashed=True)

    def load_state(self, key: str) -> dict[str, Tensor] | None:
        """Read the saved state; None where there is none.

        Raises:
            TuningError: when the state belongs to other settings, or is damaged.

        """
        if not self.state.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.state)
            check_hashes(tensors, metadata, self.state.name)
        except AdapterError as error:
            raise self.refusal(str(error)) from None
        if metadata.get("key") != key:
            raise TuningError(
                f"{self.folder} holds an unfinished tuning with other settings (recipe, caption, clip or base). "
                "Finish it with its own settings, choose another output, or start over with --restart."
            )
        return tensors

    def refusal(self, reason: str) -> TuningError:
        """Say that the saved state cannot be gone on from, and what else there is."""
        return TuningError(
            f"{self.state} cannot be gone on from: {reason.rstrip('.')}. Start over with --restart."
        )

    def kept(self) -> str:
        """Say which earlier adapter is the last one there, as the end of a message."""
        files = sorted(self.folder.glob("step-*.safetensors"))
        return f" The adapter of before is kept: {files[-1]}." if files else ""

    def clear_state(self) -> None:
        """Remove the state to resume from."""
        self.state.unlink(missing_ok=True)


def settings_key(**settings: Any) -> str:
    """Hash the settings that a resumed tuning must share with the one it goes on with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def plot_losses(losses: Sequence[float], path: Path, probes: Sequence[StepProbe] = ()) -> None:
    """Draw the loss of each step and its running mean, and below them what early stopping saw."""
    from matplotlib.figure import Figure

    values = torch.tensor(losses)
    window = max(1, min(25, len(losses) // 4))
    mean: Tensor = values.unfold(0, window, 1).mean(dim=1)
    figure = Figure(figsize=(7, 6 if probes else 3.5), layout="constrained")
    axes, *below = figure.subplots(1 + bool(probes), sharex=True, squeeze=False)[:, 0]
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db4c8", linewidth=0.8, label="each step")
    axes.plot(
        range(window, len(losses) + 1),
        mean.tolist(),
        color="#c2452d",
        linewidth=1.8,
        label=f"mean of {window}",
    )
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for panel in below:
        _plot_probes(panel, probes)
    with whole(path, TuningError) as part:
        figure.savefig(part, format="png", dpi=130)


def _plot_probes(axes: Any, probes: Sequence[StepProbe]) -> None:
    steps = [probe.step for probe in probes]
    for name, colour, label in (
        ("reconstruction", "#c2452d", "error about the clip"),
        ("response", "#2d6cc2", "what another prompt changes"),
    ):
        values = [getattr(probe, name) for probe in probes]
        axes.plot(steps, values, color=colour, marker="o", markersize=3, label=label)
    kept = max(probes, key=lambda probe: probe.gain)
    axes.axvline(kept.step, color="#555555", linewidth=1, linestyle=":", label=f"kept: step {kept.step}")
    axes.set(xlabel="step", ylabel="share of the base's", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
