"""`tav edit`: the tuned clip again, once for each prompt."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Option

from tav_peft.cli import console, memory, options, steering
from tav_peft.cli.outputs import edit_files, write_edit

if TYPE_CHECKING:
    from tav_peft.adapter import Adapter
    from tav_peft.control.steering import Control
    from tav_peft.inversion import Inversion
    from tav_peft.pipeline import TuneAVideoPipeline
    from tav_peft.recipe import EditingSection
    from tav_peft.video.clip import Clip


_FROM_NOISE = {"depth": 1.0, "inject_attention": 0.0, "inject_features": 0.0}


def command(  # noqa: PLR0913  (a parameter is an option)
    adapter: options.AdapterFile,
    *,
    prompt: Annotated[list[str] | None, Option(help="What to show; repeatable.")] = None,
    prompts: steering.PromptsFile = None,
    clip: options.SourceClip = None,
    base: options.Base = None,
    prediction_type: options.PredictionType = None,
    guidance: Annotated[float | None, Option(help="How strongly the prompt pulls, from 1.")] = None,
    guidance_interval: steering.GuidanceInterval = None,
    reuse_features: steering.ReuseFeatures = None,
    merge_tokens: steering.MergeTokens = None,
    steps: options.SamplingSteps = None,
    depth: Annotated[float | None, Option(help="How far to invert; 1 is all the way.")] = None,
    negative_prompt: Annotated[str | None, Option(help="What not to show.")] = None,
    strength: options.Strength = None,
    lora: Annotated[
        list[str] | None, Option(help="An ordinary LoRA beside the adapter: FILE, or FILE=0.7; repeatable.")
    ] = None,
    textual_inversion: Annotated[
        list[Path] | None, Option(help="A word that was learned for the base; repeatable.")
    ] = None,
    control: steering.Controls = None,
    controlnet: steering.Networks = None,
    control_inversion: steering.ControlInversion = False,
    mask: steering.MaskFile = None,
    mask_word: steering.MaskWord = None,
    inject_attention: steering.InjectAttention = None,
    inject_features: steering.InjectFeatures = None,
    window: Annotated[
        int | None, Option(min=3, help="Frames that the UNet sees at a time; longer clips go in windows.")
    ] = None,
    overlap: Annotated[int | None, Option(min=1, help="Frames that neighbouring windows share.")] = None,
    batch: Annotated[int, Option(min=1, help="How many prompts are sampled at a time.")] = 1,
    inversion: Annotated[
        Path | None, Option(help="What tav invert wrote for this clip and adapter; not given: invert now.")
    ] = None,
    no_inversion: Annotated[
        bool, Option("--no-inversion", help="Start from noise, not from the clip.")
    ] = False,
    no_cache: Annotated[
        bool, Option("--no-cache", help="Neither take the inversion from the cache nor keep it there.")
    ] = False,
    seed: Annotated[int | None, Option(min=0, help="Of the noise, with --no-inversion.")] = None,
    device: options.Device = None,
    precision: options.Precision = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    ignore_memory: options.IgnoreMemory = False,
    as_json: options.AsJson = False,
) -> None:
    """Edit the clip an adapter was tuned on; what is not given is as the adapter's recipe has it."""
    from tav_peft import formats
    from tav_peft.injection import injection_of
    from tav_peft.inversion import Inversion
    from tav_peft.sources import clip_nearby, source_of
    from tav_peft.video.clip import Clip

    _check_start(no_inversion, inversion, seed, depth)
    _check_mask(mask, mask_word, no_inversion)
    steering.check_pairs(control, controlnet, control_inversion)
    injected = {"inject_attention": inject_attention, "inject_features": inject_features}
    steering.check_injection(injected, no_inversion, reuse_features, merge_tokens)
    tuned, began = formats.read(adapter), perf_counter()
    wanted = steering.all_prompts(prompt, prompts, tuned.provenance.recipe.get("edits", ()))
    given = {
        "guidance_scale": guidance, "num_inference_steps": steps, "depth": depth, "window": window, "overlap": overlap,
        "guidance_interval": steering.read_interval(guidance_interval), "reuse_features": reuse_features,
        "merge_tokens": merge_tokens, "strength": strength, "negative_prompt": negative_prompt,
    }  # fmt: skip
    files = edit_files(wanted, output or Path(f"{adapter.stem}-edits"), overwrite)
    recorded = tuned.provenance.clip
    kept = Inversion.load(inversion) if inversion else None
    how = _settled(tuned, given, kept, _FROM_NOISE if no_inversion else injected)
    needed = bool(clip) or not (kept or (no_inversion and not control))
    source: Any = source_of(tuned, adapter, clip) if needed else recorded
    on = base or tuned.provenance.base.name
    if not ignore_memory:
        memory.before_editing(
            on, tuned, how, prompts=len(wanted), batch=batch, device=device, precision=precision
        )
    pipe = options.open_base(on, device, precision, prediction_type=prediction_type)
    _load(pipe, tuned, how.strength, lora or [], textual_inversion or [])
    start: dict[str, Any] = {"fps": recorded.fps}
    start["like"] = source if isinstance(source, Clip) else kept and clip_nearby(tuned, adapter)  # its sound
    start["controls"] = _controls(pipe, control, controlnet, source if kept is None else kept.clean)
    on_inversion = start["controls"] if control_inversion else []
    _check_word(pipe, tuned, mask_word)  # before anything is inverted
    cached, chosen = False, no_inversion or depth is not None or guidance is not None
    hows = [
        how if chosen else how.suited(tuned.provenance.caption, words).replace(**injected) for words in wanted
    ]
    if no_inversion:
        start["latents"] = pipe.noise(source if isinstance(source, Clip) else recorded, seed or 0)
    elif kept:
        kept.check_made_with(pipe.inverted_with(on_inversion) | {"clip": source.fingerprint})
        start["inversion"] = kept
    else:
        deepest = max(hows, key=lambda own: own.depth)
        start["inversion"], cached = _invert(pipe, source, deepest.inverting, on_inversion, not no_cache)
    if mask or mask_word:
        start["mask"] = _mask(pipe, mask, mask_word, source, start["inversion"], tuned.provenance.caption)
    with console.progress_bar("editing") as moved:
        arguments = [own.sampling | {"injection": injection_of(own)} for own in hows]
        clips = _edited(pipe, wanted, arguments, start | {"batch_size": batch, "progress": moved})
    settings = {
        "strength": how.strength, "lora": lora, "textual_inversion": textual_inversion, "control": control,
        "controlnet": controlnet, "control_inversion": control_inversion, "mask": mask, "mask_word": mask_word,
        "seed": (seed or 0) if no_inversion else None, "precision": precision,
    }  # fmt: skip
    edits = [
        write_edit(clip, words, file, _in_words(own) | settings)
        for clip, words, file, own in zip(clips, wanted, files, arguments, strict=True)
    ]
    details = {
        **_in_words(how.sampling | {"injection": injection_of(how)}), **settings,
        "inversion": _told(start.get("inversion")), "from_cache": cached, "seconds": round(perf_counter() - began, 1),
    }  # fmt: skip
    console.report(files, {"edits": edits, **details}, as_json)


