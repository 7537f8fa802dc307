"""Other tools' files as adapters: LoRA in every spelling, LoHa, LoKr, DoRA and full rank, against their own tools."""

import functools
import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tav_peft import bases
from tav_peft.errors import AdapterError
from tav_peft.formats import decompositions, importing, lora
from tav_peft.formats.keys import flat_names
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.updates import Updates

QUERY = r".*transformer_blocks\.\d+\.attn[12]\.to_q"
ONE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def shared(base):
    return TuneAVideoPipeline.from_pretrained(base)


@pytest.fixture
def pipe(shared):
    """The tiny base, one for all tests here: what is loaded onto it is taken off after each."""
    yield shared
    for name in shared.adapters:
        shared.unload_adapter(name)


@pytest.fixture(autouse=True)
def unprobed(request, monkeypatch):
    """Leave the probe out, which runs the whole UNet, where a test does not look at it."""
    if "probe" not in request.node.name:
        monkeypatch.setattr(lora, "probed", lambda adapter, _unet: adapter)


@pytest.fixture
def queries(pipe):
    """Shapes of the base's query projections."""
    return {
        name.removesuffix(".weight"): p.shape for name, p in pipe.unet.named_parameters() if is_query(name)
    }


def is_query(name):
    return name.endswith(("attn1.to_q.weight", "attn2.to_q.weight"))


@pytest.fixture
def factors(queries, noise):
    """A LoRA of rank 2 for each: A and B."""
    return {
        name: (noise(2, columns, seed=n), noise(rows, 2, seed=99 + n) * 0.1)
        for n, (name, (rows, columns)) in enumerate(queries.items())
    }


def assert_updates(adapter, expected, tolerance=1e-6):
    updates = Updates(adapter, "it")
    assert set(updates) == {f"{module}.weight" for module in expected}
    for module, update in expected.items():
        torch.testing.assert_close(
            updates[f"{module}.weight"].double(), update.double(), rtol=tolerance, atol=tolerance
        )


# -- LoRA in every spelling --------------------------------------------------------------------------------

SPELLINGS = {
    "diffusers": ("unet.{m}.lora_A.weight", "unet.{m}.lora_B.weight"),
    "diffusers, of a UNet": ("{m}.lora_A.weight", "{m}.lora_B.weight"),
    "diffusers, older": ("unet.{m}.lora.down.weight", "unet.{m}.lora.up.weight"),
    "diffusers, processors": ("unet.{p}_lora.down.weight", "unet.{p}_lora.up.weight"),
    "kohya": ("lora_unet_{f}.lora_down.weight", "lora_unet_{f}.lora_up.weight"),
    "kohya, ldm": ("lora_unet_{i}.lora_down.weight", "lora_unet_{i}.lora_up.weight"),
    "comfy": ("diffusion_model.{d}.lora_down.weight", "diffusion_model.{d}.lora_up.weight"),
    "lycoris": ("lycoris_{f}.lora_down.weight", "lycoris_{f}.lora_up.weight"),
}


def spelled(factors, pipe, spelling):
    ldm = flat_names(factors, bases.architecture(pipe.unet), "ldm")
    tensors = {}
    for name, (A, B) in factors.items():
        dotted = re.sub(r"_blocks_(\d+)_(\d+)_|_block_(\d+)_", lambda m: m[0].replace("_", "."), ldm[name])
        dotted = dotted.replace(".blocks.", "_blocks.").replace(".block.", "_block.")
        dotted = re.sub(r"transformer_blocks_(\d+)_(attn\d)_to_q", r"transformer_blocks.\1.\2.to_q", dotted)
        words = {
            "m": name, "p": name.replace(".to_q", ".processor.to_q"), "f": name.replace(".", "_"),
            "i": ldm[name], "d": dotted,
        }  # fmt: skip
        for pattern, tensor in zip(SPELLINGS[spelling], (A, B), strict=True):
            tensors[pattern.format(**words)] = tensor
    return tensors


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_keeps_its_tensors_in_every_spelling(spelling, factors, pipe, tmp_path):
    tensors = spelled(factors, pipe, spelling)
    save_file(tensors, tmp_path / "a.safetensors")
    made = importing.read(tmp_path / "a.safetensors", pipe, caption="a man")
    assert made.forms == {"lora": 14}
    assert not made.multiplied
    for name, (A, B) in factors.items():
        assert torch.equal(made.adapter.tensors[f"{name}.lora_A.weight"], A)
        assert torch.equal(made.adapter.tensors[f"{name}.lora_B.weight"], B)
    assert_updates(made.adapter, {name: B @ A for name, (A, B) in factors.items()})
    info = made.adapter.provenance
    assert (info.caption, info.base.name, info.clip.fingerprint) == ("a man", "tiny", "")
    assert info.subset["parts"] == ("st_attn", "cross_attn")


