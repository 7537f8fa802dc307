"""`tav verify`: each claim on a line, and an exit code that a script can trust."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tav_peft.errors import AdapterError
from tav_peft.verification import Claim

HASH = "0123456789abcdef" * 4
HOLDS = Claim("tensors", "holds", HASH, HASH, "SHA-256")
DIFFERS = Claim("base", "differs", f"epsilon, {HASH}", f"epsilon, {HASH[::-1]}", "tiny")
UNCHECKED = Claim("clip", "not checked", HASH, note="rabbit.mp4 is not near")
NOTED = Claim("versions", "noted", "torch 1.0", "torch 2.0")


def test_a_person_reads_a_line_for_each_claim(library, tav):
    library.claims = [HOLDS, UNCHECKED, NOTED]
    result = tav("verify", "a[1].safetensors")
    assert result.exit_code == 0
    assert [line.split(maxsplit=1) for line in result.stdout.splitlines()] == [
        ["tensors", "holds        0123456789ab…; SHA-256"],
        ["clip", "not checked  0123456789ab…; rabbit.mp4 is not near"],
        ["versions", "noted        torch 1.0; here torch 2.0"],
    ]


def test_what_differs_is_told_with_both_sides_and_fails(library, tav):
    library.claims = [HOLDS, DIFFERS, Claim("file", "differs", note="it was cut short")]
    result = tav("verify", "a.safetensors")
    assert result.exit_code == 1
    assert "differs      claimed epsilon, 0123456789ab…, found epsilon, fedcba987654…; tiny" in result.stdout
    assert "differs      it was cut short" in result.stdout


@pytest.mark.parametrize(("claims", "code"), [([HOLDS, NOTED], 0), ([HOLDS, UNCHECKED], 1), ([DIFFERS], 1)])
def test_strict_fails_on_what_is_not_checked_too(claims, code, library, tav):
    library.claims = claims
    assert tav("verify", "a.safetensors", "--strict").exit_code == code


@pytest.mark.parametrize(("claims", "holds"), [([HOLDS, UNCHECKED], True), ([HOLDS, DIFFERS], False)])
def test_json_is_one_object_with_whole_hashes(claims, holds, library, tav):
    library.claims = claims
    result = tav("verify", "a.safetensors", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if holds else 1)
    assert (told["file"], told["holds"]) == ("a.safetensors", holds)
    assert told["claims"][0] == {
        "name": "tensors", "verdict": "holds", "claimed": HASH, "found": HASH, "note": "SHA-256"
    }  # fmt: skip


def test_the_base_is_the_one_given_or_else_that_of_the_file(library, tav):
    tav("verify", "a.safetensors")
    tav("verify", "a.safetensors", "--base", "other", "--clip", "b.mp4")
    assert library.bases == ["pocket", "other"]
    assert library.verified == [
        (Path("a.safetensors"), library, None),
        (Path("a.safetensors"), library, Path("b.mp4")),
    ]


def test_a_base_that_is_not_here_is_not_downloaded(library, tav, monkeypatch):
    monkeypatch.setattr("tav_peft.bases.at_hand", lambda name: name != "pocket")
    tav("verify", "a.safetensors")
    tav("verify", "a.safetensors", "--base", "pocket")
    assert library.bases == ["pocket"]
    assert [pipe for _, pipe, _ in library.verified] == [None, library]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(None, torch.float32), ("fp32", torch.float32), ("fp16", torch.float32), ("bf16", torch.bfloat16)],
)
def test_the_base_is_opened_in_the_probes_precision_where_that_can_matter(precision, dtype, library, tav):
    library.probe = precision and SimpleNamespace(precision=precision)
    tav("verify", "a.safetensors", "--device", "cpu")
    assert library.openings[0]["dtype"] == dtype


def test_a_file_that_cannot_be_read_needs_no_base(library, tav):
    library.failure = AdapterError("it is damaged")
    library.claims = [Claim("file", "differs", note="it is damaged")]
    result = tav("verify", "a.safetensors")
    assert (result.exit_code, library.bases) == (1, [])
    assert "it is damaged" in result.stdout