def _settled(
    tuned: "Adapter", given: dict[str, Any], kept: "Inversion | None", more: dict[str, Any]
) -> "EditingSection":
    """Give the adapter's own settings with what is given in their place, and a kept inversion's steps."""
    from tav_peft.recipe import EditingSection

    own = EditingSection().replace(**tuned.provenance.editing)
    if kept is not None:
        own = own.replace(num_inference_steps=kept.num_inference_steps)
    return own.replace(**given).replace(**more)


def _load(
    pipe: "TuneAVideoPipeline", tuned: "Adapter", strength: float, loras: list[str], words: list[Path]
) -> None:
    """Load the adapter, and ordinary LoRAs and learned words beside it."""
    pipe.load_adapter(tuned, strength=strength)
    for number, given in enumerate(loras):
        pipe.load_lora_weights(*_file_and_name(given, number))
    for word in words:
        pipe.load_textual_inversion(word)


def _controls(
    pipe: "TuneAVideoPipeline", controls: list[str] | None, networks: list[str] | None, source: Any
) -> "list[Control]":
    """Load the networks, and make their maps of the source, a clip or its latents."""
    from tav_peft.video.clip import Clip

    if not controls:
        return []
    seen = source if isinstance(source, Clip) else pipe.decode_latents(source)[0]
    return steering.read_controls(controls, networks, seen, pipe.unet.dtype)


