"""How far a column sees is one number; masks, spans, caches and windows follow from it."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from apd import APDSampler, MaskedDiffusionDrafter
from apd.models.horizon import Attention
from apd.models.span import Span

MASK, STOP, VOCABULARY = 23, 22, 24
PADDINGS, STARTS, ENDS, SEEDS = [0, 3, 1], [4, 3, 9], [9, 7, 12], [6, 4, 10]
ATTENTIONS = [
    Attention("full"),
    Attention("causal"),
    Attention("prefix", 4),
    *(Attention("block", size) for size in (1, 2, 4, 64)),
]
KINDS = [("causal", None), ("causal", 3), ("prefix", None), ("prefix", 4), ("block", 1), ("block", 3), ("block", 8)]


def tiny(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "initializer_range": 0.6}
    config = Qwen2Config(vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=1, **sizes)
    return Qwen2ForCausalLM(config).eval()


def drafter(kind, size, shift, **more) -> MaskedDiffusionDrafter:
    return MaskedDiffusionDrafter(
        tiny(), mask_token_id=MASK, logit_shift=shift, attention=kind, block_size=size, **more
    )


@pytest.mark.parametrize("num_cached", [None, 12])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("is_level", [False, True])
def test_a_mask_is_its_definition(is_level, attention, num_cached) -> None:
    paddings, starts, ends = ([0] * 3, [4] * 3, [9] * 3) if is_level else (PADDINGS, STARTS, ENDS)
    seeds = SEEDS if attention.kind == "prefix" else None
    span = Span.of_rows(starts, ends, paddings, torch.device("cpu"), seeds)
    mask = span.mask(num_cached, attention)
    if mask is None:
        assert is_level and attention.kind == "full"
        return
    mask = mask.expand(3, -1, -1, -1)
    keys = range(num_cached) if num_cached else None
    for row, (padding, start, end) in enumerate(zip(paddings, starts, ends, strict=True)):
        columns = keys or range(start, start + span.width)
        for query, (k, key) in itertools.product(range(start, end), enumerate(columns)):
            seen = padding <= key < end
            if attention.kind == "causal":
                seen = seen and key <= query
            if attention.kind == "prefix":
                seen = seen and (key <= query or query >= SEEDS[row])
            if attention.kind == "block":
                block = attention.block_size
                seen = seen and (key - padding) // block <= (query - padding) // block
            assert bool(mask[row, 0, query - start, k]) == seen or (is_level and not padding <= key < end)


@pytest.mark.parametrize(
    ("kind", "shift", "arguments", "told"),
    [
        ("block", 0, {"kv_window": 4}, "`kv_window` must be None with a drafter of attention='block', got 4"),
        (
            "prefix",
            0,
            {"strategy": "wino:0.6"},
            "`strategy` must not predict decided tokens .* 'prefix'|attention='prefix'",
        ),
        ("causal", 1, {"strategy": "confidence:1"}, "`strategy` must decode from left to right with a causal drafter"),
    ],
)
def test_what_means_nothing_for_an_attention_is_refused_at_once(kind, shift, arguments, told) -> None:
    size = 4 if kind == "block" else None
    with pytest.raises(ValueError, match=told):
        APDSampler(drafter(kind, size, shift), tiny(1), **arguments)
    with pytest.raises(ValueError, match=told):
        APDSampler(drafter(kind, size, shift), tiny(1)).generate(torch.tensor([[1, 2]]), pad_token_id=0, **arguments)


def test_kv_window_is_refused_before_weights_are_read(tmp_path) -> None:
    folder = Path(__file__).parents[1] / "fixtures" / "parity_sdar"
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())  # there are no weights
    with pytest.raises(ValueError, match="`kv_window` must be None"):
        APDSampler.from_pretrained(str(tmp_path), mixture_weight=1.0, kv_window=16)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("block", None), "`block_size` must be given with attention='block'"),
        (("full", 4), "`block_size` must be None with attention='full', got 4"),
        (("blok", 4), "`attention` must be one of .*, got 'blok'"),
        (("block", 0), "`block_size` must be at least 1, got 0"),
        (("prefix", None, True), "`block_size` must be given with attention='prefix'"),
        (("block", 4, True), "`anchored` must be False"),
    ],
)
def test_a_senseless_attention_is_refused(arguments, told) -> None:
    with pytest.raises(ValueError, match=told):
        Attention(*arguments)


def call(sampler, prompts, rng, **settings):
    """Ids of each row, of a ragged batch or of prompts that join as rows become free."""
    if rng.random() < 0.3:
        answers = sampler.generate_many(prompts, batch_size=2, **settings)
        return [answer.tokens for answer in answers]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    attention = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return sampler.generate(ids, attention_mask=attention, **settings).tolist()


STRATEGIES = (
    *("confidence:1", "threshold:0.2", "blocks:3/confidence:1", "random:2", "left-to-right:2"),
    *(
        "checked",
        "checked:proposer=drafter",
        "checked:proposer=drafter,c=0.5",
        "checked:proposer=drafter/confidence:1",
    ),
)


def check_a_case(case: int) -> None:
    """One random setting: with the cache and without, the rows are the same."""
    rng = random.Random(case)
    kind, size = rng.choice(KINDS)
    shift = rng.randrange(2)
    strategy = rng.choice((None, None, *STRATEGIES))
    if kind == "causal" and shift and strategy not in (None, "checked", "left-to-right:2"):
        strategy = None
    settings = {
        "max_new_tokens": rng.randint(1, 14),
        "do_sample": rng.random() < 0.6,
        "eos_token_id": STOP if rng.random() < 0.7 else None,
        "window_size": rng.choice((None, None, 1, 3, 5)),
        "seed": rng.randrange(1000),
        "pad_token_id": 0,
        "strategy": strategy,
    }
    if strategy is None:
        settings["mixture_weight"] = rng.choice((0.0, 0.5, 1.0))
        if rng.random() < 0.3:
            settings["window_size"] = "auto"
    verifier = tiny(1)
    prompts = [[rng.randrange(1, 22) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 4))]
    state = rng.getstate()
    rows = []
    for cache in (True, False):
        rng.setstate(state)
        sampler = APDSampler(drafter(kind, size, shift, cache=cache), verifier)
        rows.append(call(sampler, prompts, rng, **settings))
    assert rows[0] == rows[1], (case, kind, size, shift, settings, prompts)


@pytest.mark.parametrize("case", range(6))  # 500 are slow tests, below
def test_a_cache_of_final_keys_is_exact(case) -> None:
    check_a_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_cache_of_final_keys_is_exact_in_500_cases(part) -> None:
    for case in range(1000 + 50 * part, 1050 + 50 * part):
        check_a_case(case)
