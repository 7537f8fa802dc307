"""The initial T-Attn: a stream of numbers that may never change, since LoRAs on T-Attn count from it."""

import hashlib

import pytest
import torch

from tav_peft.unet import philox, temporal_init
from tav_peft.unet.temporal_init import fingerprint, initial, uniform

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"
KEY = QUERY.replace("to_q", "to_k")
MASK = 2**64 - 1


def block(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64-10 of one counter, as in Salmon et al. 2011, figure 3 and section 4.3."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & MASK, (first >> 64) ^ c3 ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("seed", [0, 33])
def test_numbers_are_those_of_the_published_generator(seed):
    digest = hashlib.sha256(f"philox-uniform-1:{seed}:{QUERY}".encode()).digest()
    key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    words = [word for n in range(4) for word in block([n + 1, 0, 0, 0], key)]
    expected = [
        ((word >> 40) / 2**23 - 1) / 4 for word in words
    ]  # 24 bits each, to [-1/sqrt(16), 1/sqrt(16))
    assert uniform(QUERY, (1, 16), seed)[0].tolist() == expected


def test_the_first_numbers_never_change():
    assert temporal_init.NAME == "philox-uniform-1"
    assert uniform(QUERY, (2, 16), 0)[0, :4].tolist() == [
        -0.2188795804977417,
        0.15645059943199158,
        -0.13362550735473633,
        0.13616713881492615,
    ]
    assert uniform(QUERY, (2, 16), 33)[1, :2].tolist() == [0.1586439609527588, 0.09381169080734253]
    assert uniform(KEY, (8, 320), 0)[0, :2].tolist() == [-0.03295135498046875, -0.05531558766961098]
    shapes = {QUERY: torch.Size([16, 16]), KEY: torch.Size([16, 16])}
    assert fingerprint(shapes, 0) == "943267f73c05dd66d8b1d629363f2690588b2dc9783517a261eaefeb502be51f"


def test_a_longer_draw_starts_with_the_shorter_one():
    assert torch.equal(uniform(QUERY, (8, 16), 0)[:2], uniform(QUERY, (2, 16), 0))


def test_every_name_and_every_seed_has_its_own_numbers():
    draws = [uniform(name, (16, 16), seed) for name in (QUERY, KEY) for seed in (0, 1)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert not (one == other).any()


def test_numbers_do_not_depend_on_the_order_of_drawing_nor_on_torchs_seed():
    torch.manual_seed(1)
    query, key = uniform(QUERY, (4, 8), 0), uniform(KEY, (4, 8), 0)
    torch.manual_seed(2)
    assert torch.equal(uniform(KEY, (4, 8), 0), key)
    assert torch.equal(uniform(QUERY, (4, 8), 0), query)


def test_numbers_are_uniform_in_the_range_of_nn_linear():
    draw = uniform(QUERY, (320, 320), 0) * 320**0.5
    assert draw.min() >= -1
    assert draw.max() <= 1
    deviation = 320 * 320
    assert abs(draw.mean().item()) < 4 * (1 / 3 / deviation) ** 0.5
    assert abs(draw.square().mean().item() - 1 / 3) < 4 * (4 / 45 / deviation) ** 0.5
    counts = torch.histc(draw, bins=20, min=-1, max=1)
    expected = deviation / 20
    assert ((counts - expected).square() / expected).sum() < 50  # chi squared of 19 degrees: 1 in 10,000
    neighbours = (draw[:, 1:] * draw[:, :-1]).mean().item() * 3
    assert abs(neighbours) < 4 / deviation**0.5


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("attn_temp.to_out.0.weight", 0),
        ("attn_temp.to_out.0.bias", 0),
        ("norm_temp.weight", 1),
        ("norm_temp.bias", 0),
    ],
)
def test_output_and_norm_start_as_an_identity(kind, value):
    shape = torch.Size([4, 4] if "to_out.0.weight" in kind else [4])
    tensor = initial(f"mid_block.attentions.0.transformer_blocks.0.{kind}", shape, 0)
    assert torch.equal(tensor, torch.full(shape, float(value)))


def test_the_hash_changes_with_seed_name_and_shape_but_not_with_order():
    shapes = {QUERY: torch.Size([16, 16]), KEY: torch.Size([16, 16])}
    own = fingerprint(shapes, 0)
    assert fingerprint(dict(reversed(shapes.items())), 0) == own
    assert fingerprint(shapes, 1) != own
    assert fingerprint({QUERY: shapes[QUERY]}, 0) != own
    assert fingerprint({**shapes, KEY: torch.Size([8, 32])}, 0) != own


def test_a_drawing_that_differs_in_one_number_has_another_hash(monkeypatch):
    shapes = {QUERY: torch.Size([320, 320])}
    own, draw = fingerprint(shapes, 0), philox.unit

    def differ(name, count):
        numbers = draw(name, count)
        numbers[7] += 2**-23
        return numbers

    monkeypatch.setattr(philox, "unit", differ)
    assert fingerprint(shapes, 0) != own


def test_hashing_draws_16_rows_of_each_weight_since_that_is_done_at_every_loading(monkeypatch):
    drawn, draw = [], philox.unit
    monkeypatch.setattr(philox, "unit", lambda name, count: drawn.append(count) or draw(name, count))
    fingerprint({QUERY: torch.Size([1280, 1280]), KEY: torch.Size([8, 320])}, 0)
    assert sorted(drawn) == [8 * 320, 16 * 1280]
