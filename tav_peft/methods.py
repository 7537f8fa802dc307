"""PEFT's methods, by which those parts of a preset are tuned that are not dense: each as a stock config."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tav_peft.errors import RecipeError

if TYPE_CHECKING:
    # importing it takes long, and the names of the methods are wanted without
    from peft import PeftConfig

    from tav_peft.recipe import PeftMethod

_TARGETS = {"peft_type", "target_modules", "modules_to_save"}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method is said to PEFT, and what it trains in each module.

    Its size, `size`, is `factor` times the recipe's rank, which must be a multiple of `step`. `alpha` names what
    scales it, "" where nothing does. `fixed` is what else is said. `kinds` are the names of its tensors after a
    module's path. A method that `turns` makes W of W0 by a product: its update depends on the base, and a weight of 0
    stays 0.
    """

    peft_type: str
    config: str
    kinds: tuple[str, ...]
    size: str = "r"
    factor: int = 1
    step: int = 1
    alpha: str = ""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    turns: bool = False

    @property
    def arguments(self) -> set[str]:
        """Names of the config's arguments that make the method."""
        return {self.size, *self.fixed} | ({self.alpha} if self.alpha else set())

    def rank(self, config: Mapping[str, Any]) -> int | None:
        """Give the recipe's rank that a config was made from, None where there is none."""
        size = config.get(self.size)
        return size // self.factor if isinstance(size, int) else None


_LORA = ("lora_A.weight", "lora_B.weight")
_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KRONECKER = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
# seeds, scales and switches are said although they are PEFT's defaults, which may change
METHODS: dict[PeftMethod, Method] = {
    # Hu et al. 2021
    "lora": Method("LORA", "LoraConfig", _LORA, alpha="lora_alpha"),
    # Kalajdzievski 2023: scaled by alpha/√r
    "rslora": Method("LORA", "LoraConfig", _LORA, alpha="lora_alpha", fixed={"use_rslora": True}),
    # Liu et al. 2024: directions by a LoRA, lengths by a vector
    "dora": Method(
        "LORA", "LoraConfig", (*_LORA, "lora_magnitude_vector"), alpha="lora_alpha", fixed={"use_dora": True},
        turns=True,
    ),
    # Hyeon-Woo et al. 2021: the elementwise product of two LoRAs
    "loha": Method("LOHA", "LoHaConfig", _HADAMARD, alpha="alpha"),
    # Yeh et al. 2023: a Kronecker product, its larger factor a LoRA
    "lokr": Method("LOKR", "LoKrConfig", _KRONECKER, alpha="alpha", fixed={"decompose_factor": -1}),
    # Shi and others 2024: one block of `r` rows, repeated
    "miss": Method("MISS", "MissConfig", ("miss_block",)),
    # Kopiczko et al. 2023: random projections that all modules share, and two vectors of each
    "vera": Method(
        "VERA", "VeraConfig", ("vera_lambda_b", "vera_lambda_d"), factor=64,
        fixed={"projection_prng_key": 0, "save_projection": False, "d_initial": 0.1},
    ),
    # Gao et al. 2024: some frequencies of the update, the same ones everywhere; they begin at 0, and not at random
    "fourierft": Method(
        "FOURIERFT", "FourierFTConfig", ("fourierft_spectrum",), size="n_frequency", factor=64,
        fixed={"scaling": 150.0, "random_loc_seed": 777, "init_weights": True},
    ),
    # Qiu et al. 2023: rotations of blocks of the inputs, here by the exact Cayley transform
    "oft": Method(
        "OFT", "OFTConfig", ("oft_R.weight",), size="oft_block_size", step=2,
        fixed={"r": 0, "use_cayley_neumann": False}, turns=True,
    ),
    # Yuan et al. 2024: Householder reflections of the inputs, in pairs that begin as nothing
    "hra": Method("HRA", "HRAConfig", ("hra_u",), step=2, turns=True),
}  # fmt: skip
KINDS = sorted({kind for method in METHODS.values() for kind in method.kinds})


