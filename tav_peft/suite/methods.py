"""The rows of a suite's table: the paper's method, what it is compared with, and what it leaves out, each by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

from tav_peft.injection import Injection, injection_of
from tav_peft.inversion import Inversion, timestep_pairs
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import EditingSection, Precision
from tav_peft.shapes import Latents
from tav_peft.suite.temporal_start import TemporalStart
from tav_peft.video.clip import Clip

_FRAMEWISE = ("model.attention=frame", "model.group_norm=frame")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to edit: the recipe's settings that differ, what sampling starts from, and how deep and how guided.

    `depth` and `guidance` hold for a kind of edit, or for all of them ("all"); where they say nothing, the inversion is
    full, as in the paper, and the guidance the recipe's. The adapter acts at `strength`. `automatic` takes all this and
    what is injected as `tav edit` does: the recipe's, by what the prompt changes.
    `sampling` are further arguments of `pipe(prompt, …)`.
    Without `tuned` the base edits as it is, in the variant that the settings name. `drawn` makes nothing: it is the
    ideal edit of a pocket clip, which says what the scores can be at best. `step` takes the adapter that the trail of a
    longer tuning kept at that step, `temporal` is what T-Attn starts from. `few` is made on a few clips only, and
    `seeds` is with how many seeds it is made on those. The base edits with weights of `precision`, where that is not
    said as `tav edit` would.
    """

    title: str
    settings: tuple[str, ...] = ()
    start: Literal["inversion", "noise", "noised clip", "drawn"] = "inversion"
    tuned: bool = True
    depth: Mapping[str, float] = dataclasses.field(default_factory=dict)
    guidance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    injection: Injection | None = None
    strength: float = 1.0
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    step: int | None = None
    temporal: TemporalStart = "drawn"
    few: bool = False
    seeds: int = 1
    automatic: bool = False
    precision: Precision | None = None

    def strength_of(self, how: EditingSection) -> float:
        """Give the strength at which the adapter acts."""
        return how.strength if self.automatic else self.strength

    def of(
        self, kind: str, prompt: str, caption: str, how: EditingSection
    ) -> tuple[float, float, Injection | None]:
        """Give depth, guidance and what is injected for an edit of this kind."""
        if self.automatic:
            how = how.suited(caption, prompt)
            return how.depth, how.guidance_scale, injection_of(how)
        return (
            self.depth.get(kind, self.depth.get("all", 1.0)),
            self.guidance.get(kind, self.guidance.get("all", how.guidance_scale)),
            self.injection,
        )


def _lite(title: str, method: str, rank: int, rate: str, **how: Any) -> Method:
    """Give a row without dense weights, at the rate that `benchmarks/peft_learning_rates.py` found for the method."""
    lora = [] if method == "lora" else [f"adapter.method={method}"]
    settings = ("adapter.preset=lite", *lora, f"adapter.rank={rank}", f"training.lr={rate}")
    return Method(f"{title}, rank {rank}", settings, **how)


