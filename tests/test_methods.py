"""PEFT's methods: each trains, is kept, loaded, taken off and exported as a LoRA is, or says why not."""

import hashlib
import json
import warnings

import pytest
import torch
from peft import PeftModel

from tav_peft import formats
from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError, RecipeError, TuningError
from tav_peft.formats import importing, official
from tav_peft.merging import merge
from tav_peft.method_updates import MethodUpdates, _layer, shapes
from tav_peft.methods import METHODS, config_for, is_lora, json_config, method_of, read_config
from tav_peft.presets import Subset
from tav_peft.recipe import Recipe
from tav_peft.tools.casting import cast
from tav_peft.tools.ranks import RankRule
from tav_peft.tools.resizing import resize
from tav_peft.tuning import tune
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import inflate
from tav_peft.unet.trainable import trainable
from tav_peft.updates import Updates
from tav_peft.verification import verify

TURNING = [name for name, method in METHODS.items() if method.turns]
OTHERS = [name for name in METHODS if not is_lora(json_config(config_for(name, rank=4)))]
# of what begins at 0: so that updates are about as large as weights, and not larger
SPREAD = {"fourierft": 0.01, "miss": 0.1}
FREE = [name for name in OTHERS if name not in TURNING]  # of a base
DRAWN = {
    "vera": "3a191d64a5c17658",
    "fourierft": "fa00607febd5ba60",
}


def preset_of(method):
    return "hybrid" if method in TURNING else "lite"


@pytest.fixture
def trained(unet, run, make_adapter):
    """Give an adapter of random numbers by a method, and what the UNet gave while PEFT's layers were on it."""

    def make(method, preset=None, rank=4):
        preset = preset or preset_of(method)
        with trainable(unet, Subset(preset), rank=rank, method=method) as part:
            draw = torch.Generator().manual_seed(7)
            for parameter in part.parameters.values():
                spread = parameter.data.std() if parameter.any() else SPREAD.get(method, 1.0)
                parameter.data += 0.3 * spread * torch.randn(parameter.shape, generator=draw)
            tensors, out = part.tensors(torch.float32), run()
        provenance = make_adapter(preset).provenance
        return Adapter({n: t.clone() for n, t in tensors.items()}, part.peft_config, provenance), out

    return make


def updates_of(adapter, unet):
    return dict(MethodUpdates(adapter, "it", unet.get_parameter))


# -- on the UNet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_tuning_starts_from_the_base(method, unet, run):
    before = run()
    with trainable(unet, Subset(preset_of(method)), rank=4, method=method):
        # two reflections by the same vector are none but for rounding, and so are DoRA's lengths over themselves
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_attached_a_method_does_what_its_layers_did_in_training(method, trained, unet, run):
    before, (adapter, expected) = run(), trained(method)
    Attachments(unet).attach("a", adapter)
    assert (expected - before).abs().max() > 0.01
    # float32 of another order of sums: merged weights, not two products
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", OTHERS)
def test_strength_is_a_factor_of_the_update_and_off_is_the_base_to_the_bit(method, trained, unet):
    adapter, _ = trained(method)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    updates, attachments = updates_of(adapter, unet), Attachments(unet)
    assert len(updates) == (42 if preset_of(method) == "lite" else 14)
    attachments.attach("a", adapter, 0.25)
    for name, update in updates.items():
        assert update.abs().max() > 1e-5
        assert torch.equal(unet.get_parameter(name), before[name] + 0.25 * update)
    attachments.set_strengths({"a": 0.0})
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    attachments.set_strengths({"a": 1.0})
    attachments.detach("a")
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("method", TURNING)
def test_a_method_that_turns_turns_the_bases_own_weight_whatever_is_on_it(
    method, trained, unet, make_adapter
):
    (adapter, _), other = trained(method), make_adapter("paper", parts=("st_attn",))
    alone, attachments = updates_of(adapter, unet), Attachments(unet)
    before = {name: unet.get_parameter(name).clone() for name in alone}
    attachments.attach("other", other)
    attachments.attach("a", adapter)
    for name, update in alone.items():
        theirs = other.tensors.get(name.replace(".weight", ".diff"), torch.zeros(()))
        torch.testing.assert_close(unet.get_parameter(name).data, before[name] + theirs + update)


def test_a_method_can_take_anothers_place_in_its_slot(trained, unet, run):
    adapter, _ = trained("lokr")
    other = Adapter({n: 2 * t for n, t in adapter.tensors.items()}, adapter.peft_config, adapter.provenance)
    attachments = Attachments(unet)
    attachments.attach("a", other)
    expected = run()
    attachments.detach("a")
    attachments.attach("a", adapter)
    attachments.swap("a", other)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("method", DRAWN)
def test_what_is_drawn_and_not_saved_is_the_same_everywhere(method):
    # recorded with PEFT 0.17.0 and 0.21.2; another draw would make another update of every saved adapter
    layer = _layer(json_config(config_for(method, rank=4)), torch.zeros(64, 64), 128)
    if method == "vera":
        drawn = layer.vera_A["made"].numpy().tobytes() + layer.vera_B["made"].numpy().tobytes()
    else:
        drawn = layer.indices["made"].numpy().tobytes()
    assert hashlib.sha256(drawn).hexdigest().startswith(DRAWN[method])


