"""WINO: what its shadows see, when a token is revoked, and that it always ends."""

import csv
import dataclasses
import itertools
import math

import pytest
import torch
from pairs import STOP, TRACES, left_padded, new_tokens, trace_prompts, trace_sampler
from paths import ROOT
from states import state_of
from thinned import thinned
from torch import Tensor
from toy import tiny_pair, toy
from transformers import Qwen2Config, Qwen2ForCausalLM

from apd import WINO, APDSampler, Blocks, Confidence, MaskedDiffusionDrafter, Threshold, load_drafter
from apd.decoding.state import DecodeState
from apd.decoding.window import AllMasks, Window
from apd.included.tasks import instances
from apd.models.ideal import IdealListModel
from benchmarks.parallelbench.theory import shuffle_accuracy

DRAFTERS = {
    "dream": (TRACES / "models/dream", None),
    "llada": (TRACES / "models/llada", None),
    "a2d-qwen3": (TRACES.parent / "parity_a2d_qwen3", 60),
}
SETTINGS = [WINO(0.3, 0.9), WINO(0.2, 0.6, 7), WINO(0.0, 1.0, 16), WINO(0.5, 0.9, 5), WINO(1.0, 1.0, 6)]
FALSE_ALARM = 1e-6


@pytest.fixture(scope="module", params=DRAFTERS)
def sampler(request):
    path, mask_token_id = DRAFTERS[request.param]
    return APDSampler(load_drafter(path, mask_token_id=mask_token_id), mixture_weight=1.0)


def prompts():
    """The recorded prompts, kept below the smaller vocabularies."""
    return [[token % 59 for token in prompt] for prompt in trace_prompts()]


def generate(sampler, *, length=24, eos_token_id=None, **kwargs):
    return sampler.generate(
        **left_padded(prompts(), pad=58),
        max_new_tokens=length,
        eos_token_id=eos_token_id,
        pad_token_id=58,
        return_dict_in_generate=True,
        **kwargs,
    )


# --- Shadows


def half_decided(drafter, *, length: int = 12, num_ids: int = 30) -> DecodeState:
    """A ragged batch with tokens here and there behind the prompt; row 2 has none, row 3 is shorter than the others."""
    generator = torch.Generator().manual_seed(5)
    padding = torch.tensor([0, 3, 1, 4])
    end = 7 + torch.tensor([length, length, length, length - 3])
    tokens = torch.randint(num_ids, (4, 7 + length), generator=generator)
    column = torch.arange(tokens.shape[1])
    decided = (torch.rand(tokens.shape, generator=generator) < 0.5) | (column < 7)
    decided[2, 7:] = False
    decided[:, 7] = False  # so that the window starts there in every row
    decided |= column >= end[:, None]
    tokens[~decided | (column >= end[:, None])] = drafter.mask_token_id
    return state_of(tokens, decided, prompt_end=7, end=end, padding=padding)


def masked_in_turn(session, state: DecodeState, window: Window) -> Tensor:
    """What `leave_one_out_logits` is about, one forward per column: `b m v`."""
    logits = session.logits(state, window)[:, :].clone()
    for j in range(window.columns.shape[1]):
        column = window.columns[:, j : j + 1]
        tokens = state.tokens.scatter(1, column, session.drafter.mask_token_id)
        logits[:, j] = session.logits(dataclasses.replace(state, tokens=tokens), window)[:, :][:, j]
    return logits


@pytest.mark.parametrize("attention", ["grouped_sdpa", "sdpa", "eager"])
def test_masks_do_not_attend_to_the_shadows(sampler, attention):
    drafter = sampler.drafter
    before = drafter.model.config._attn_implementation
    drafter.model.config._attn_implementation = attention
    try:
        state = half_decided(drafter)
        window, session = AllMasks().window(state), drafter.open(state)
        masks = window.inside & ~window.gather(state.decided)
        expected, logits = session.logits(state, window)[:, :], session.leave_one_out_logits(state, window)[:, :]
    finally:
        drafter.model.config._attn_implementation = before
    torch.testing.assert_close(logits[masks], expected[masks], atol=1e-5, rtol=0)
    decided = window.inside & ~masks
    assert logits[decided].isfinite().all()
    assert (logits - expected)[decided].abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["grouped_sdpa", "sdpa", "eager"])
