"""`tav resize` on real adapters."""

import json
import re

import pytest

from tav_peft.tools.ranks import RankRule
from tav_peft.tools.resizing import resize


@pytest.fixture
def file(make_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_adapter("paper").save(tmp_path / "a.safetensors")


def test_the_result_is_the_librarys_and_a_table_tells_the_errors(file, tav):
    result = tav("resize", "a.safetensors", "--rank", "2", "--preset", "lite", "-o", "b.safetensors")
    assert (result.exit_code, result.stdout) == (0, "b.safetensors\n")
    expected, report = resize("a.safetensors", RankRule(2), preset="lite")
    assert (file.parent / "b.safetensors").read_bytes() == expected.save("c.safetensors").read_bytes()
    rows = {line.split()[0]: line.split()[1:] for line in result.stderr.splitlines() if line.strip()}
    first = report.updates[0]
    assert rows[first.parameter] == ["dense", "2", f"{first.energy:.2%}", f"{first.error:.2%}"]
    assert rows["st_attn"][-1] == f"{report.parts()['st_attn']:.2%}"
    assert rows["all"][-1] == f"{report.error:.2%}"
    assert re.search(r"kB before, .* kB now, preset lite", result.stderr)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [("--energy", "0.9", RankRule(energy=0.9)), ("--frobenius", "0.9", RankRule(frobenius=0.9)),
     ("--sv-ratio", "2", RankRule(sv_ratio=2)), ("--sv-cumulative", "0.5", RankRule(sv_cumulative=0.5))],
)  # fmt: skip
def test_every_rule_can_be_asked_for(option, value, rule, file, tav):
    told = json.loads(tav("resize", "a.safetensors", option, value, "-o", "b.safetensors", "--json").stdout)
    _, report = resize("a.safetensors", rule)
    assert [row["rank"] for row in told["updates"]] == [each.rank for each in report.updates]
    assert (told["error"], told["preset"], told["parts"]) == (report.error, "hybrid", report.parts())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(("-o", "b.safetensors"), 1, "No rank was given"), (("--rank", "0", "-o", "b.safetensors"), 2, "--rank"),
     (("--energy", "2", "-o", "b.safetensors"), 1, "energy 2: give a share"),
     (("--rank", "2", "-o", "a.safetensors"), 2, "a.safetensors is already there")],
)  # fmt: skip
def test_a_mistake_is_told_and_nothing_is_written(arguments, code, message, file, tav):
    result = tav("resize", "a.safetensors", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert [*file.parent.iterdir()] == [file]
