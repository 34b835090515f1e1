"""What callers hook into a decode: processors, grammars, stopping criteria, scores. All exact, since commitment goes
from left to right."""

from itertools import chain, pairwise, product

import pytest
import torch
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler
from thinned import thinned
from toy import tiny_pair
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from apd import APDSampler, Confidence, LeftToRight
from apd.decoding.noise import DRAFT, keyed_gumbel

PROMPTS = left_padded(trace_prompts())
HISTORY = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [118, 79]]}
SAMPLED = {"do_sample": True, "top_k": 0, "temperature": 0.8}


def generate(**kwargs):
    usual = {**PROMPTS, "max_new_tokens": 16, "eos_token_id": STOP, "return_dict_in_generate": True}
    return trace_sampler().generate(**(usual | kwargs))


def plain_loop(prompt, seed, processors, *, temperature, length=16, window_size=None):
    """Token by token from the drafter, the same processors and noise; what one token per step must equal."""
    drafter, tokens = trace_sampler().drafter, list(prompt)
    while len(tokens) < len(prompt) + length and tokens[len(prompt) :][-1:] != [STOP]:
        left = len(prompt) + length - len(tokens)
        masks = [drafter.mask_token_id] * (left if window_size is None else min(left, window_size))
        with torch.no_grad():
            logits = drafter.model(torch.tensor([tokens + masks])).logits[0, len(tokens) - 1].float().clone()
        logits[drafter.mask_token_id] = -torch.inf
        for processor in processors:
            logits = processor(torch.tensor([tokens]), logits[None])[0]
        scores = logits.log_softmax(-1)
        if temperature:
            noise = keyed_gumbel(
                torch.tensor([seed]), torch.tensor([[len(tokens)]]), DRAFT, torch.arange(len(logits))
            )[0, 0]
            scores = scores / temperature + noise
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
@pytest.mark.parametrize("one_per_step", [{"acceptance_threshold": 1.0}, {"strategy": LeftToRight(1)}])
def test_one_token_per_step_equals_a_plain_loop_with_the_same_processors(sampling, one_per_step):
    processors = [RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(2)]
    prompts, seeds = trace_prompts()[::2], [0, 2, 4]
    call = {**left_padded(prompts), "seed": seeds, **one_per_step, **sampling}
    output = generate(logits_processor=processors, **call)
    for row, prompt, seed in zip(new_tokens(output), prompts, seeds, strict=True):
        assert row == plain_loop(prompt, seed, processors, temperature=sampling.get("temperature", 0.0))
    plain = generate(**call)
    assert new_tokens(output) != new_tokens(plain)


@pytest.mark.parametrize("knobs", [{}, {"mixture_weight": 0.0, "correction": True}, {"acceptance": "rejection"}])
@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_processors_hold_wherever_a_token_comes_from(knobs, sampling):
    """Drafted, corrected or from the residual: no bigram twice, no bad word, though many tokens come at once."""
    output = generate(**HISTORY, seed=3, **knobs, **sampling)
    assert output.tokens_per_forward.max() > 1
    for row, prompt in zip(new_tokens(output), trace_prompts(), strict=True):
        text = prompt + row
        bigrams = list(zip(text[len(prompt) - 1 :], text[len(prompt) :], strict=False))
        assert len(set(bigrams)) == len(bigrams)
        assert 5 not in row
        assert (118, 79) not in pairwise(row)


