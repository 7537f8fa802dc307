"""The model card of a published adapter: what it is, what it makes, and how it is used, in commands that run."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData

from tav_peft.adapter import Adapter
from tav_peft.bases import POCKET
from tav_peft.injection import injection_of
from tav_peft.recipe import EditingSection, Recipe
from tav_peft.sharing.address import size_text
from tav_peft.sharing.hub import NAME

TAGS = ("tune-a-video", "text-to-video", "video-editing", "lora", "tav-peft")
PICTURES = (".webp", ".gif", ".png", ".jpg", ".jpeg")  # those that move first
VIDEOS = (".mp4",)
PREVIEW = "the-clip.webp"  # the sample that shows what was tuned on
_SEED = 1  # of the noise of an edit without the clip
_EDIT = "edit.mp4"


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card is made of: an adapter, the name of its file, and what its publisher says.

    `base` is the base as a receiver finds it, `name` the repository on the hub, `samples` files by their paths in the
    folder.
    """

    adapter: Adapter
    file: str
    title: str
    base: str
    name: str | None = None
    license_id: str | None = None
    samples: tuple[str, ...] = ()

    def text(self) -> str:
        """Write the card; the same adapter and words give the same text."""
        sections = [
            f"# {_plain(self.title)}",
            "An adapter of [Tune-A-Video](https://arxiv.org/abs/2212.11565), tuned on one clip with tav-peft: it edits "
            "that clip by prompt.",
            *self._pictures(),
            _table(dict(self._facts())),
            "## Use",
            *self._usage(),
            "## What is in here",
            *self._contents(),
        ]
        return f"---\n{self._front_matter()}\n---\n\n" + "\n\n".join(sections) + "\n"

    # -- what hubs read ------------------------------------------------------------------------------------

    def _front_matter(self) -> str:
        widget = [
            {
                "text": self.adapter.provenance.caption if _is_clip(files) else prompt,
                "output": {"url": files[0]},
            }
            for prompt, files in _by_prompt(self.samples).items()
        ]
        told = self.adapter.summary()
        tags = [tag for tag in TAGS if tag != "lora" or told["method"] in ("lora", "rslora")]
        data = ModelCardData(
            # hubs take nothing but a name of theirs here
            base_model=self.base if NAME.fullmatch(self.base) else None,
            library_name="tav-peft",
            pipeline_tag="text-to-video",
            # left out where it is not said: "other" would claim a licence that is nowhere
            license=self.license_id,
            tags=tags,
            widget=widget or None,
        )
        return data.to_yaml().rstrip("\n")

    # -- what people read ----------------------------------------------------------------------------------

    def _pictures(self) -> Iterator[str]:
        for prompt, files in _by_prompt(self.samples).items():
            videos = "".join(f" ([video]({quote(each)}))" for each in files if each.endswith(VIDEOS))
            yield f"**{_plain(prompt)}**{videos}"
            yield from (f"![{_plain(prompt)}]({quote(each)})" for each in files if each.endswith(PICTURES))

    def _facts(self) -> Iterator[tuple[str, str]]:
        made, told = self.adapter.provenance, self.adapter.summary()
        recipe = Recipe.model_validate(made.recipe)
        for caption, clip in made.clips:
            yield "caption of the clip", caption
            size = f"{clip.frames} frames of {clip.width}x{clip.height}, {clip.fps:g} a second"
            if clip.frames:
                yield "clip", f"{clip.name}: {size}"
        called = "" if self.base == made.base.name else f" (called {made.base.name} by who tuned it)"
        yield "base", f"{self.base}{called}; it predicts {made.base.prediction_type}"
        method = "" if told["method"] in (None, "lora") else f", {told['method']}"
        rank = "" if told["rank"] is None else f"{method}, rank {told['rank']}"
        rank += "" if told["alpha"] is None else f", alpha {told['alpha']:g}"
        yield (
            "adapter",
            f"preset {told['preset']}: {', '.join(made.subset['parts'])}{rank}; {size_text(told['bytes'])}",
        )
        if made.model != type(made.model)():
            yield "variant", str(made.model)
        if made.merged_from is not None:
            sources = ", ".join(each.name for each in made.merged_from.adapters)
            yield "merged", f"{made.merged_from.method} of {sources}"
        yield (
            "recipe",
            f"{recipe.name}: {made.step} steps at {recipe.training.lr:g}, seed {recipe.training.seed}",
        )
        yield "licence", self.license_id or "none stated"

    def _usage(self) -> Iterator[str]:
        adapter = self.adapter
        how = EditingSection().replace(**adapter.provenance.editing)
        yield "```bash\n" + "\n".join(self._commands()) + "\n```"
        yield "Or in Python:"
        if adapter.latents is not None:
            start = [f"inversion = pipe.invert(adapter.latents, {_arguments(how.inverting)})"]
            yield self._python(how, start, "inversion=inversion")
            return
        clip = json.dumps(adapter.provenance.clip.name or "clip.mp4", ensure_ascii=False)
        start = [f"inversion = pipe.invert(read_as_tuned(adapter, {clip}), {_arguments(how.inverting)})"]
        yield self._python(how, start, "inversion=inversion", "from tav_peft.sources import read_as_tuned")
        if adapter.provenance.clip.frames:
            yield "Without the clip, from noise:"
            start = [f"noise = pipe.noise(adapter.provenance.clip, seed={_SEED})"]
            plain = how.replace(depth=1.0, inject_attention=0.0, inject_features=0.0)
            yield self._python(plain, start, "latents=noise")

    def _commands(self) -> Iterator[str]:
        made, called = self.adapter.provenance, shlex.quote(self.name or self.file)
        base = "" if self.base == made.base.name else f" --base {shlex.quote(self.base)}"
        edit = f"tav edit {called}{base} --prompt {shlex.quote(self._prompt())}"
        if self.adapter.latents is not None:
            yield edit
            return
        yield f"{edit} --clip {shlex.quote(made.clip.name or 'clip.mp4')}"
        if made.clip.frames:
            yield f"{edit} --no-inversion --seed {_SEED}"

    def _python(self, how: EditingSection, start: Sequence[str], given: str, *imports: str) -> str:
        prompt = json.dumps(self._prompt(), ensure_ascii=False)
        fps = self.adapter.provenance.clip.fps
        rate = f", fps={fps:g}" if fps else ""
        strength = "" if how.strength == 1 else f", strength={how.strength:g}"
        if (injection := injection_of(how)) is not None:
            imports = (*imports, "from tav_peft.injection import Injection")
            given += f", injection={injection}"
        return "\n".join([
            "```python",
            "from tav_peft import TuneAVideoPipeline",
            *imports,
            "",
            f"pipe = TuneAVideoPipeline.from_pretrained({json.dumps(self.base)})",
            f"adapter = pipe.load_adapter({json.dumps(self.name or self.file)}{strength})",
            *start,
            f"edit = pipe({prompt}, {given}, {_arguments(how.sampling)}{rate}).clips[0]",
            f'edit.write("{_EDIT}")',
            "```",
        ])  # fmt: skip

    def _prompt(self) -> str:
        """Choose a prompt to show: that of a sample, one of the recipe's, or the caption."""
        shown = [prompt for prompt, files in _by_prompt(self.samples).items() if not _is_clip(files)]
        shown = [prompt for prompt, files in _by_prompt(self.samples).items() if not _is_clip(files)]
        prompts = [*shown, *self.adapter.provenance.recipe.get("edits", ())]
        return " ".join((prompts or [self.adapter.provenance.caption])[0].split())

    def _contents(self) -> Iterator[str]:
        carried = "The clip itself is not in here."
        if self.adapter.latents is not None:
            carried = (
                "The file carries the clip's latents, which decode to nearly the clip: edits need no other file, and "
                "who has the file can see the clip."
            )
        verify = f"tav verify {shlex.quote(self.file)}"
        yield (
            f"`{self.file}` is the adapter; `sha256sum -c SHA256SUMS` checks all files, and `{verify}` what the adapter "
            f"says of itself. {carried}"
        )
        if self.license_id is None:
            yield "No licence is stated for the adapter: ask before passing it on."
        yield "The licence of the base, and the rights in the clip, hold for what is made with it."