# -- tuning and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_learns_and_the_file_holds_all_claims(method, pipe, clip, tmp_path):
    settings = [f"adapter.preset={preset_of(method)}", f"adapter.method={method}", "training.steps=3"]
    recipe = Recipe().override([*settings, "training.lr=1e-2"])
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    first = tune(pipe, clip, "a man", recipe.override(["training.steps=1", "training.lr=1e-12"]))
    file = tmp_path / "a.safetensors"
    tuned = tune(pipe, clip, "a man", recipe, output=file)
    assert [name for name in tuned.weights if torch.equal(tuned.weights[name], first.weights[name])] == []
    assert all(torch.equal(state[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    loaded = Adapter.load(file)
    assert (loaded.method, loaded.peft_config) == (method, tuned.peft_config)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tuned.tensors.items())
    told = loaded.summary()
    assert (told["method"], told["rank"]) == (method, 4)
    claims = {claim.name: claim for claim in verify(file, pipe)}
    assert [name for name, claim in claims.items() if claim.verdict == "differs"] == []
    assert all(claims[name].verdict == "holds" for name in ("config", "modules", "probe"))


@pytest.mark.parametrize("method", ["vera", "lokr"])
def test_a_stopped_tuning_resumes_to_the_same_bytes(method, pipe, clip, tmp_path):
    recipe = Recipe().override(["adapter.preset=lite", f"adapter.method={method}", "training.steps=4"])
    files = [tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"]
    tune(pipe, clip, "a man", recipe, output=files[0])

    def stop(done):
        if done.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(pipe, clip, "a man", recipe, output=files[1], progress=stop)
    tune(pipe, clip, "a man", recipe, output=files[1])
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_config_in_json_is_the_config(method):
    said = json_config(Subset("hybrid").peft_config([], rank=4, method=method))
    assert method_of(said) == method
    assert json_config(read_config(json.loads(json.dumps(said)))) == said
    assert METHODS[method].rank(said) == 4


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_weights": False}, "arguments"),
        ({"module_dropout": 0.5}, "arguments"),
        ({"r": None}, "r is not as the method has it"),
        ({"r": True}, "r is not as the method has it"),
        ({"r": 0}, "r 0"),
        ({"alpha": -1.0}, "alpha -1"),
        ({"decompose_factor": 4}, "decompose_factor is not as"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type PROMPT_TUNING"),
        ({"peft_type": "LOHA"}, "arguments"),
    ],
)
def test_a_config_that_says_more_than_its_method_is_refused(changes, says, trained, tmp_path):
    adapter, _ = trained("lokr")
    file = Adapter(adapter.tensors, {**adapter.peft_config, **changes}, adapter.provenance).save(
        tmp_path / "a.safetensors"
    )
    with pytest.raises(AdapterError, match=f"PEFT config does not fit .*{says}"):
        Adapter.load(file)


@pytest.mark.parametrize("method", OTHERS)
def test_tensors_that_are_not_the_configs_are_refused(method, trained, unet):
    adapter, _ = trained(method)
    kinds = tuple(f".{kind}" for kind in METHODS[method].kinds)
    name = next(name for name in adapter.tensors if name.endswith(kinds))
    fewer = {key: tensor for key, tensor in adapter.tensors.items() if key != name}
    shorter = {**adapter.tensors, name: adapter.tensors[name][:-1].contiguous()}
    for tensors, says in ((fewer, "1 missing"), (shorter, "this base needs")):
        wrong = Adapter(tensors, adapter.peft_config, adapter.provenance)
        with pytest.raises(AdapterError, match=says):
            Attachments(unet).attach("a", wrong)
        if len(kinds) > 1 or tensors is shorter:
            with pytest.raises(AdapterError, match=rf"has {method} tensors of|its config asks for"):
                Updates(wrong, "it", unet.get_parameter)
        else:
            with pytest.raises(AdapterError, match="1 tensors are missing"):
                Updates(wrong, "it", unet.get_parameter)


def test_a_base_that_the_header_makes_up_is_refused(trained):
    adapter, _ = trained("fourierft")
    for channels in ([10**9, 10**9], [16], "many", None, [True, 1.5]):
        architecture = {**adapter.provenance.base.architecture, "block_out_channels": channels}
        base = adapter.provenance.base.model_copy(update={"architecture": architecture})
        wrong = Adapter(
            adapter.tensors, adapter.peft_config, adapter.provenance.model_copy(update={"base": base})
        )
        with pytest.raises(AdapterError, match="its base has no block for"):
            Updates(wrong, "it")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["adapter.preset=paper", "adapter.method=lokr"], "the preset paper tunes .* densely"),
        (["adapter.preset=lite", "adapter.method=oft"], "T-Attn's output weights are 0 at first"),
        (["adapter.preset=lite", "adapter.method=dora"], "T-Attn's output weights are 0 at first"),
        (["adapter.preset=hybrid", "adapter.method=hra", "adapter.rank=3"], "hra takes multiples of 2"),
        (
            ["adapter.preset=lite", "adapter.method=vera", "adapter.alpha=2"],
            "vera has none, only lora, rslora",
        ),
        (
            ["adapter.preset=hybrid", "adapter.method=oft", "adapter.rank=6"],
            "blocks of 6 do not divide a width of",
        ),
        (["adapter.preset=lite", "adapter.method=fourierft", "adapter.rank=5"], "n_frequency"),
        (
            ["adapter.preset=lite", "adapter.method=miss", "adapter.rank=17"],
            "a rank of 17 is more than the width of 16",
        ),
    ],
)
def test_what_a_method_cannot_do_is_said_before_anything_changes(settings, says, pipe, clip):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with pytest.raises((RecipeError, TuningError), match=says):
        tune(pipe, clip, "a man", Recipe().override(settings))
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_an_unknown_method_is_told_with_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'lokr'"):
        Recipe().override(["adapter.method=lokt"])