def check_method(name: PeftMethod, rank: int, alpha: float | None) -> None:
    """Refuse a rank and an alpha that a method cannot take.

    Raises:
        RecipeError: naming what it takes.

    """
    if name not in METHODS:
        raise RecipeError(f"method {name}: choose from {', '.join(METHODS)}.")
    method = METHODS[name]
    if rank < 1 or rank % method.step:
        raise RecipeError(f"rank {rank}: {name} takes multiples of {method.step}.")
    if alpha is not None and not method.alpha:
        scaled = ", ".join(each for each, other in METHODS.items() if other.alpha)
        raise RecipeError(f"alpha {alpha:g}: {name} has none, only {scaled} have. Leave it out.")


def config_for(name: PeftMethod, *, rank: int, alpha: float | None = None, **targets: Any) -> PeftConfig:
    """Build a method's stock config; `alpha` defaults to `rank`, and `targets` say which modules.

    Raises:
        RecipeError: when the method cannot take the rank or the alpha.

    """
    check_method(name, rank, alpha)
    method = METHODS[name]
    scaled = {method.alpha: rank if alpha is None else alpha} if method.alpha else {}
    return _config(method, {method.size: method.factor * rank, **scaled, **method.fixed, **targets})


def method_of(config: Mapping[str, Any] | None) -> PeftMethod:
    """Name the method of a config in JSON's form; where there is none, that of a LoRA.

    Raises:
        ValueError: when it is of no method that is known here.

    """
    if config is None:
        return "lora"
    if config["peft_type"] == "LORA":
        return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    for name, method in METHODS.items():
        if method.peft_type == config["peft_type"]:
            return name
    raise ValueError(f"peft_type {config['peft_type']}")


def is_lora(config: Mapping[str, Any] | None) -> bool:
    """Tell whether a config is of LoRAs whose update is scale·B·A, and nothing else."""
    return METHODS[method_of(config)].kinds == _LORA


def read_config(config: Mapping[str, Any]) -> PeftConfig:
    """Build the stock config that JSON says.

    Raises:
        ValueError: when a method other than LoRA's says more than it needs, or sizes that are none.
        TypeError: when PEFT does not know what it says.

    """
    method = METHODS[method_of(config)]
    given = {key: value for key, value in config.items() if key != "peft_type"}
    if method.peft_type != "LORA":
        if config.keys() - _TARGETS != method.arguments:
            raise ValueError(f"arguments {', '.join(sorted(config.keys() - _TARGETS))}")
        wrong = sorted(key for key, value in method.fixed.items() if given[key] != value)
        if wrong or type(given[method.size]) is not int:
            raise ValueError(f"{', '.join(wrong) or method.size} is not as the method has it")
    made = _config(method, given)
    numbers = {name: getattr(made, name) for name in (method.size, method.alpha) if name}
    if not numbers[method.size] >= 1 or not all(value > 0 for value in numbers.values()):
        raise ValueError(", ".join(f"{name} {value}" for name, value in numbers.items()))
    return made


def json_config(config: PeftConfig) -> dict[str, Any]:
    """Reduce a PEFT config to the JSON of what it says beyond PEFT's defaults, so that other versions read it."""
    default, said = type(config)().to_dict(), config.to_dict()
    given = {key: value for key, value in said.items() if value != default[key]}
    given["peft_type"] = config.peft_type.value
    method = METHODS[method_of(given)]
    given |= {key: said[key] for key in method.arguments}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(given.items())}


def _config(method: Method, arguments: Mapping[str, Any]) -> PeftConfig:
    import peft

    with warnings.catch_warnings():
        # VeRA's projections are drawn again from the seed in the config, and compared by the probe
        warnings.filterwarnings("ignore", "Specified to not save vera_A")
        config: PeftConfig = getattr(peft, method.config)(**arguments)
    return config
