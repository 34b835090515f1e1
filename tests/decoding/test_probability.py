"""The mathematics of a step on hand-made numbers, and the keyed noise, whose bits are a public contract."""

import math

import pytest
import torch

from apd.decoding.noise import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    Noise,
    keyed_bits,
    keyed_gumbel,
    keyed_uniform,
    mix_seed,
    step_seeds,
)
from apd.decoding.probability import largest, log_normalise, mix

M64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix_finaliser(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def bits_in_plain_python(seed: int, position: int, stream: int, token: int) -> int:
    key = splitmix_finaliser((splitmix_finaliser(seed) + GOLDEN * (position * 4 + stream + 1)) & M64)
    return splitmix_finaliser((key + GOLDEN * (token + 1)) & M64) >> 32


def test_keyed_bits_are_the_documented_hash():
    seeds, positions = [0, 1, 2**63 - 1, 12345], [0, 2, 10**6]
    for stream in (DRAFT, ACCEPT, RESIDUAL):
        bits = keyed_bits(torch.tensor(seeds), torch.tensor([positions] * 4), stream, torch.arange(5))
        for i, seed in enumerate(seeds):
            for j, position in enumerate(positions):
                assert bits[i, j].tolist() == [bits_in_plain_python(seed, position, stream, v) for v in range(5)]


def test_keyed_bits_test_vector():
    """Version 1. These numbers may never change: recorded seeds would mean something else."""
    assert keyed_bits(torch.tensor([1]), torch.tensor([[2]]), DRAFT, torch.arange(3)).tolist() == [
        [[1880143404, 589619419, 2152507911]]
    ]


def test_mix_seed_is_documented_and_keeps_index_zero():
    assert mix_seed(7, 0) == 7
    assert mix_seed(7, 3) == splitmix_finaliser((7 + 3 * GOLDEN) & M64) & (2**63 - 1)
    assert len({mix_seed(7, i) for i in range(1000)}) == 1000


def test_gumbel_noise_has_the_gumbel_distribution():
    """10^6 draws. Mean γ, variance π²/6; false alarm below 1e-9 (6 standard errors each)."""
    g = keyed_gumbel(torch.arange(100), torch.arange(100).expand(100, -1), DRAFT, torch.arange(100)).double()
    assert abs(g.mean() - 0.5772156649) < 6 * math.sqrt(math.pi**2 / 6 / 1e6)
    assert abs(g.var() - math.pi**2 / 6) < 6 * math.sqrt((4.4 * (math.pi**2 / 6) ** 2) / 1e6)
    assert g.isfinite().all()


def test_streams_positions_seeds_and_steps_are_unrelated():
    """Correlations of 10^5 uniforms; false alarm below 1e-9 each (6 standard errors)."""
    seeds, positions = torch.arange(10), torch.arange(100).expand(10, -1)
    base = keyed_uniform(seeds, positions, DRAFT, torch.arange(100))
    others = [
        keyed_uniform(seeds, positions, ACCEPT, torch.arange(100)),
        keyed_uniform(seeds, positions + 1, DRAFT, torch.arange(100)),
        keyed_uniform(seeds + 1, positions, DRAFT, torch.arange(100)),
        keyed_uniform(step_seeds(seeds, torch.ones_like(seeds)), positions, DRAFT, torch.arange(100)),
        base.roll(1, -1),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 6 / math.sqrt(1e5)


def test_uniforms_stay_inside_the_open_interval():
    u = keyed_uniform(torch.arange(1000), torch.zeros(1000, 1, dtype=torch.int64), DRAFT, torch.arange(1000))
    assert u.min() > 0 and u.max() < 1


def test_uniforms_are_the_bits_and_a_half_rounded_once():
    key = torch.arange(1000), torch.arange(100).expand(1000, -1), DRAFT, torch.arange(10)
    exact = (keyed_bits(*key).double() + 0.5) / 2**32
    assert keyed_uniform(*key).equal(exact.float().clamp(max=1 - 2**-24))


def test_loud_tokens_are_those_with_the_most_noise():
    size = 30_000
    noise = Noise(torch.tensor([3, 4]), torch.arange(2).expand(2, -1) + 5, torch.tensor([0, 2]), RESIDUAL)
    everything = keyed_gumbel(noise.seeds, noise.positions, RESIDUAL, torch.arange(size)).flatten(0, 1)
    loud = noise.loud(size)
    assert loud.gumbel.equal(everything.gather(-1, loud.ids))
    assert (everything.scatter(-1, loud.ids, -math.inf) <= loud.bound).all()
    assert 300 < loud.ids.shape[1] < 450  # 2·√v = 346


def test_mix_is_the_normalised_product():
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 5).log_softmax(-1), torch.randn(2, 3, 5).log_softmax(-1)
    mixed = log_normalise(mix(p, q, 0.3))
    product = p.exp() ** 0.3 * q.exp() ** 0.7
    torch.testing.assert_close(mixed.exp(), product / product.sum(-1, keepdim=True))


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 1), (1.0, 0)])
def test_a_weight_of_zero_leaves_a_model_out_even_where_it_is_impossible(weight, expected):
    impossible = torch.tensor([[[0.0, -math.inf]]])
    other = torch.tensor([[[0.25, 0.75]]]).log()
    sources = (other, impossible) if weight == 1 else (impossible, other)
    assert torch.equal(mix(*sources, weight), other)


def test_log_normalise_tells_distributions_from_broken_rows():
    inf = math.inf
    rows = torch.tensor([[1.0, 2.0], [-inf, 0.0], [-inf, -inf], [math.nan, 0.0], [inf, 0.0], [1e30, -1e30]])
    logprobs = log_normalise(rows)
    assert logprobs.isnan().any(-1).tolist() == [False, False, True, True, True, False]
    assert logprobs[2:5].isnan().all()
    assert logprobs[1].tolist() == [-inf, 0.0]


@pytest.mark.parametrize("size", [7, 48, 320], ids=["one stage", "blocks of 16", "blocks of 64"])
def test_the_largest_is_torchs_own_and_shows_what_is_no_distribution(size):
    values = torch.randint(0, 9, (5, 3, size), generator=torch.Generator().manual_seed(0)).float()  # many ties
    values[1, 0], values[1, 1, 5], values[1, 2, 6] = -math.inf, math.inf, math.nan
    values[2, 0, 3], values[2, 0, 5] = math.nan, math.inf
    best, place = largest(values)
    assert place.equal(values.argmax(-1))
    torch.testing.assert_close(best, values.amax(-1), equal_nan=True)
    assert (~best.isfinite()).nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [2, 0]]