def test_imported_it_has_a_probe_and_is_saved_loaded_and_taken_off(factors, pipe, tmp_path):
    save_file(spelled(factors, pipe, "kohya"), tmp_path / "a.safetensors")
    made = importing.read(tmp_path / "a.safetensors", pipe)
    made.adapter.save(tmp_path / "b.safetensors")
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items() if is_query(name)}
    pipe.load_adapter(tmp_path / "b.safetensors")
    assert pipe.adapters == ["default"]
    assert made.adapter.provenance.probe is not None
    pipe.unload_adapter()
    assert all(torch.equal(pipe.unet.state_dict()[name], tensor) for name, tensor in state.items())


def test_alphas_and_ranks_may_differ_between_modules(factors, pipe, noise, tmp_path):
    tensors = spelled(factors, pipe, "kohya")
    tensors |= {f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(1.5) for name in factors}
    tensors |= {
        f"{FLAT}.lora_down.weight": noise(3, 32), f"{FLAT}.lora_up.weight": noise(32, 3),
        f"{FLAT}.alpha": torch.tensor(0.5, dtype=torch.float16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = importing.read(tmp_path / "a.safetensors", pipe).adapter
    expected = {name: 0.75 * B @ A for name, (A, B) in factors.items()}
    assert_updates(adapter, expected | {ONE: 0.5 / 3 * noise(32, 3) @ noise(3, 32)})
    assert (adapter.peft_config["r"], adapter.peft_config["lora_alpha"]) == (2, 1.5)
    assert (adapter.peft_config["rank_pattern"], adapter.peft_config["alpha_pattern"]) == (
        {ONE: 3},
        {ONE: 0.5},
    )
    pipe.load_adapter(adapter)


def test_modules_that_the_file_lacks_are_not_changed(factors, pipe, tmp_path):
    some = {
        name: pair for name, pair in factors.items() if name.startswith("up_blocks.1") and "attn2" in name
    }
    assert len(some) == 2
    some = dict(list(some.items())[:1])
    save_file(spelled(some, pipe, "diffusers"), tmp_path / "a.safetensors")
    adapter = importing.read(tmp_path / "a.safetensors", pipe).adapter
    assert (adapter.subset.parts, adapter.subset.blocks) == (("cross_attn",), ("up",))
    others = {
        name: torch.zeros(B.shape[0], A.shape[1]) for name, (A, B) in factors.items() if "attn2" in name
    }
    others = {name: zeros for name, zeros in others.items() if name.startswith("up_blocks")}
    assert len(others) == 4
    assert_updates(adapter, others | {name: B @ A for name, (A, B) in some.items()})
    pipe.load_adapter(adapter)


# -- PEFT's folders ----------------------------------------------------------------------------------------


def peft_folder(unet, config, path):
    """Let stock PEFT make a random adapter of a UNet, save it, and say what it adds to each weight."""
    torch.manual_seed(0)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items() if is_query(name)}
    model = get_peft_model(unet, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                magnitude = "magnitude" in name
                parameter.copy_(parameter * 1.3 if magnitude else torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(path)
    merged = model.merge_and_unload()
    return {
        name.removesuffix(".weight"): merged.state_dict()[name].double() - tensor.double()
        for name, tensor in before.items()
    }


PEFT = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=QUERY),
    "rslora": LoraConfig(r=3, lora_alpha=5, target_modules=QUERY, use_rslora=True),
    "patterns": LoraConfig(
        r=3, lora_alpha=5, target_modules=QUERY, rank_pattern={ONE: 2}, alpha_pattern={r".*attn2\.to_q": 7}
    ),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=QUERY, use_dora=True),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=QUERY),
    "lokr": LoKrConfig(r=3, alpha=5, target_modules=QUERY),
    "lokr of two factors": LoKrConfig(
        r=1, alpha=2, target_modules=QUERY, decompose_both=True, decompose_factor=4
    ),
    "lokr of whole factors": LoKrConfig(r=30, alpha=5, target_modules=QUERY),
}