_BF16 = ("training.precision=bf16",)
_LONG = ("training.steps=600", "training.save_every=50")  # whose trail has the shorter ones
METHODS: dict[str, Method] = {
    "ideal": Method("the ideal edit, drawn", start="drawn", tuned=False),
    "full": Method("full method", seeds=3),
    "automatic": Method("full method, as tav edit chooses", automatic=True),
    "no_inversion": Method("without inversion", start="noise", seeds=3),
    "no_tuning": Method("without tuning", tuned=False),
    "no_tuning_injected": Method("feature injection without tuning", injection=Injection(), tuned=False),
    "no_st_attn": Method("without ST-Attn", ("model.attention=frame",), seeds=3),
    "per_frame": Method("image model frame by frame, same inversion", _FRAMEWISE, tuned=False),
    "sdedit_70": Method("SDEdit at 0.7", _FRAMEWISE, "noised clip", tuned=False, depth={"all": 0.7}),
    "lite_4": _lite("preset lite", "lora", 4, "1e-2"),
    "lite_4_automatic": _lite(
        "preset lite, as tav edit chooses", "lora", 4, "1e-2", automatic=True, few=True
    ),
    "sdedit_50": Method(
        "SDEdit at 0.5", _FRAMEWISE, "noised clip", tuned=False, depth={"all": 0.5}, few=True
    ),
    "sdedit_90": Method(
        "SDEdit at 0.9", _FRAMEWISE, "noised clip", tuned=False, depth={"all": 0.9}, few=True
    ),
    "plug_and_play": Method(
        "image model frame by frame with feature injection (Plug-and-Play)",
        _FRAMEWISE,
        tuned=False,
        injection=Injection(),
        few=True,
    ),
    "full_injected": Method("full method with feature injection", injection=Injection(), few=True),
    "half": Method("full method at half the strength", strength=0.5, few=True),
    "mid_up": Method("mid and up blocks only", ("adapter.blocks=[mid, up]",), few=True),
    "paper": Method("preset paper", ("adapter.preset=paper",), few=True),
    "lite_1": _lite("preset lite", "lora", 1, "1e-2", few=True),
    "lite_16": _lite("preset lite", "lora", 16, "3e-3", few=True),
    "lite_4_slow": _lite("preset lite, a tenth of the rate", "lora", 4, "1e-3", few=True),
    "rslora_4": _lite("rsLoRA", "rslora", 4, "1e-2", few=True),
    "lokr_1": _lite("LoKr", "lokr", 1, "1e-2", few=True),
    "loha_1": _lite("LoHa", "loha", 1, "1e-2", few=True),
    "miss_1": _lite("MiSS", "miss", 1, "1e-2", few=True),
    "vera_1": _lite("VeRA", "vera", 1, "3e-2", few=True),
    "fourierft_1": _lite("FourierFT", "fourierft", 1, "3e-2", few=True),
    "fourierft_4": _lite("FourierFT", "fourierft", 4, "3e-2", few=True),
    **{
        f"{method}_{rank}": Method(
            f"preset hybrid, {title}, rank {rank}",
            (f"adapter.method={method}", f"adapter.rank={rank}"),
            few=True,
        )
        for title, method, rank in (("DoRA", "dora", 4), ("OFT", "oft", 4), ("HRA", "hra", 2))
    },
    **{f"steps_{step}": Method(f"{step} steps", _LONG, step=step, few=True) for step in (50, 200, 400, 600)},
    "guidance_2": Method("guidance 2", guidance={"all": 2.0}, few=True),
    "guidance_7": Method("guidance 7", guidance={"all": 7.0}, few=True),
    "guided_to_60": Method(
        "guidance in the first 60 % of steps", sampling={"guidance_interval": (0.0, 0.6)}, few=True
    ),
    **{
        f"reuse_{every}": Method(
            f"deep features at every {word} step", sampling={"reuse_features": every}, few=True
        )
        for every, word in ((2, "second"), (3, "third"))
    },
    "merge_50": Method("half of the positions merged", sampling={"merge_tokens": 0.5}, few=True),
    "full_attention": Method("full attention between frames", ("model.attention=full",), few=True),
    "random_bias": Method("T-Attn with the original's random bias", temporal="random bias", few=True),
    "bf16_tuning": Method("tuned in bf16", _BF16, few=True),
    "bf16": Method("tuned and edited in bf16", _BF16, few=True, precision="bf16"),
    "copied": Method("T-Attn copied from self-attention", temporal="self-attention", few=True),
}
QUICK = ("ideal", "full", "automatic", "no_inversion", "no_tuning", "no_st_attn", "per_frame")


def start_of(
    method: Method, pipe: TuneAVideoPipeline, clip: Clip, *, steps: int, seed: int
) -> tuple[Inversion | None, Latents | None]:
    """Make what a method samples from: an inversion of the clip (or the clip noised as if inverted), or noise."""
    if method.start == "drawn":
        return None, None
    if method.start == "noise":
        return None, pipe.noise(clip, seed)
    if method.start == "inversion":
        return pipe.invert(clip, num_inference_steps=steps), None
    return noised(pipe, clip, steps=steps, seed=seed), None


def noised(pipe: TuneAVideoPipeline, clip: Clip, *, steps: int, seed: int) -> Inversion:
    """Noise a clip to each sampling timestep, with one noise for all, where SDEdit starts (Meng et al. 2022)."""
    clean, noise = pipe.encode_clip(clip).cpu(), pipe.noise(clip, seed)
    rows = [clean] + [
        alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
        for _, _, alpha in timestep_pairs(pipe.inversion_scheduler(), steps)
    ]
    return Inversion(torch.cat(rows), steps, {"method": "noised", "fps": clip.fps})
