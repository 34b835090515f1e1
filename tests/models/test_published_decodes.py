"""Published decodes, token for token: each family's own rule is a strategy of this library."""

import pytest

from benchmarks.families.decodes import RULES, decodes, load, make
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


def check(folder: str, step: int) -> None:
    if folder in NEWER:
        pytest.skip("this transformers lacks the class")
    loaded, recorded = load(folder), decodes(folder)
    assert len(recorded) == COUNTS[folder]
    for decode in recorded[::step]:
        made = make(decode, loaded)
        assert made.is_equal, (folder, decode, made.tokens)


@pytest.mark.parametrize("folder", RULES)
def test_decodes_equal_the_published_ones(folder) -> None:
    check(folder, 29)


@pytest.mark.slow
@pytest.mark.parametrize("folder", RULES)
def test_all_decodes_equal_the_published_ones(folder) -> None:
    check(folder, 1)
