"""What the original left behind after a training: its pipeline, and the inverted latents of its validation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tav_peft.pipeline import TuneAVideoPipeline

from .comparing import Comparison, compare
from .recordings import Recording
from .training import drawn

RUN = "train_official"  # the run that the pipeline was saved after
# how many steps the validation inverted in is not recorded; what else was likely lies standard deviations away
LIKELY_STEPS = (*range(1, 13), 15, 20, 25, 50)


def weights(recording: Recording) -> dict[str, Tensor]:
    """The saved UNet's state dict."""
    return torch.load(
        recording.folder / "official_pipeline" / "unet" / "diffusion_pytorch_model.bin", weights_only=True
    )


def validation_inversion(recording: Recording, pipe: TuneAVideoPipeline) -> Iterator[Comparison]:
    """Invert the latents of the run's last step with a tuned pipeline, as the validation after that step did."""
    last = recording.run(RUN)["steps"]
    file = recording.folder / "official_pipeline" / "inv_latents" / f"ddim_latent-{last}.pt"
    theirs = torch.load(file, weights_only=True)
    latents = drawn(recording, RUN, "latents")[-1]
    tried = []
    for steps in LIKELY_STEPS:
        ours = pipe.invert(latents, num_inference_steps=steps).trajectory[-1:]
        tried.append(compare(recording, "inversion", f"{file.name}, {steps} steps", ours, theirs))
        if tried[-1].distance <= tried[-1].tolerance:
            break
    yield min(tried, key=lambda one: one.distance)
