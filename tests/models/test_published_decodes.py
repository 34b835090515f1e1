"""Published decodes, token for token: each family's own rule is a strategy of this library."""

import pytest
from thinned import thinned

from benchmarks.families.decodes import RULES, Decode, decodes, load, make
from benchmarks.families.logits import NEWER

#: How many decodes of a folder can be compared; the others are named in `benchmarks.families.decodes`.
COUNTS = {
    "parity_sdar": 280,
    "parity_sdar_moe": 280,
    "parity_fast_dllm_v2": 141,
    "parity_wedlm": 113,
    "parity_wedlm_qwen3": 113,
    "decode_llada2_moe": 175,
    "parity_sdlm": 224,
    "parity_nemotron": 243,
}


@pytest.mark.parametrize("folder", thinned(RULES, 2))  # all of them are in the slow test below
def test_a_short_decode_of_each_rule_equals_the_published_one(folder) -> None:
    of_rule: dict[str, list[Decode]] = {}
    for decode in recorded_in(folder):
        of_rule.setdefault(decode.rule.split(", threshold")[0], []).append(decode)
    check(folder, [sorted(each, key=lambda decode: decode.passes)[len(each) // 3] for each in of_rule.values()])


@pytest.mark.slow
@pytest.mark.parametrize("folder", RULES)
def test_a_third_of_all_decodes_equals_the_published_ones(folder) -> None:
    """`python -m benchmarks.families --only decodes` makes all of them."""
    check(folder, recorded_in(folder)[1::3])


def recorded_in(folder: str) -> list[Decode]:
    if folder in NEWER:
        pytest.skip("this transformers lacks the class")
    recorded = decodes(folder)
    assert len(recorded) == COUNTS[folder]
    return recorded


def check(folder: str, chosen: list[Decode]) -> None:
    loaded = load(folder)
    for decode in chosen:
        made = make(decode, loaded)
        assert made.is_equal, (folder, decode, made.tokens)