@pytest.mark.parametrize("logit_shift", [0, 1])
@pytest.mark.parametrize("layers", [1, 3])
def test_shadows_leave_exactly_one_out_in_one_layer(layers, logit_shift, attention):
    """In more layers the others' states have seen the token: close, not equal."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.35,
        attn_implementation=attention,
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    model.config.is_causal = False
    drafter = MaskedDiffusionDrafter(model, mask_token_id=31, logit_shift=logit_shift)
    state = half_decided(drafter)
    window, session = AllMasks().window(state), drafter.open(state)
    exact, shadows = masked_in_turn(session, state, window), session.leave_one_out_logits(state, window)[:, :]
    gap = (exact - shadows)[window.inside].abs().max()
    assert gap < 1e-5 if layers == 1 else gap > 1e-3
    assert (exact - session.logits(state, window)[:, :])[
        window.inside
    ].abs().max() > 1e-2  # one left out is no small matter


def test_the_exact_model_leaves_exactly_one_out():
    model = toy()
    contexts = torch.tensor(list(itertools.product(range(model.vocab_size), repeat=model.length)))
    contexts = contexts[(contexts == model.mask_token_id).any(1)]
    tokens = torch.cat([torch.zeros(len(contexts), 1, dtype=torch.int64), contexts], 1)
    decided = tokens != model.mask_token_id
    state = state_of(tokens, decided, prompt_end=1)
    window = AllMasks().window(state)
    probs = model.drafter.open(state).leave_one_out_logits(state, window).softmax(-1)
    for row, (context, start) in enumerate(zip(contexts.tolist(), state.frontier.tolist(), strict=True)):
        for position in range(start - 1, model.length):
            expected = conditional(model, [*context[:position], model.mask_token_id, *context[position + 1 :]])[
                position
            ]
            torch.testing.assert_close(
                probs[row, position - start + 1, : model.mask_token_id], torch.tensor(expected), atol=1e-6, rtol=0
            )


# --- The rule, once more by hand


def step_by_hand(wino: WINO, stands: dict[int, float], masks: dict[int, float], before: int) -> tuple[set, set]:
    """Positions to unmask and to mask again, from the probabilities of decided and of drafted tokens."""
    most = min(max(int(len(masks) * 0.7), 5), 20)
    ranked = sorted(masks, key=lambda i: (-masks[i], i))
    unmasked = {i for i in ranked[:most] if masks[i] > wino.threshold} or {ranked[0]}
    doubted = sorted((i for i in stands if stands[i] < wino.revoke_below), key=lambda i: (stands[i], i))
    return unmasked, set(doubted[: max(0, before - 1)] if len(unmasked) > 1 else ())


def wino_by_hand(drafter, prompt: list[int], length: int, wino: WINO) -> tuple[list[int], list[int], int]:
    """One row: new tokens, tokens committed by each forward, and how many were revoked."""
    canvas = torch.tensor([prompt + [drafter.mask_token_id] * length])
    counts, revoked = [], 0
    for first in range(0, length, wino.length):
        block = range(first, min(first + wino.length, length))
        before = 0
        while True:
            decided = canvas != drafter.mask_token_id
            frontier = torch.tensor([len(prompt)])
            state = state_of(canvas.clone(), decided, prompt_end=len(prompt), frontier=frontier)
            columns = torch.arange(len(prompt), len(prompt) + length)[None]
            window = Window(columns, columns >= 0, [len(prompt)], [len(prompt) + length])
            with torch.no_grad():
                logits = drafter.open(state).leave_one_out_logits(state, window)[:, :][0].float()
            logits[:, drafter.mask_token_id] = -torch.inf
            probs = logits.softmax(-1)
            is_mask = [bool(canvas[0, len(prompt) + i] == drafter.mask_token_id) for i in range(length)]
            masks = {i: float(probs[i].max()) for i in block if is_mask[i]}
            stands = {i: float(probs[i, canvas[0, len(prompt) + i]]) for i in block if not is_mask[i]}
            unmasked, again = step_by_hand(wino, stands, masks, before)
            for i in unmasked:
                canvas[0, len(prompt) + i] = probs[i].argmax()
            for i in again:
                canvas[0, len(prompt) + i] = drafter.mask_token_id
            before, revoked = len(unmasked), revoked + len(again)
            is_full = not (set(masks) - unmasked | again)
            counts.append(len(block) if is_full else 0)
            if is_full:
                break
    return canvas[0, len(prompt) :].tolist(), counts, revoked


@pytest.mark.parametrize("wino", thinned(SETTINGS), ids=repr)
def test_a_ragged_batch_follows_the_rule(sampler, wino):
    output = generate(sampler, length=24, strategy=wino)
    rows = list(zip(prompts(), new_tokens(output), output.committed_per_step, strict=True))
    num_revoked = 0
    for prompt, tokens, counts in rows[::3]:  # by hand is slow
        *expected, revoked = wino_by_hand(sampler.drafter, prompt, 24, wino)
        assert (tokens, counts) == tuple(expected)
        num_revoked += revoked
    assert num_revoked > 0 or wino.threshold > 0.3  # or the test would say little


def conditional(model: IdealListModel, known: list[int]) -> list[list[float]]:
    """p(token | known) at every position; one token is as good as another where no answer fits."""
    totals = [[0.0] * model.mask_token_id for _ in known]
    for answer, weight in zip(model.answers.tolist(), model.weights.tolist(), strict=True):
        if all(k in (model.mask_token_id, a) for k, a in zip(known, answer, strict=True)):
            for i, token in enumerate(answer):
                totals[i][token] += weight
    return [
        [w / sum(row) for w in row] if sum(row) else [1 / model.mask_token_id] * model.mask_token_id for row in totals
    ]


def all_decodings(model: IdealListModel, wino: WINO) -> tuple[dict[tuple[int, ...], float], float]:
    """Every answer of one block with its probability, and the expected forwards, when each step draws afresh."""
    mask = model.mask_token_id
    waiting, finals, forwards = {((mask,) * model.length, 0): 1.0}, {}, 0.0
    while waiting:
        (canvas, before), prob = waiting.popitem()
        forwards += prob
        masks = [i for i, token in enumerate(canvas) if token == mask]
        probs = [conditional(model, [*canvas[:i], mask, *canvas[i + 1 :]])[i] for i in range(model.length)]
        stands = {i: probs[i][canvas[i]] for i in range(model.length) if i not in masks}
        for draw in itertools.product(range(mask), repeat=len(masks)):
            drafted = dict(zip(masks, draw, strict=True))
            chance = prob * math.prod(probs[i][token] for i, token in drafted.items())
            if not chance:
                continue
            unmasked, again = step_by_hand(wino, stands, {i: probs[i][t] for i, t in drafted.items()}, before)
            after = tuple(
                mask if i in again else drafted[i] if i in unmasked else token for i, token in enumerate(canvas)
            )
            if mask in after:
                key = (after, len(unmasked))
                waiting[key] = waiting.get(key, 0.0) + chance
            else:
                finals[after] = finals.get(after, 0.0) + chance
    return finals, forwards


def decode(model: IdealListModel, wino: WINO, rows: int) -> tuple[Tensor, Tensor]:
    """New tokens, `rows n`, and forwards, `rows`, at temperature 1."""
    output = APDSampler(model.drafter, mixture_weight=1.0).generate(
        torch.zeros(rows, 1, dtype=torch.int64),
        max_new_tokens=model.length,
        strategy=wino,
        do_sample=True,
        top_k=0,
        noise="step",
        seed=list(range(rows)),
        return_dict_in_generate=True,
    )
    return output.sequences[:, 1:], output.drafter_forwards.double()


@pytest.mark.parametrize(
    "wino",
    [WINO(0.3, 0.9), *(pytest.param(each, marks=pytest.mark.slow) for each in (WINO(0.35, 0.4), WINO(0.4, 0.0)))],
    ids=repr,
)
def test_sampled_answers_have_the_enumerated_probabilities(wino):
    """Pearson's chi-square over 81 answers, and Hoeffding's bound on the mean of the forwards."""
    model, rows = toy(), 8000
    finals, forwards = all_decodings(model, wino)
    assert math.isclose(sum(finals.values()), 1)
    tokens, steps = decode(model, wino, rows)
    counts = {answer: 0 for answer in finals}
    for answer in map(tuple, tokens.tolist()):
        counts[answer] += 1
    common = [answer for answer, prob in finals.items() if prob * rows >= 5]
    statistic = sum((counts[a] - rows * finals[a]) ** 2 / (rows * finals[a]) for a in common)
    freedom = torch.tensor((len(common) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)) > FALSE_ALARM
    slack = (model.length - 1) * math.sqrt(math.log(2 / FALSE_ALARM) / (2 * rows))
    assert abs(steps.mean() - forwards) < slack


@pytest.mark.parametrize(
    ("n", "threshold", "schedule"),
    [(6, 0.0, [5, 1]), (6, 0.3, [1, 1, 1, 3]), (6, 0.5, [1] * 6), (4, 0.0, [4]), (5, 0.22, [1, 4])],
)
def test_on_shuffle_nothing_is_reviewed_in_time(n, threshold, schedule):
    """Two steps of two tokens or more are what it takes, and up to six items there is only one: the schedule decides."""
    model, rows = IdealListModel.shuffle(n), 1000
    tokens, steps = decode(model, WINO(threshold), rows)
    assert steps.tolist() == [len(schedule)] * rows
    expected, share = shuffle_accuracy(schedule), float(model.is_valid(tokens).double().mean())
    assert abs(share - expected) < math.sqrt(math.log(2 / FALSE_ALARM) / (2 * rows))
    assert expected < 1 or share == 1


def test_where_one_choice_is_rare_revoking_pays():
    """Replace Random, 8 items: keeping every item is likely at each place, and wrong at all of them together."""
    model = IdealListModel.replace_random(8)
    shares, forwards = [], []
    for revoke_below in (0.0, 0.9):
        tokens, steps = decode(model, WINO(0.6, revoke_below), 1000)
        shares.append(float(model.is_valid(tokens).double().mean()))
        forwards.append(float(steps.mean()))
    assert shares[0] < 0.75 and shares[1] > 0.97
    assert forwards[0] < 3 and 4.5 < forwards[1] < 5.5


def test_the_page_says_what_the_records_say():
    page = (ROOT / "docs/parallelbench.md").read_text()
    with (ROOT / "benchmarks/results/parallelbench-embedded/dependent/results.csv").open() as file:
        cells = {
            (row["strategy"], row["task"]): f"{float(row['accuracy']):.0f} @ {float(row['tpf']):.2f}"
            for row in csv.DictReader(file)
        }
    told = page[page.index("## Does it help to revoke?") : page.index("## PBx and AUP")]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in told.splitlines() if "|" in line]
    (_, *tasks), _, *rows = rows
    assert len(rows) == 5
    for spec, *numbers in rows:
        assert numbers == [cells[spec, task] for task in tasks]


# --- What holds whatever the model says


@pytest.mark.parametrize("wino", [WINO(0.0, 1.0), WINO(0.1, 1.0, 9), WINO(0.05, 0.5)], ids=repr)
@pytest.mark.parametrize("length", [1, 13, 64])
def test_it_takes_no_more_forwards_than_tokens(wino, length):
    """A random model, of which nothing is believed: all that may be revoked is."""
    drafter, _ = tiny_pair()
    output = APDSampler(drafter, mixture_weight=1.0).generate(
        torch.arange(12).view(4, 3),
        max_new_tokens=length,
        strategy=wino,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert output.new_tokens.tolist() == [length] * 4
    assert output.drafter_forwards.max() <= length
    if length == 64 and wino.revoke_below == 1:
        assert output.drafter_forwards.min() > 8  # twenty at a time it would be four, six and eight


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 0}])
def test_without_revoking_it_is_a_threshold(sampler, sampling):
    """In blocks so short that no more than all could be unmasked. No probability here is the threshold itself."""
    common = {"seed": 3, **sampling}
    output = generate(sampler, strategy=WINO(0.3, 0.0, 5), **common)
    expected = generate(sampler, strategy=Blocks(Threshold(0.3), 5), **common)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.drafter_forwards, expected.drafter_forwards)
    assert output.drafter_forwards.sum() < output.new_tokens.sum()


def test_where_nothing_passes_it_is_one_token_per_step(sampler):
    output = generate(sampler, strategy=WINO(1.0, 1.0, 8))
    expected = generate(sampler, strategy=Blocks(Confidence(1), 8))
    assert torch.equal(output.sequences, expected.sequences)
    assert output.drafter_forwards.tolist() == output.new_tokens.tolist() == [24] * 6


@pytest.mark.parametrize("sampling", thinned([{"do_sample": True, "top_k": 0}, {}], 2))
@pytest.mark.parametrize("window_size", [None, 6])
def test_rows_of_every_family_do_not_depend_on_their_batch(sampler, sampling, window_size):
    common = {
        "max_new_tokens": 16,
        "strategy": WINO(0.2, 0.9, 12),
        "window_size": window_size,
        "eos_token_id": [41, 17],
        "pad_token_id": 58,
        "return_dict_in_generate": True,
        **sampling,
    }
    batch = sampler.generate(**left_padded(prompts(), pad=58), seed=list(range(6)), **common)
    for i in (0, 5):
        alone = sampler.generate(torch.tensor([prompts()[i]]), seed=[i], **common)
        assert new_tokens(batch)[i] == new_tokens(alone)[0]
        assert batch.drafter_forwards[i] == alone.drafter_forwards[0]


def test_a_window_is_a_blocks_end():
    pair = trace_sampler()
    assert torch.equal(
        generate(pair, strategy=WINO(0.2, 0.9, 24), window_size=6, length=6).sequences,
        generate(pair, strategy=WINO(0.2, 0.9, 6), length=6).sequences,
    )
    counts = generate(pair, strategy=WINO(0.2, 0.9, 10), window_size=6).committed_per_step
    assert {tuple(filter(None, row)) for row in counts} == {(6, 4, 6, 4, 4)}


# --- Commits are final


def test_a_block_is_streamed_when_it_is_full_and_never_changes():
    sampler = APDSampler.from_included()
    prompts = [instance.prompt for instance in instances("replace_random", 2, seed=0)]
    inputs = sampler.tokenizer(prompts, return_tensors="pt", padding=True)
    common = {**inputs, "max_new_tokens": 32, "strategy": WINO(0.3, 1.0, 8)}
    output = sampler.generate(**common, return_dict_in_generate=True)
    streamed: dict[int, list[int]] = {0: [], 1: []}
    counts: dict[int, list[int]] = {0: [], 1: []}
    for chunk in sampler.stream(**common):
        streamed[chunk.row] += chunk.tokens
        counts[chunk.row].append(len(chunk.tokens))
    assert list(streamed.values()) == new_tokens(output)
    assert list(counts.values()) == output.committed_per_step
    assert all(0 in row for row in counts.values())
    texts = sampler.tokenizer.batch_decode(list(streamed.values()), skip_special_tokens=True)
    assert "".join(chunk.text for chunk in sampler.stream(**common) if chunk.row == 0) == texts[0]


def test_a_row_is_over_with_its_stop_token():
    """Tokens behind the stop token are neither waited for nor returned."""
    sampler = trace_sampler()
    common = {**left_padded(trace_prompts()), "max_new_tokens": 24, "strategy": WINO(0.2, 0.9)}
    whole = sampler.generate(**common, eos_token_id=None, return_dict_in_generate=True)
    output = sampler.generate(**common, eos_token_id=[STOP, 61, 83], return_dict_in_generate=True)
    ended = [tokens[-1] in (STOP, 61, 83) for tokens in new_tokens(output)]
    assert sum(ended) >= 3
    assert not any({STOP, 61, 83} & set(tokens[:-1]) for tokens in new_tokens(output))
    assert (output.drafter_forwards <= whole.drafter_forwards).all()
    assert (output.drafter_forwards < whole.drafter_forwards).any()


def test_steps_that_commit_nothing_are_counted_and_drawn():
    """Counts, bars and pictures include the steps that commit nothing."""
    output = generate(trace_sampler(), strategy=WINO(0.2, 0.9), output_scores=True)
    for row, forwards in zip(output.trace, output.drafter_forwards.tolist(), strict=True):
        assert len(row.committed) == len(row.drafts) == forwards > 1
        assert row.committed[:-1] == [0] * (forwards - 1)
        assert set(row.steps) == {forwards - 1}
        assert all(0 < p <= 1 for p in row.drafter_probs)
    assert f"24 tokens in {forwards} steps" in str(output.trace[-1:])
    assert output.trace.to_html()
    assert len(output.scores) == 24


# --- Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WINO(1.1), r"`threshold` must be in \[0, 1\], got 1.1"),
        (lambda: WINO(0.6, -0.1), r"`revoke_below` must be in \[0, 1\], got -0.1"),
        (lambda: WINO(length=0), "`length` must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_cache_is_refused():
    with pytest.raises(ValueError, match="`kv_window` must be None with WINO"):
        generate(trace_sampler(), strategy=WINO(), kv_window=4)


def test_drafters_without_leave_one_out_are_recognised():
    class Plain:
        """A drafter of somebody's own, with no more than the protocol asks for."""

        def __init__(self, model):
            self.vocab_size, self.mask_token_id = model.vocab_size, model.mask_token_id
            self.max_length, self.device, self.model = None, torch.device("cpu"), model

        def open(self, state):
            return self

        def logits(self, state, window):
            return self.model.drafter.logits(state, window)

        def select(self, rows):
            pass

        def join(self, state):
            pass

    sampler = APDSampler(Plain(toy()), mixture_weight=1.0)
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    assert sampler.generate(prompt, max_new_tokens=4, strategy=Threshold()).shape == (1, 5)
    with pytest.raises(TypeError, match=r"got Plain without `leave_one_out_logits`\. Give its session that method"):
        sampler.generate(prompt, max_new_tokens=4, strategy=WINO())