@pytest.mark.parametrize("kind", PEFT)
def test_what_stock_peft_merges_is_what_we_import(kind, flat, pipe, tmp_path):
    expected = peft_folder(flat, PEFT[kind], tmp_path / "folder")
    assert min(update.abs().max() for update in expected.values()) > 1e-3
    made = importing.read(tmp_path / "folder", pipe)
    assert made.format == "peft"
    is_lora = kind in ("lora", "rslora", "patterns")
    assert (made.multiplied, made.adapter.peft_config is None) == (not is_lora, not is_lora)
    # PEFT merges in float32, into weights near 1
    assert_updates(made.adapter, expected, tolerance=2e-6)


def test_a_peft_adapter_that_changed_its_base_is_refused(flat, pipe, tmp_path):
    config = LoraConfig(r=3, target_modules=QUERY, init_lora_weights="pissa")
    get_peft_model(flat, config).save_pretrained(tmp_path)
    with pytest.raises(
        AdapterError, match="was initialised by pissa, which changes the base's weights first"
    ):
        importing.read(tmp_path, pipe)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "OFT"}, "PEFT adapter of type OFT. LoRA, LoHa and LoKr are read"),
        ({"lora_bias": True}, "its config has lora_bias, which decides its update and is not read"),
        ({"r": 4}, "contradicts itself: .* has rank 3, its config says 4"),
        ({"r": "many"}, "LoRA config is damaged"),
        ({"use_dora": True}, "differ on whether .* is a DoRA"),
        ({"lora_alpha": 0}, "the alpha of .* is 0, which tools read differently"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, reason, flat, pipe, tmp_path):
    peft_folder(flat, LoraConfig(r=3, lora_alpha=5, target_modules=QUERY), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=reason):
        importing.read(tmp_path, pipe)


# -- LyCORIS -----------------------------------------------------------------------------------------------


@pytest.fixture
def lycoris_modules():
    """LyCORIS' own modules by form."""
    modules = pytest.importorskip("lycoris.modules", reason="lycoris-lora is in requirements-dev.txt")
    from lycoris.modules.full import FullModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    assert modules
    return {
        "lora": LoConModule,
        "full": FullModule,
        "loha": LohaModule,
        "lokr": functools.partial(LokrModule, factor=4),
        "lokr of two factors": functools.partial(LokrModule, factor=4, decompose_both=True),
        "lokr of whole factors": functools.partial(LokrModule, factor=4, full_matrix=True),
    }


@pytest.mark.parametrize("dora", [None, "rows", "columns"])
@pytest.mark.parametrize(
    "form", ["lora", "full", "loha", "lokr", "lokr of two factors", "lokr of whole factors"]
)
def test_what_lycoris_computes_is_what_we_import(form, dora, lycoris_modules, pipe, tmp_path):
    if form == "full" and dora:
        pytest.skip("LyCORIS has no magnitudes beside a full-rank update")
    torch.manual_seed(0)
    tensors, expected = {}, {}
    for name, layer in pipe.unet.named_modules():
        if not name.endswith(("attn1.to_q", "attn2.to_q")):
            continue
        more = {"weight_decompose": True, "wd_on_out": dora == "rows"} if dora else {}
        module = lycoris_modules[form](name, layer, 1.0, 1, 0.5, **more)
        with torch.no_grad():
            for own, parameter in module.named_parameters():
                parameter.copy_(
                    parameter * 1.3 if own == "dora_scale" else torch.randn(parameter.shape) * 0.3
                )
            unit = torch.eye(layer.in_features)
            if form == "full":
                expected[name] = module.weight.detach().clone()
                tensors[f"lora_unet_{name.replace('.', '_')}.diff"] = expected[name]
                continue
            expected[name] = (module(unit) - layer(unit)).T
        for kind, tensor in module.custom_state_dict().items():
            tensors[f"lora_unet_{name.replace('.', '_')}.{kind}"] = tensor.detach().contiguous()
    save_file(tensors, tmp_path / "a.safetensors")
    made = importing.read(tmp_path / "a.safetensors", pipe)
    assert made.format == ("kohya" if form == "lora" else "lycoris")
    assert made.forms == {form.split()[0] + (" with DoRA" if dora else ""): 14}
    assert_updates(made.adapter, expected, tolerance=1e-5)


