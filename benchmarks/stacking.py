"""One adapter with everything else that people put onto a base: a style LoRA, a learned word, a DreamBooth, a bake.

    python training/dreambooth.py work/dreambooth
    python training/personalise.py work/blueprint --kind lora
    python training/personalise.py work/robot --kind textual_inversion --lr 1e-2
    python benchmarks/stacking.py work docs/stacking.png

Draws one picture, and prints how far each edit's object is from the clip's path where the renderer knows its looks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from tav_peft.baking import bake
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED, PocketClip, sample
from tav_peft.pocket.motion import measure
from tav_peft.recipe import Recipe
from tav_peft.report import Shown, write_sheet
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip


def edit(
    pipe: TuneAVideoPipeline, clip: Clip, what: str, prompt: str, ideal: PocketClip | None = None
) -> Shown:
    """Invert the clip with all that is on, make one edit, and say how near to the path it is."""
    inversion = pipe.invert(clip, num_inference_steps=25)
    made = pipe(prompt, inversion=inversion, guidance_scale=4).clips[0]
    near = "" if ideal is None else f": {measure(made, ideal).median:.1f} px from the path"
    print(f"{what}: {prompt}{near}", flush=True)
    return Shown(f"{what}: {prompt}{near}", made)


def main() -> None:
    """Tune one adapter and show it in every company."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="where the trainings wrote")
    parser.add_argument("output", type=Path, help="the picture")
    options = parser.parse_args()
    truth, recipe = SHIPPED[0], Recipe.load("pocket").override(["training.steps=200"])
    clip = Clip.read(sample(truth.name), **recipe.clip.model_dump())
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    adapter = tune(pipe, clip, truth.caption, recipe)
    about = options.work / "dreambooth" / "dreambooth"
    sprite = Image.open(about / "subject.png").convert("RGBA")
    name = json.loads((about / "dreambooth.json").read_text())["name"]
    panda, subject = truth.edited(name="panda"), truth.edited(name=name, sprite=sprite)
    shown = [Shown(f"the clip {truth.name}", clip)]
    pipe.load_adapter(adapter, "clip")
    shown.append(edit(pipe, clip, "the adapter", panda.caption, panda))
    pipe.load_lora_weights(options.work / "blueprint", "style")
    shown.append(edit(pipe, clip, "with a style LoRA", f"{panda.caption}, zwx style"))
    pipe.set_adapters(["clip", "style"], [1.0, 0.5])
    shown.append(edit(pipe, clip, "the LoRA at 0.5", f"{panda.caption}, zwx style"))
    pipe.unload_adapter("style")
    pipe.load_textual_inversion(options.work / "robot" / "learned_embeds.safetensors")
    shown.append(edit(pipe, clip, "with a learned word", "a <zwx> is moving on the grass", subject))
    pipe.unload_adapter("clip")
    dreambooth = TuneAVideoPipeline.from_pretrained(options.work / "dreambooth")
    dreambooth.load_adapter(adapter, "clip")
    shown.append(edit(dreambooth, clip, "on a DreamBooth", subject.caption, subject))
    dreambooth.load_lora_weights(options.work / "blueprint", "style", 0.7)
    shown.append(
        edit(dreambooth, clip, "on the DreamBooth, the LoRA at 0.7", f"{subject.caption}, zwx style")
    )
    bake([adapter], TuneAVideoPipeline.from_pretrained("pocket"), options.work / "baked")
    baked = TuneAVideoPipeline.from_pretrained(options.work / "baked")
    shown.append(edit(baked, clip, "baked into pocket", panda.caption, panda))
    write_sheet(options.output, shown, scale=2)


if __name__ == "__main__":
    main()
