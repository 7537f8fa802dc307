"""`tav import`: what is asked of the library, and what is said of the result."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tav_peft.adapter import Adapter

COMMAND = ("import", "run", "--base", "sd", "-o", "a.safetensors")


def test_a_run_is_converted_on_its_base(library, tav):
    result = tav(*COMMAND, "--prompt", "a man", "--json")
    assert library.bases == ["sd"]
    assert library.imports == [{"run": Path("run"), "rank": None, "caption": "a man"}]
    details = json.loads(result.stdout)
    assert (details["adapter"], details["bytes"], details["weights"]) == ("a.safetensors", 1300, 5)
    assert (details["preset"], details["prompt"], details["steps"]) == ("paper", "a man", 500)
    assert (details["energy_kept"], details["weights_not_exact"], details["base_checked"]) == ({}, 0, True)
    assert "1.3 kB. Base and adapter give back every tuned weight bit for bit." in result.stderr


def test_with_a_rank_the_energy_of_each_module_is_shown(library, tav):
    result = tav(*COMMAND, "--rank", "4")
    assert library.imports[0]["rank"] == 4
    assert result.stdout == "a.safetensors\n"
    assert "mid_block.attn1.to_q" in result.stderr
    assert "51.24%" in result.stderr
    assert "3 tuned weights are not exactly the run's, by at most 0.00015." in result.stderr
    assert "that sd is the base it was tuned on is not checked" in result.stderr
    details = json.loads(tav(*COMMAND, "--rank", "4", "--overwrite", "--json").stdout)
    assert details["energy_kept"] == {"mid_block.attn1.to_q": 0.51239}
    assert details["largest_deviation"] == 1.5e-4


def test_what_is_there_is_kept_unless_it_may_be_replaced(library, tav):
    Path("a.safetensors").write_text("mine")
    assert tav(*COMMAND).exit_code == 2
    assert Path("a.safetensors").read_text() == "mine"
    assert tav(*COMMAND, "--overwrite").exit_code == 0


def test_of_a_run_the_base_must_be_named(library, tav):
    result = tav("import", "run", "-o", "a.safetensors")
    assert result.exit_code == 2
    assert "a run needs the base that it started from" in result.stderr


def test_a_run_goes_through_an_adapter_and_back(pipe, base, tav, tmp_path):
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    for name, tensor in state.items():
        if ".attn_temp." in name or name.endswith(("attn1.to_q.weight", "attn2.to_q.weight")):
            tensor.add_(torch.linspace(-1e-3, 2e-3, tensor.numel()).reshape(tensor.shape))
    (tmp_path / "run" / "unet").mkdir(parents=True)
    torch.save(state, tmp_path / "run" / "unet" / "diffusion_pytorch_model.bin")
    run, adapter, folder = (str(tmp_path / name) for name in ("run", "a.safetensors", "folder"))
    made = json.loads(tav("import", run, "--base", str(base), "-o", adapter, "--json").stdout)
    assert (made["weights_not_exact"], made["base"], made["base_checked"]) == (0, "tiny", True)
    assert made["weights"] == sum(t.numel() for t in Adapter.load(adapter).tensors.values())
    result = tav("export", adapter, "--to", "official", "--base", str(base), "-o", folder)
    assert result.exit_code == 0, result.stderr
    back = torch.load(Path(folder) / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_what_is_no_run_is_one_line(base, tav, tmp_path):
    result = tav("import", str(tmp_path), "--base", str(base), "-o", str(tmp_path / "a.safetensors"))
    assert result.exit_code == 1
    assert "so it is no finished run of the original code" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# -- LoRAs, with the library itself ------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya", "lycoris"])
def test_what_export_wrote_needs_no_base(to, make_adapter, tav, tmp_path):
    file, lora, back = (
        str(tmp_path / name) for name in ("a.safetensors", "lora.safetensors", "b.safetensors")
    )
    make_adapter("lite").save(file)
    assert tav("export", file, "--to", to, "-o", lora).exit_code == 0
    result = tav("import", lora, "-o", back, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["format"], told["base"], told["prompt"]) == (to, "tiny", "a square")
    assert told["modules"] == {"peft": {}, "lycoris": {"full": 14}}.get(to, {"lora": 14})
    assert told["weights"] == sum(tensor.numel() for tensor in Adapter.load(back).tensors.values())
    assert "Nothing is lost." in result.stderr


def test_a_file_that_does_not_say_its_base_is_imported_on_the_one_that_is_named(
    make_adapter, base, tav, tmp_path
):
    lora, back = tmp_path / "lora.safetensors", str(tmp_path / "b.safetensors")
    queries = {n: t for n, t in make_adapter("lite").tensors.items() if ".attn_temp." not in n}
    save_file({f"unet.{name}": tensor for name, tensor in queries.items()}, lora)
    without = tav("import", str(lora), "-o", back)
    assert without.exit_code == 1
    assert "does not say what it was tuned on. Name it with --base." in without.stderr
    result = tav("import", str(lora), "--base", str(base), "--prompt", "a man", "-o", back, "--json")
    told = json.loads(result.stdout)
    assert (told["format"], told["base"], told["prompt"]) == ("diffusers", "tiny", "a man")
    adapter = Adapter.load(back)
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in queries.items())
    assert adapter.provenance.clip.fingerprint == ""


def test_a_rank_is_for_runs(make_adapter, tav, tmp_path):
    file = make_adapter("lite").save(tmp_path / "a.safetensors")
    result = tav("import", str(file), "--rank", "2", "-o", str(tmp_path / "b.safetensors"))
    assert result.exit_code == 2
    assert "is no run. Import it, then use tav resize." in result.stderr