def test_forms_may_be_mixed_and_are_multiplied_out_then(factors, pipe, noise, tmp_path):
    tensors = spelled(factors, pipe, "kohya")
    for kind in ("lora_down", "lora_up"):
        del tensors[f"{FLAT}.{kind}.weight"]
    save_file({**tensors, f"{FLAT}.diff": noise(32, 32).half()}, tmp_path / "a.safetensors")
    made = importing.read(tmp_path / "a.safetensors", pipe)
    assert (made.forms, made.multiplied) == ({"lora": 13, "full": 1}, True)
    assert made.adapter.tensors[f"{ONE}.diff"].dtype == torch.float16
    expected = {name: B.double() @ A.double() for name, (A, B) in factors.items()}
    assert_updates(made.adapter, expected | {ONE: noise(32, 32).half()})


def test_a_lokr_of_whole_factors_has_no_scale_whatever_alpha_says(queries, pipe, noise, tmp_path):
    tensors, expected = {}, {}
    for name, (rows, columns) in queries.items():
        w1, w2 = noise(4, 2), noise(rows // 4, columns // 2, seed=1)
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lokr_w1": w1, f"{flat}.lokr_w2": w2, f"{flat}.alpha": torch.tensor(0.25)}
        expected[name] = torch.kron(w1, w2)
    save_file(tensors, tmp_path / "a.safetensors")
    assert_updates(importing.read(tmp_path / "a.safetensors", pipe).adapter, expected)


def test_doras_formula_is_its_papers(noise):
    W, update, m = noise(3, 2).double(), noise(3, 2, seed=1).double(), noise(3, seed=2).double()
    V = W + update
    by_row = torch.stack([m[i] * V[i] / V[i].norm() for i in range(3)]) - W
    assert torch.allclose(decompositions.dora(W, update, m), by_row, atol=1e-15)
    assert torch.allclose(decompositions.dora(W, update, m[:, None]), by_row, atol=1e-15)
    by_column = torch.stack([m[i] * V[:, i] / V[:, i].norm() for i in range(2)], dim=1) - W
    assert torch.allclose(decompositions.dora(W, update, m[None, :2]), by_column, atol=1e-15)


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.fixture
def write(factors, pipe, tmp_path):
    """Write a kohya file with tensors added, changed, or (None) taken out."""

    def write(changes, metadata=None, spelling="kohya"):
        tensors = {**spelled(factors, pipe, spelling), **changes}
        file = tmp_path / "style.safetensors"
        save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata)
        return file

    return write