def _by_prompt(samples: Sequence[str]) -> dict[str, list[str]]:
    """Group files by what their names say they show: the clip before its edits, pictures that move before others."""
    order = [*PICTURES, *VIDEOS]
    grouped: dict[str, list[str]] = {}
    for path in sorted(
        map(PurePosixPath, samples),
        key=lambda path: (path.name != PREVIEW, path.stem, order.index(path.suffix)),
    ):
        grouped.setdefault(re.sub(r"[-_]+", " ", path.stem), []).append(str(path))
    return grouped


def _is_clip(files: Sequence[str]) -> bool:
    return [PurePosixPath(each).name for each in files] == [PREVIEW]


def _arguments(values: Mapping[str, Any]) -> str:
    """Spell those arguments that are not what the pipeline takes by itself; the steps are always said."""
    usual = {
        "depth": 1.0,
        "negative_prompt": "",
        "method": "ddim",
        "iterations": EditingSection().inversion_iterations,
    }
    return ", ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
        if usual.get(name) != value
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {_plain(value)} |" for name, value in rows.items())]
    )


def _plain(text: str) -> str:
    """Spell words for Markdown, on one line, whatever is in them."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", " ".join(text.split()))


def is_found_by_all(base: str) -> bool:
    """Tell whether a base's name means the same to everybody: one of the hub, or pocket."""
    return base == POCKET or NAME.fullmatch(base) is not None