def _edited(
    pipe: "TuneAVideoPipeline", prompts: list[str], hows: list[dict[str, Any]], start: dict[str, Any]
) -> "list[Clip]":
    """Sample the prompts, those with the same arguments together."""
    clips: dict[int, Clip] = {}
    for first, how in enumerate(hows):
        if first not in clips:
            own = [place for place, each in enumerate(hows) if each == how]
            made = pipe([prompts[place] for place in own], **start, **how).clips
            clips.update(zip(own, made, strict=True))
    return [clips[place] for place in range(len(prompts))]


def _in_words(arguments: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments of an edit as its record keeps them."""
    injection = arguments["injection"]
    return {name: value for name, value in arguments.items() if name != "injection"} | {
        "inject_attention": injection.attention if injection else 0.0,
        "inject_features": injection.features if injection else 0.0,
    }


def _invert(
    pipe: "TuneAVideoPipeline",
    source: Any,
    inverting: dict[str, Any],
    controls: "list[Control]",
    cached: bool,
) -> "tuple[Inversion, bool]":
    """Invert, or take the inversion from the cache."""
    from tav_peft.inversion_cache import InversionCache
    from tav_peft.invert_once import invert_once

    with console.progress_bar("inverting") as moved:
        if not cached:
            return pipe.invert(source, **inverting, controls=controls, progress=moved), False
        return invert_once(pipe, source, InversionCache(), controls=controls, progress=moved, **inverting)


def _mask(
    pipe: "TuneAVideoPipeline", file: Path | None, word: str | None, source: Any, inversion: "Inversion", caption: str
) -> Any:  # fmt: skip
    """Read a mask of the clip's frames and size, or find the word."""
    from tav_peft.cross_attention import attention_mask
    from tav_peft.video.companion import read_companion

    if file is None:
        return attention_mask(pipe, inversion, caption, word or "")
    clip = source if hasattr(source, "indices") else pipe.decode_latents(inversion.clean)[0]
    return read_companion(file, clip)


def _file_and_name(given: str, number: int) -> tuple[Path, str, float]:
    """Split FILE=0.7 into file, a name and the strength."""
    file, equals, strength = given.rpartition("=")
    try:
        return Path(file if equals else given), f"lora_{number}", float(strength) if equals else 1.0
    except ValueError:
        raise BadParameter(
            f"{strength!r} is no strength. Give FILE, or FILE=0.7.", param_hint="--lora"
        ) from None


def _told(inversion: "Inversion | None") -> dict[str, Any] | None:
    return {name: inversion.info.get(name) for name in ("method", "unet_passes")} if inversion else None


def _check_word(pipe: "TuneAVideoPipeline", tuned: "Adapter", word: str | None) -> None:
    from tav_peft.conditions import token_places

    if word:
        token_places(pipe.tokenizer, tuned.provenance.caption, word)


def _check_mask(mask: Path | None, word: str | None, no_inversion: bool) -> None:
    if mask and word:
        raise BadParameter("a mask and a word that makes one. Give one of the two.", param_hint="--mask")
    if no_inversion and (mask or word):
        raise BadParameter(
            "it keeps what the inversion has of the clip. Leave out --no-inversion.", param_hint="--mask"
        )


def _check_start(no_inversion: bool, inversion: Path | None, seed: int | None, depth: float | None) -> None:
    if no_inversion and inversion:
        raise BadParameter("a file to start from, and --no-inversion uses none.", param_hint="--inversion")
    if no_inversion and depth is not None:
        raise BadParameter("how far to invert, and --no-inversion inverts nothing.", param_hint="--depth")
    if seed is not None and not no_inversion:
        raise BadParameter("nothing is drawn after an inversion. Add --no-inversion.", param_hint="--seed")
