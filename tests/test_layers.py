"""Imports go down only, from verbs to the model to its parts to maths and data to the ground."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tav_peft"
# from the top; a module may import what stands below it, and what stands before it in its own line
LAYERS = (
    ("demo", "repetition", "tools", "baking", "suite"),
    (
        "tuning",
        "cross_attention",
        "invert_once",
        "report",
        "reconstruction",
        "merging",
        "verification",
        "sharing.bundling",
        "sharing.publishing",
    ),
    ("sharing.card", "early_stopping", "planning"),
    ("objective",),
    ("pipeline",),
    ("loading",),
    ("base_loading", "sampling", "windows"),
    ("control.steering", "masks", "injection", "feature_reuse", "token_merging"),
    ("optimizing",),
    ("processes",),
    ("formats", "unet.trainable", "trail", "sources", "image_loras"),
    ("unet.probe", "updates"),
    ("unet.attaching",),
    ("unet.auditing",),
    ("method_updates", "unet.branches"),
    ("unet.peft_layers",),
    ("scoring",),
    ("pocket.motion", "pocket.truth"),
    ("pocket.clips", "control.networks"),
    ("unet.inflation", "inversion", "adapter", "autoencoding", "bases.single_file"),
    ("bases.folder", "header", "sharing.fetching"),
    ("sharing.hub",),
    ("inversion_cache",),
    ("sharing.address",),
    ("bases.checkpoint_file", "bases.unfit", "control.maps", "video.companion"),
    (
        "unet.attention",
        "conditions",
        "unet.temporal_init",
        "presets",
        "tensor_file",
        "video.clip",
    ),
    ("methods",),
    ("video.preview", "video.record", "video.reading", "video.writing", "recipe", "bases", "pocket.world"),
    (
        "whole",
        "lock",
        "hashes",
        "foreign",
        "finite",
        "shapes",
        "low_rank",
        "bases.ldm_keys",
        "bases.prediction_type",
    ),
    ("errors", "changes", "other_forward", "unet.philox", "pocket", "sharing", "unet", "video", "control"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def layer_of(module):
    """The listed name that a dotted module path belongs to: `formats.peft` to `formats`."""
    return module if module in RANK else module.split(".")[0]


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tav_peft":
            inner = node.module.removeprefix("tav_peft").lstrip(".")
            names = (f"{inner}.{alias.name}".lstrip(".") for alias in node.names)
            yield from (name if name in RANK or not inner else inner for name in names)


def modules():
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, file


def test_every_module_has_a_layer_and_every_layer_a_module():
    found = {layer_of(name) for name, _ in modules()}
    assert len(found) > 20
    assert found == set(RANK)


def test_no_module_imports_upwards_or_sideways():
    wrong = []
    for name, file in modules():
        for target in imports_of(file):
            own, other = layer_of(name), layer_of(target)
            if own != other and RANK[other] <= RANK[own]:
                wrong.append(f"{name} -> {target}")
    assert wrong == []


def test_the_library_knows_nothing_of_its_commands():
    assert [
        name for name, file in modules() for target in imports_of(file) if layer_of(target) == "cli"
    ] == []