class Recorded(LogitsProcessor):
    """Notes the histories it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1
        self.seen.append(tuple(input_ids[0].tolist()))
        return scores


def test_a_processor_sees_the_row_without_padding_and_exactly_what_precedes():
    processor = Recorded()
    output = generate(logits_processor=[processor])
    rows = [tuple(p + r) for p, r in zip(trace_prompts(), new_tokens(output), strict=True)]
    for prompt, row in zip(trace_prompts(), rows, strict=True):
        histories = [seen for seen in processor.seen if seen[: len(prompt)] == tuple(prompt)]
        assert histories
        for end in range(len(prompt), len(row)):  # every committed token was decided with exactly its prefix
            assert row[:end] in histories
    assert generate().sequences.equal(output.sequences)


def test_processors_that_ignore_the_history_stay_vectorised():
    class Removes(LogitsProcessor):
        history_free = True

        def __call__(self, input_ids, scores):
            assert input_ids is None
            return scores.index_fill(-1, torch.tensor([125]), -torch.inf)

    output = generate(logits_processor=[Removes(), SuppressTokensLogitsProcessor([61])])
    assert not {125, 61} & set(chain(*new_tokens(output)))
    assert output.sequences.equal(generate(suppress_tokens=[125, 61]).sequences)


def test_warpers_among_the_processors_warp_draft_and_mixture():
    both = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(5)]
    given = generate(do_sample=True, top_k=0, logits_processor=both, seed=1)
    assert given.sequences.equal(generate(do_sample=True, temperature=0.8, top_k=5, seed=1).sequences)


def test_processors_get_float32_from_half_precision_models():
    """As in transformers; a small bias on bfloat16 logits would round away."""
    seen = set()

    class Notes(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.add(scores.dtype)
            return scores

    drafter, verifier = tiny_pair()
    drafter.model.bfloat16(), verifier.model.bfloat16()
    APDSampler(drafter, verifier).generate(torch.tensor([[1, 2]]), max_new_tokens=4, logits_processor=[Notes()])
    assert seen == {torch.float32}


def test_stateful_processors_are_refused_by_name():
    watermark = SynthIDTextWatermarkLogitsProcessor(5, [1, 2, 3], 2**16, 0, 1024, "cpu")
    with pytest.raises(ValueError, match="got SynthIDTextWatermarkLogitsProcessor"):
        generate(logits_processor=[watermark])


def test_processors_that_need_the_history_are_refused_in_any_order():
    with pytest.raises(ValueError, match=r"must not look at earlier tokens with Confidence"):
        generate(no_repeat_ngram_size=2, strategy=Confidence(1))


class EvenThenOdd:
    """A grammar: an id of the other parity follows; only behind an odd id may the text end."""

    def __call__(self, row, ids):
        parity = int(ids[-1]) % 2
        return [i for i in range(148) if i % 2 != parity] + ([STOP] if parity else [])


SAMPLINGS = [{}, SAMPLED, {"do_sample": True, "temperature": 3.0, "top_p": 0.9}]
RULES = [{}, {"correction": True}, {"acceptance": "rejection"}]


@pytest.mark.parametrize("window_size", [None, 3])
@pytest.mark.parametrize(("rule", "sampling"), thinned(product(RULES, SAMPLINGS), 2, several=True))
def test_every_output_is_in_the_grammar(rule, sampling, window_size):
    """With every weight: of rule, sampling and weight each pair occurs, with the slow cases."""
    mixture_weight = [0.0, 0.5, 1.0][(RULES.index(rule) + SAMPLINGS.index(sampling)) % 3]
    output = generate(
        prefix_allowed_tokens_fn=EvenThenOdd(),
        mixture_weight=mixture_weight,
        window_size=window_size,
        seed=0,
        **sampling,
        **rule,
    )
    for row, prompt in zip(new_tokens(output), trace_prompts(), strict=True):
        text = [prompt[-1], *row]
        for before, token in zip(text, row, strict=False):
            assert token in EvenThenOdd()(0, torch.tensor([before]))


def test_a_grammar_gets_the_index_of_its_row():
    only = {i: 40 + i for i in range(len(trace_prompts()))}
    output = generate(prefix_allowed_tokens_fn=lambda row, ids: [only[row]], eos_token_id=[])
    assert [set(row) for row in new_tokens(output)] == [{token} for token in only.values()]


def test_a_grammar_in_its_processor_gets_the_index_of_its_row():
    """transformers' processor counts the rows of its input, and here it is called with one row at a time."""
    grammar = PrefixConstrainedLogitsProcessor(lambda row, ids: [40 + row], num_beams=1)
    output = generate(logits_processor=[grammar], eos_token_id=None, return_dict_in_generate=True)
    assert [set(row) for row in new_tokens(output)] == [{40 + i} for i in range(6)]
    with pytest.raises(ValueError, match="must be given once"):
        generate(logits_processor=[grammar], prefix_allowed_tokens_fn=lambda row, ids: [1])