BLOCK = FLAT.removesuffix("_attn1_to_q")
REFUSED = {
    "style": (
        {f"{BLOCK}_attn1_to_k.{end}": torch.ones(2, 2) for end in ("lora_down.weight", "lora_up.weight")}
        | {f"{BLOCK}_ff_net_0_proj.lora_down.weight": torch.ones(2, 2)},
        r"changes 2 modules that are no part of Tune-A-Video, first lora_unet_mid.*attn1_to_k.*is not imported",
    ),
    "text": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, "changes 1 modules .* lora_te_"),
    "temporal": ({f"{BLOCK}_attn_temp_to_q.alpha": torch.ones(())}, "from which initial weights they count"),
    "half a LoRA": ({f"{FLAT}.lora_up.weight": None}, "of mid_block.* it has A, which is no whole LoRA"),
    "unread": ({f"{FLAT}.oft_blocks": torch.ones(2, 2)}, "1 tensors of a form that is not read, first .*oft_blocks"),
    "twice": ({f"unet.{ONE}.lora_A.weight": torch.ones(2, 32)}, "which are the same"),
    "rank": ({f"{FLAT}.lora_up.weight": torch.ones(32, 3)}, r"A \[2, 32\], B \[32, 3\]\) do not fit each other"),
    "shape": (
        {f"{FLAT}.lora_up.weight": torch.ones(40, 2)},
        r"has shape \(40, 32\), this base needs \(32, 32\)",
    ),
    "no numbers": ({f"{FLAT}.lora_up.weight": torch.ones(32, 2, dtype=torch.int64)}, "do not fit each other"),
    "alpha 0": ({f"{FLAT}.alpha": torch.zeros(())}, "is 0, which tools read differently"),
    "alphas": ({f"{FLAT}.alpha": torch.ones(2)}, "is no single number"),
    "not finite": ({f"{FLAT}.lora_up.weight": torch.full((32, 2), torch.nan)}, "holds NaN or infinity"),
    "alpha of a diff": (
        {f"{FLAT}.{k}": None for k in ("lora_down.weight", "lora_up.weight")}
        | {f"{FLAT}.diff": torch.ones(32, 32), f"{FLAT}.alpha": torch.ones(())},
        "no whole LoRA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_imported_exactly_is_refused_with_the_reason(what, write, pipe):
    changes, reason = REFUSED[what]
    with pytest.raises(AdapterError, match=reason):
        dict(importing.read(write(changes), pipe).adapter.tensors)


def test_a_style_lora_is_loaded_beside_an_adapter_as_the_refusal_says(
    make_adapter, pipe, flat, noise, tmp_path
):
    style = {
        f"unet.{ONE.replace('to_q', 'to_k')}.lora_{kind}.weight": noise(*shape)
        for kind, shape in {"A": (2, 32), "B": (32, 2)}.items()
    }
    save_file(style, tmp_path / "style.safetensors")
    with pytest.raises(AdapterError, match=r"pipe\.load_lora_weights\(file, name\)"):
        importing.read(tmp_path / "style.safetensors", pipe)
    inputs = noise(1, 4, 2, 4, 4), 500, noise(1, 24, 32)
    pipe.load_adapter(make_adapter("lite"))
    with torch.no_grad():
        before = pipe.unet(*inputs).sample
        pipe.load_lora_weights(tmp_path / "style.safetensors", "style")
        assert (pipe.unet(*inputs).sample - before).abs().max() > 1e-3


def test_an_alpha_that_metadata_contradict_is_refused(write, pipe):
    said = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    for alpha, agree in ((4.0, True), (2.0, False)):
        file = write({f"unet.{ONE}.alpha": torch.tensor(alpha)}, said, spelling="diffusers")
        if agree:
            assert importing.read(file, pipe).adapter.peft_config["lora_alpha"] == 4
        else:
            with pytest.raises(AdapterError, match=r"alpha is 2, its config says 4"):
                importing.read(file, pipe)


def test_dora_needs_the_bases_weights(make_adapter, write, header_of, noise, pipe, tmp_path):
    exported = header_of(write({}, {"a": "b"}))
    assert exported == {"a": "b"}
    file = write({f"{FLAT}.dora_scale": noise(32, 1).abs()})
    with pytest.raises(AdapterError, match="Name it with --base"):
        importing.read(file)
    assert importing.read(file, pipe).forms == {"lora": 13, "lora with DoRA": 1}


def test_a_base_with_adapters_is_refused(write, make_adapter, pipe):
    pipe.load_adapter(make_adapter("lite"))
    with pytest.raises(AdapterError, match="Unload them before importing"):
        importing.read(write({}), pipe)


def test_another_base_than_the_one_that_the_file_names_is_refused(make_adapter, pipe, tmp_path):
    from tav_peft.formats import kohya

    file = kohya.write(make_adapter("lite"), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"says that it was tuned on tiny, which is not tiny\. Leave"):
        importing.read(file, pipe)


@pytest.mark.parametrize("change", ["rank", "alpha", "form", "missing"])
def test_a_file_of_ours_that_another_tool_changed_is_refused(change, make_adapter, header_of, tmp_path):
    from tav_peft.formats import kohya

    file = kohya.write(make_adapter("lite"), tmp_path / "a.safetensors")
    tensors, header = load_file(file), header_of(file)
    down, up, alpha = (f"{FLAT}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    if change == "rank":
        tensors[down], tensors[up] = tensors[down][:1].clone(), tensors[up][:, :1].clone()
    elif change == "alpha":
        tensors[alpha] = torch.tensor(7.0)
    elif change == "form":
        tensors = {name.replace(".alpha", ".diff"): torch.ones(32, 32) for name in tensors if "alpha" in name}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(FLAT)}
    save_file(tensors, file, header)
    reason = "tensors are missing" if change == "missing" else "contradicts itself"
    with pytest.raises(AdapterError, match=reason):
        importing.read(file)


def test_pickles_are_left_to_runs(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "lora.bin")
    assert importing.recognise(tmp_path / "lora.bin") == "official"


def test_stock_peft_reads_what_it_wrote_as_we_do(flat, base, pipe, output, tmp_path):
    peft_folder(flat, PEFT["patterns"], tmp_path)
    plain = UNet2DConditionModel.from_pretrained(base / "unet")
    theirs = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(base / "unet"), tmp_path)
    updates = Updates(lora.read(tmp_path, pipe).adapter, "it")
    with torch.no_grad():
        for name in updates:
            plain.get_parameter(name).add_(updates[name])
    assert (output(plain) - output(theirs)).abs().max() <= 1e-5
