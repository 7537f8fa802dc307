"""A recipe: every setting of a tuning and of the edits after it, in one readable YAML file."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from tav_peft.changes import changes
from tav_peft.errors import RecipeError


def _number(value: Any) -> Any:
    """Read 3e-5 as a number: YAML 1.1 wants 3.0e-5 and takes the usual spelling for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _stride(value: Any) -> Any:
    return None if value == "spread" else value


def _size(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
        value = [int(side) for side in value.split("x")]
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    sides = value if pair else [value]
    if value is not None and not all(type(side) is int and side >= 8 for side in sides):
        raise ValueError("must be a whole number of at least 8, [width, height] or widthxheight")
    return tuple(value) if pair else value


def _auto(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("must be auto, true or false")
    return value


def _interval(value: Any) -> Any:
    if (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(v, (int, float)) for v in value)
    ):
        if not value[0] < value[1]:
            raise ValueError("must begin before it ends")
        return tuple(map(float, value))
    raise ValueError("must be two shares of the steps, such as [0, 0.6]")


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("must name nothing twice")
    return names


Preset = Literal["paper", "hybrid", "lite"]
Part = Literal["st_attn", "cross_attn", "t_attn"]
PeftMethod = Literal["lora", "rslora", "dora", "loha", "lokr", "miss", "vera", "fourierft", "oft", "hra"]
Block = Literal["down", "mid", "up"]
Fit = Literal["keep", "crop", "pad", "squash"]
Precision = Literal["fp32", "fp16", "bf16"]
InversionMethod = Literal["ddim", "fixed_point"]
FrameAttention = Literal["sparse_causal", "causal", "full", "frame"]
FrameNorm = Literal["joint", "frame"]
_Number = Annotated[float, BeforeValidator(_number)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Item = TypeVar("_Item")
_Model = TypeVar("_Model", bound="_Frozen")
_List = Annotated[tuple[_Item, ...], Field(strict=False)]
_Some = Annotated[_List[_Item], Field(min_length=1), AfterValidator(_distinct)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def replace(self: _Model, **given: Any) -> _Model:
        """Return these settings with the given ones in their place; None is "not given".

        Raises:
            RecipeError: a value is out of its range; every problem is named.

        """
        news = {name: value for name, value in given.items() if value is not None}
        section = type(self).__name__.removesuffix("Section").lower()
        return _checked(type(self), {**self.model_dump(), **news}, where=section)


class ClipSection(_Frozen):
    """Which frames of the clip are used, and at what size; the arguments of `Clip.read`."""

    frames: Annotated[int, Field(ge=1)] | None = 24
    start: Annotated[int, Field(ge=0)] = 0
    stride: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_stride)] = None
    size: Annotated[int | tuple[int, int] | None, BeforeValidator(_size)] = None
    fit: Fit = "keep"


class ModelSection(_Frozen):
    """How the UNet treats frames: the paper's ways by default, and those it is compared with.

    `attention` is what a frame's self-attention sees: the first and the former frame (sparse_causal), all frames up to
    itself (causal), all frames (full), or itself alone (frame: no spatio-temporal attention). `group_norm` takes its
    statistics over all frames (joint) or over each alone (frame).
    """

    attention: FrameAttention = "sparse_causal"
    group_norm: FrameNorm = "joint"

    def __str__(self) -> str:
        return " and ".join(f"{name} {value}" for name, value in self)


class AdapterSection(_Frozen):
    """What is trained and in which dtype it is saved.

    `method`, `rank` and `alpha` (None: rank) are of the parts that the preset does not tune densely; `methods` says what
    the rank is to each method.
    """

    preset: Preset = "paper"
    method: PeftMethod = "lora"
    rank: Annotated[int, Field(ge=1)] = 4
    alpha: Annotated[_Number, Field(gt=0)] | None = None
    dtype: Precision = "fp16"
    parts: _Some[Part] = ("st_attn", "cross_attn", "t_attn")
    blocks: _Some[Block] = ("down", "mid", "up")


class TrainingSection(_Frozen):
    """How it is trained: AdamW at a constant rate, one clip, one seed.

    Of a clip of more frames than `window` each step draws so many: the first, and a run of others. With `early_stopping`
    a probe every `probe_every` steps picks the step that is kept; `patience` probes after the best one the tuning ends.
    """

    steps: Annotated[int, Field(ge=1)] = 500
    lr: Annotated[_Number, Field(gt=0, le=1)] = 3e-5
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 33
    beta1: Annotated[_Number, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[_Number, Field(ge=0, lt=1)] = 0.999
    weight_decay: Annotated[_Number, Field(ge=0)] = 1e-2
    epsilon: Annotated[_Number, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[_Number, Field(gt=0)] = 1.0
    precision: Precision = "fp32"
    gradient_checkpointing: Annotated[bool | Literal["auto"], BeforeValidator(_auto)] = "auto"
    save_every: Annotated[int, Field(ge=1)] = 100
    window: Annotated[int, Field(ge=3)] | None = None
    early_stopping: bool = False
    probe_every: Annotated[int, Field(ge=1)] = 25
    patience: Annotated[int, Field(ge=1)] = 4


class Resampling(_Frozen):
    """How deep a clip is inverted, how strongly the prompt pulls, and in which shares of the steps it is injected."""

    depth: Annotated[_Number, Field(gt=0, le=1)]
    guidance_scale: Annotated[_Number, Field(ge=1)]
    inject_attention: _Share = 0.0
    inject_features: _Share = 0.0


class EditingSection(_Frozen):
    """How the clip is inverted and the tuned model is sampled unless an edit says otherwise.

    `inversion_iterations`, the most UNet passes in one step of the inversion, matters to fixed_point only. A clip of more
    frames than `window` goes through the UNet in windows that share `overlap` frames (see `windows`). `two_changes` is
    for prompts that say two new things or more. Guidance acts in the shares `guidance_interval` of the steps. The
    UNet's deep blocks are computed at every `reuse_features`-th step, and `merge_tokens` of ST-Attn's positions merged.
    The source's attention and features are injected for `inject_attention` and `inject_features` of the steps, and
    `strength` is the adapter's.
    """

    guidance_scale: Annotated[_Number, Field(ge=1)] = 12.5
    num_inference_steps: Annotated[int, Field(ge=1, le=999)] = 50
    depth: Annotated[_Number, Field(gt=0, le=1)] = 1.0
    negative_prompt: str = ""
    inversion_method: InversionMethod = "ddim"
    inversion_iterations: Annotated[int, Field(ge=1)] = 5
    window: Annotated[int, Field(ge=3)] | None = None
    overlap: Annotated[int, Field(ge=1)] = 4
    two_changes: Resampling | None = None
    guidance_interval: Annotated[tuple[_Share, _Share], BeforeValidator(_interval)] = (0.0, 1.0)
    reuse_features: Annotated[int, Field(ge=1)] = 1
    merge_tokens: Annotated[_Number, Field(ge=0, le=0.75)] = 0.0
    inject_attention: _Share = 0.0
    inject_features: _Share = 0.0
    strength: Annotated[_Number, Field(ge=0)] = 1.0

    def suited(self, caption: str, prompt: str) -> "EditingSection":
        """Return these settings for a prompt: with those of `two_changes` where it says two new things or more."""
        if self.two_changes is None or sum(now != "" for _, now in changes(caption, prompt)) < 2:
            return self
        return self.replace(**self.two_changes.model_dump())

    @property
    def inverting(self) -> dict[str, Any]:
        """Give the arguments of `pipe.invert`."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "depth": self.depth,
            "method": self.inversion_method,
            "iterations": self.inversion_iterations,
            **self._windows,
        }

    @property
    def sampling(self) -> dict[str, Any]:
        """Give the arguments of `pipe(prompt, …)` but `injection` (see `injection_of`)."""
        others = {
            "inversion_method", "inversion_iterations", "window", "overlap", "two_changes", "inject_attention",
            "inject_features", "strength",
        }  # fmt: skip
        return {**self.model_dump(exclude=others), **self._windows}

    @property
    def _windows(self) -> dict[str, int]:
        return {} if self.window is None else {"window": self.window, "overlap": self.overlap}


class Recipe(_Frozen):
    """Every setting of a tuning; `prompt` is the clip's caption and `edits` are prompts worth trying."""

    name: str = "unnamed"
    description: str = ""
    base: str | None = None
    prompt: str | None = None
    edits: _List[str] = ()
    clip: ClipSection = ClipSection()
    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection = TrainingSection()
    editing: EditingSection = EditingSection()

    @classmethod
    def load(cls, source: str | Path) -> "Recipe":
        """Read a recipe from a YAML file, or a shipped one by its name.

        A file that has a shipped recipe's name is meant with `./` before it.

        Raises:
            RecipeError: not there, no YAML, or unknown or impossible values; every problem is named.

        """
        if isinstance(source, str) and source in shipped():
            return cls._parse(shipped_text(source), f"recipe {source}", source)
        path = Path(source)
        try:
            return cls._parse(path.read_text(encoding="utf-8"), str(path), path.stem)
        except FileNotFoundError:
            raise RecipeError(_no_such_recipe(str(source))) from None
        except UnicodeDecodeError:
            raise RecipeError(f"{path} is not a text file in UTF-8. Give a YAML recipe.") from None
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error

    @classmethod
    def _parse(cls, text: str, where: str, name: str) -> "Recipe":
        values = _yaml(text, where)
        if not isinstance(values, Mapping):
            raise RecipeError(
                f"{where} must be fields and sections such as 'training:', not {short(values)}."
            )
        return _checked(cls, {"name": name, **values}, where)

    def override(self, assignments: Iterable[str]) -> "Recipe":
        """Return this recipe with settings such as `training.steps=3` in place; later ones win.

        Values are read as YAML.

        Raises:
            RecipeError: unknown names, bad YAML, or impossible values; every problem is named.

        """
        values, problems = self.model_dump(), []
        for assignment in assignments:
            try:
                section, field, value = _assigned(assignment)
                (values[section] if section else values)[field] = value
            except RecipeError as error:
                problems.append(str(error))
        return _checked(type(self), values, f"recipe {self.name} with these settings", problems)

    def to_yaml(self) -> str:
        """Write every setting out, in a form that `load` reads back to an equal recipe."""
        values = self.model_dump(mode="json")
        values["clip"]["stride"] = self.clip.stride or "spread"
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def shipped() -> list[str]:
    """List the names of the recipes that come with the package, in alphabetical order."""
    entries = (entry.name for entry in files("tav_peft.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in entries if name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """Return a shipped recipe as it was written, comments and all.

    Raises:
        RecipeError: no recipe of that name is shipped.

    """
    if name not in shipped():
        raise RecipeError(_no_such_recipe(name))
    return files("tav_peft.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _assigned(assignment: str) -> tuple[str, str, Any]:
    """Split `training.steps=3` into its section (empty at the top), its field, and the value."""
    key, equals, text = (side.strip() for side in assignment.partition("="))
    if not equals:
        raise RecipeError(f"{assignment}: must be name=value, such as training.steps=300.")
    if key not in _settable():
        raise RecipeError(_unknown(key))
    section, _, field = key.rpartition(".")
    return section, field, _yaml(text, key)


def _no_such_recipe(name: str) -> str:
    known = shipped()
    meant = _did_you_mean(_closest(name, known))
    return f"There is no recipe file or shipped recipe {name}.{meant} Shipped are {', '.join(known)}."


def _yaml(text: str, where: str) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        twice = sorted(set(_repeated(node)))
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise RecipeError(f"{where} is not readable as YAML: {' '.join(str(error).split())}.") from error
    if twice:
        raise RecipeError(f"{where} says twice what may be said once: {', '.join(twice)}.")
    return values


def _repeated(node: yaml.Node | None) -> Iterator[str]:
    """Yield each key that a mapping has twice; YAML itself would keep the last one and say nothing."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        yield from (key for key in keys if keys.count(key) > 1)
        for _, value in node.value:
            yield from _repeated(value)


def _checked(
    model: type[_Model], values: Mapping[Any, Any], where: str, problems: Iterable[str] = ()
) -> _Model:
    found = list(problems)
    try:
        checked = model.model_validate(values)
    except ValidationError as error:
        found += [_sentence(detail) for detail in error.errors(include_url=False)]
    if len(found) == 1:
        raise RecipeError(f"{where}: {found[0]}")
    if found:
        raise RecipeError("\n  ".join([f"{where}: {len(found)} problems", *found]))
    return checked


_RULES = {
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "invalid_key": "must have names as keys",
    "model_type": "must be a section of named fields",
    "string_type": "must be text",
    "too_short": "must not be empty",
    "tuple_type": "must be a list such as [a, b]",
}


def _sentence(detail: ErrorDetails) -> str:
    """Say in one line what pydantic found: where, the rule, what was given."""
    path = ".".join(str(step) for step in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown(path)
    usual = detail["msg"].replace("Value error, ", "").replace("Input should be", "must be")
    rule = _RULES.get(detail["type"], usual)
    choices = re.findall(r"'([^']*)'", detail.get("ctx", {}).get("expected", ""))
    meant = _closest(str(detail["input"]), choices)
    return f"{path}: {rule}, not {short(detail['input'])}.{_did_you_mean(meant)}"


def _unknown(path: str) -> str:
    """Say that a dotted name is no field, and which one was probably meant: a neighbour, or one elsewhere."""
    section, _, field = path.rpartition(".")
    if path in Recipe.model_fields:
        return f"{path}: a section. Set a field of it, such as {_fields_of(path)[0]}."
    neighbours = [name.rpartition(".")[2] for name in _fields_of(section)] if section else Recipe.model_fields
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(_settable())}
    meant = elsewhere.get(field) or _closest(field, neighbours) or elsewhere.get(_closest(field, elsewhere))
    return f"{path}: no such field.{_did_you_mean(meant)}"


def _closest(word: str, known: Iterable[str]) -> str:
    return next(iter(get_close_matches(word, list(known), n=1)), "")


def _did_you_mean(word: str | None) -> str:
    return f" Did you mean {word!r}?" if word else ""


def _fields_of(section: str) -> list[str]:
    return [name for name in _settable() if name.rpartition(".")[0] == section]


def _settable() -> list[str]:
    """List every field that holds a value, as dotted names."""
    names = []
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        inner = kind.model_fields if isinstance(kind, type) and issubclass(kind, _Frozen) else None
        names += [f"{name}.{part}" for part in inner] if inner else [name]
    return names