# -- what works on updates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FREE)
def test_a_method_without_a_base_merges_resizes_and_is_cast(method, trained, unet):
    adapter, _ = trained(method)
    updates = updates_of(adapter, unet)
    merged, _ = merge([adapter, adapter], [0.5, 0.25])
    found = Updates(merged, "merged")
    for name, update in updates.items():
        torch.testing.assert_close(found[name], 0.75 * update, rtol=1e-5, atol=1e-7)
    resized, report = resize(adapter, RankRule(rank=32))  # the widest block's, so that nothing is lost
    assert (resized.method, resized.subset.preset) == ("lora", "lite")
    assert report.error < 1e-5
    half, _ = cast(adapter, "fp16")
    assert (half.method, half.summary()["bytes"]) == (method, adapter.summary()["bytes"] // 2)
    assert set(half.tensors) == set(adapter.tensors)


@pytest.mark.parametrize("method", FREE)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "lycoris"])
def test_image_formats_hold_a_methods_query_updates_multiplied_out(method, to, trained, unet, pipe, tmp_path):
    adapter, _ = trained(method)
    written = formats.FORMATS[to].write(adapter, tmp_path / "a.safetensors")
    read = Updates(importing.read(written).adapter, "read")
    expected = {n: u for n, u in updates_of(adapter, unet).items() if "attn_temp" not in n}
    assert set(read) == set(expected)
    for name, update in expected.items():
        torch.testing.assert_close(read[name], update)


@pytest.mark.parametrize("method", TURNING)
def test_a_method_that_turns_says_that_its_update_needs_the_base(method, trained, tmp_path):
    adapter, _ = trained(method)
    for refused in (
        lambda: merge([adapter]),
        lambda: resize(adapter, RankRule(rank=2)),
        lambda: formats.FORMATS["kohya"].write(adapter, tmp_path / "a.safetensors"),
    ):
        with pytest.raises(AdapterError, match=f"is tuned by {method}, which turns the base's weights"):
            refused()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", OTHERS)
def test_stock_peft_computes_from_the_exported_folder_what_the_adapter_does(
    method, trained, flat, run, tmp_path
):
    adapter, expected = trained(method)
    folder = formats.FORMATS["peft"].write(adapter, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's words on projections that are drawn again
        model = PeftModel.from_pretrained(inflate(flat), folder)
    torch.testing.assert_close(run(model.base_model.model), expected, rtol=1e-4, atol=2e-5)
    again = formats.read(folder)
    assert again.peft_config == adapter.peft_config
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("to", ["official", "inflated"])
def test_whole_models_are_written_with_a_method_in_their_weights(method, to, trained, pipe, tmp_path):
    adapter, _ = trained(method)
    folder = formats.MODEL_FORMATS[to].write(adapter, tmp_path / "model", pipe)
    written = Updates(official.read(folder, pipe).adapter, "written")
    for name, update in updates_of(adapter, pipe.unet).items():
        # a sum in float32, and the difference again
        torch.testing.assert_close(written[name], update, rtol=1e-5, atol=1e-6)


# -- sizes ---------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_methods_papers():
    def of(method, rank, width):
        return shapes(json_config(config_for(method, rank=rank)), width, 1280)

    assert of("loha", 4, 320) == {
        f"hada_w{i}_{side}": shape for i in (1, 2) for side, shape in (("a", (320, 4)), ("b", (4, 320)))
    }
    assert of("lokr", 4, 320) == {"lokr_w1": (16, 16), "lokr_w2_a": (20, 4), "lokr_w2_b": (4, 20)}
    assert of("miss", 4, 320) == {"miss_block": (4, 320)}
    assert of("vera", 4, 320) == {"vera_lambda_b": (320,), "vera_lambda_d": (256,)}
    assert of("fourierft", 4, 320) == {"fourierft_spectrum": (256,)}
    assert of("oft", 4, 320) == {"oft_R.weight": (80, 6)}
    assert of("hra", 4, 320) == {"hra_u": (320, 4)}
    assert of("dora", 4, 320)["lora_magnitude_vector"] == (320,)