def test_a_grammar_that_allows_nothing_is_an_error():
    with pytest.raises(ValueError, match="must allow at least one token, got none for row 0"):
        generate(prefix_allowed_tokens_fn=lambda row, ids: [])


@pytest.mark.parametrize("count", [1, 9])
def test_min_new_tokens_forbids_the_stop_token_before(count):
    stops = [row[0] for row in new_tokens(generate())]
    output = generate(eos_token_id=stops, min_new_tokens=count)
    assert output.new_tokens.min() >= count
    width = PROMPTS["input_ids"].shape[1]
    assert generate(eos_token_id=stops, min_length=width + count).sequences.equal(output.sequences)


def test_suppressed_first_tokens_come_later_only():
    first = [row[0] for row in new_tokens(generate())]
    output = generate(begin_suppress_tokens=first)
    assert not set(first) & {row[0] for row in new_tokens(output)}


class AfterTokens(StoppingCriteria):
    """Stops a row at its n-th new token; notes what it was shown."""

    def __init__(self, n):
        self.n, self.seen = n, []

    def __call__(self, input_ids, scores, **kwargs):
        assert input_ids.shape[0] == 1
        self.seen.append(input_ids[0].tolist())
        prompt = next(p for p in trace_prompts() if input_ids[0, : len(p)].tolist() == p)
        return torch.tensor([input_ids.shape[1] - len(prompt) >= self.n])


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("knobs", [{}, {"mixture_weight": 1.0}, {"strategy": Confidence(2)}])
def test_a_criterion_runs_at_every_token_and_cuts_there(n, knobs):
    criterion = AfterTokens(n)
    output = generate(stopping_criteria=[criterion], eos_token_id=[], **knobs)
    free = new_tokens(generate(eos_token_id=[], **knobs))
    assert new_tokens(output) == [row[:n] for row in free]
    asked = sorted(prompt + row[: i + 1] for prompt, row in zip(trace_prompts(), free, strict=True) for i in range(n))
    assert sorted(criterion.seen) == asked
    assert [sum(row) for row in output.committed_per_step] == [n] * len(trace_prompts())


def test_max_time_of_zero_stops_at_once():
    assert generate(max_time=1e-9).new_tokens.tolist() == [1] * len(trace_prompts())


def test_scores_hold_the_distribution_that_decided_each_position():
    """The token is the argmax of its scores, greedy or under the documented noise, wherever it came from."""
    for sampling in ({}, SAMPLED | {"top_p": 0.9}):
        seeds = list(range(len(trace_prompts())))
        output = generate(output_scores=True, output_logits=True, correction=True, seed=seeds, **sampling)
        rows = new_tokens(output)
        assert len(output.scores) == len(output.logits) == max(map(len, rows))
        for i, (row, prompt) in enumerate(zip(rows, trace_prompts(), strict=True)):
            for j, token in enumerate(row):
                scores = output.scores[j][i]
                if sampling:
                    key = torch.tensor([seeds[i]]), torch.tensor([[len(prompt) + j]])
                    scores = scores + keyed_gumbel(*key, DRAFT, torch.arange(len(scores)))[0, 0]
                assert int(scores.argmax()) == token
                p = output.trace[i].target_probs[j]
                first = j == 0 or output.trace[i].steps[j] != output.trace[i].steps[j - 1]
                p = output.trace[i].drafter_probs[j] if first else p
                assert output.logits[j][i].exp()[token].item() == pytest.approx(p, rel=1e-5)
            assert all((output.scores[j][i] == -torch.inf).all() for j in range(len(row), len(output.scores)))
