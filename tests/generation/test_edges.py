"""Edges that were wrong once. Each test tells what happened."""

import warnings

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler
from toy import tiny_pair
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LogitsProcessor,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from apd import KLASS, WINO, APDSampler, Blocks, LeftToRight, RandomOrder
from apd.decoding.acceptance import Coupling
from apd.decoding.step import APD

PROMPTS = left_padded(trace_prompts())


def generate(**kwargs):
    return trace_sampler().generate(**({**PROMPTS, "max_new_tokens": 8} | kwargs))


# --- models


def test_a_verifier_with_learned_positions_decodes_to_its_last_one():
    """Fillers of a ragged batch had positions past the row's end, where a position table has no entry."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=160, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    sampler = APDSampler(trace_sampler().drafter, gpt2)
    batch = sampler.generate(**PROMPTS, max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True)
    for i, prompt in enumerate(trace_prompts()):
        alone = sampler.generate(
            torch.tensor([prompt]), max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True
        )
        assert new_tokens(batch)[i] == new_tokens(alone)[0]


def test_a_verifier_with_a_causal_mask_of_its_own_is_refused():
    """It passed a check on one level row and gave wrong probabilities in every padded one."""
    config = GPTNeoConfig(
        vocab_size=160, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]], window_size=64
    )
    with pytest.raises(ValueError, match="rows of different lengths in one batch as it scores each alone"):
        APDSampler(trace_sampler().drafter, GPTNeoForCausalLM(config).eval())


def test_limits_of_a_model_that_never_runs_do_not_count():
    pair = trace_sampler()
    verifier = type(pair.verifier)(pair.verifier.model)
    verifier.max_length = 6
    sampler = APDSampler(pair.drafter, verifier)
    sampler.generate(**PROMPTS, max_new_tokens=4, mixture_weight=1.0)
    sampler.generate(**PROMPTS, max_new_tokens=4, strategy=LeftToRight())
    with pytest.raises(ValueError, match="the verifier's 6 positions"):
        sampler.generate(**PROMPTS, max_new_tokens=4)


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


def test_at_weight_one_the_target_is_the_draft_bit_for_bit():
    output = generate(mixture_weight=1.0, return_dict_in_generate=True)
    assert all(row.target_probs == row.drafter_probs for row in output.trace)


def test_a_tiny_temperature_is_greedy():
    """Scores divided by 1e-39 are all −∞, and the argmax of these is id 0."""
    assert torch.equal(generate(do_sample=True, temperature=1e-39), generate())


# --- arguments


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids", "inputs_embeds", "negative_prompt_ids"])
def test_refused_tensors_say_why(name):
    """A tensor has no truth value, so that comparing it with "asks for nothing" raised something else."""
    for value in (torch.arange(3)[None], torch.zeros(1)):
        with pytest.raises(ValueError, match=f"`{name}` is not supported"):
            generate(**{name: value})


@pytest.mark.parametrize("stop", [np.int64(STOP), torch.tensor(STOP), torch.tensor([STOP, 61]), (STOP, 61), [STOP]])
def test_stop_tokens_may_be_any_integers(stop):
    generate(eos_token_id=stop)


@pytest.mark.parametrize("seed", [np.int64(5), torch.tensor(5)])
def test_seeds_may_be_any_integer(seed):
    expected = generate(seed=5, do_sample=True)
    assert torch.equal(generate(seed=seed, do_sample=True), expected)
    rows = [np.int64(i) for i in range(6)]
    expected = generate(seed=list(range(6)), do_sample=True)
    for many in (rows, np.arange(6), torch.arange(6), range(6)):
        assert torch.equal(generate(seed=many, do_sample=True), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": [True] * 6}, TypeError, "`seed` must be an integer"),
        ({"attention_mask": [[1]]}, TypeError, "`attention_mask` must be a tensor"),
        ({"generation_config": {"top_k": 3}}, TypeError, "`generation_config` must be a GenerationConfig, got dict"),
        ({"strategy": LeftToRight}, TypeError, "`strategy` must be an instance, got the class LeftToRight"),
        ({"strategy": 2}, TypeError, r"`strategy` must be an object such as .* or a name such as .*, got 2"),
        ({"strategy": LeftToRight(), "mixture_weight": 0.9}, ValueError, "`mixture_weight` has no effect beside"),
        ({"generation_config": GenerationConfig(temprature=0.3)}, TypeError, "Did you mean `temperature`"),
        ({"generation_config": GenerationConfig(mixture_weight=0.3)}, TypeError, "no argument `mixture_weight`"),
    ],
)
def test_what_was_swallowed_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        generate(**arguments)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LeftToRight([]), ValueError, "`tokens_per_step` must be at least 1"),
        (lambda: Blocks(KLASS()), TypeError, "must pick within a block by the state alone"),
        (lambda: Blocks(WINO()), TypeError, "must pick within a block by the state alone"),
        (lambda: APD(1.5, Coupling()), ValueError, r"`mixture_weight` must be in \[0, 1\], got 1.5"),
        (lambda: Coupling(3.0), ValueError, r"`threshold` must be in \[0, 1\], got 3.0"),
    ],
)
def test_strategies_check_themselves(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_greedy_decoding_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    generate()
    assert torch.rand(()) == expected
    first, second = (generate(strategy=RandomOrder(), return_dict_in_generate=True).trace[0].steps for _ in range(2))
    assert first != second  # an order that is random needs a seed all the same


def test_warnings_point_at_the_caller():
    for call in (generate, lambda **kwargs: list(trace_sampler().stream(**PROMPTS, max_new_tokens=1, **kwargs))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(temperature=0.5)
        assert [warning.filename for warning in caught if "no effect" in str(warning.message)] == [__file__]


def test_streams_and_many_prompts_check_their_arguments_at_once():
    """Generators used to say so at the first `next` only."""
    with pytest.raises(TypeError, match="Did you mean `temperature`"):
        trace_sampler().stream(**PROMPTS, temprature=2)
    with pytest.raises(TypeError, match="Did you mean `temperature`"):
        trace_sampler().generate_many(trace_prompts(), temprature=2, on_error=lambda *_: None)


# --- processors


def test_a_grammar_in_its_processor_is_told_which_row_it_is():
    """Called with one row at a time, it took every row for the first."""
    grammar = PrefixConstrainedLogitsProcessor(lambda row, ids: [40 + row], num_beams=1)
    output = generate(logits_processor=[grammar], eos_token_id=None, return_dict_in_generate=True)
    assert [set(row) for row in new_tokens(output)] == [{40 + i} for i in range(6)]
    with pytest.raises(ValueError, match="must be given once"):
        generate(logits_processor=[grammar], prefix_allowed_tokens_fn=lambda row, ids: [1])


@pytest.mark.parametrize(
    ("own", "meant"),
    [
        ({"stopping_criteria": [MaxLengthCriteria(26)]}, {"max_new_tokens": 2}),
        ({"stopping_criteria": [EosTokenCriteria([61])]}, {"eos_token_id": [61]}),
        ({"do_sample": True, "logits_processor": [TopKLogitsWarper(1)]}, {"do_sample": True, "top_k": 1}),
        (
            {"do_sample": True, "temperature": 0.9, "logits_processor": [TemperatureLogitsWarper(0.01)]},
            {"do_sample": True, "temperature": 0.01},
        ),
        (
            {"repetition_penalty": 1.2, "logits_processor": [RepetitionPenaltyLogitsProcessor(9.0)]},
            {"repetition_penalty": 9.0},
        ),
    ],
)
def test_custom_generate_keeps_the_callers_own_objects(own, meant):
    """transformers puts them in the place of its own, and ours dropped them for being of a kind it makes itself."""
    sampler, model = trace_sampler(), trace_sampler().drafter.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model.generate(**PROMPTS, max_new_tokens=8, seed=1, custom_generate=sampler, **own)
    assert torch.equal(got, generate(seed=1, **meant))


# --- many prompts


@pytest.mark.parametrize(
    "settings",
    [{"max_time": 0.1}, {"min_length": 7}, {"num_return_sequences": 2, "do_sample": True}],
)
def test_what_depends_on_the_whole_batch_is_refused_for_many_prompts(settings):
    """They were taken from the first prompt: later ones stopped at once, or were as long as the first demanded."""
    name = next(iter(settings))
    for given in (settings, {"generation_config": GenerationConfig(**settings)}):
        with pytest.raises(ValueError, match=f"`{name}` cannot be meant in generate_many"):
            trace_sampler().generate_many(trace_prompts(), max_new_tokens=4, **given)


@pytest.mark.parametrize("prompts", ["copy", {"input_ids": [[1]]}, torch.zeros(2, 3, dtype=torch.int64)])
def test_one_thing_is_not_many_prompts(prompts):
    """A string gave an answer for each of its letters, a tokenizer's output one for each of its keys."""
    with pytest.raises(TypeError, match="`prompts` must be"):
        trace_sampler().generate_many(prompts, max_new_tokens=4)


def test_prompts_may_be_arrays_and_numpy_integers():
    ids = trace_prompts()[0]
    forms = [ids, torch.tensor(ids), torch.tensor([ids]), np.array(ids), [np.int64(token) for token in ids]]
    answers = list(trace_sampler().generate_many(forms, max_new_tokens=6))
    assert all(answer.tokens == answers[0].tokens for answer in answers)
    with pytest.raises(ValueError, match="Prompt 0: A prompt must be"):
        list(trace_sampler().generate_many([torch.tensor([ids, ids])], max_new_tokens=4))


def test_a_chat_that_the_template_refuses_is_a_refused_prompt():
    """Templates raise jinja2's own errors, which ended the whole run."""

    class Tokenizer:
        eos_token_id = pad_token_id = STOP

        def apply_chat_template(self, chat, **kwargs):
            if chat[0].get("role") != "user":
                raise TemplateError("roles must alternate")
            return trace_prompts()[0] if kwargs["tokenize"] else chat[0]["content"]

        def decode(self, ids, **kwargs):
            return str(ids)

        def get_vocab(self):
            return {}

    sampler = APDSampler(trace_sampler().drafter, trace_sampler().verifier, Tokenizer())
    errors = {}
    chats = [[{"role": "system", "content": "x"}], [{"role": "user", "content": "x"}]]
    answers = list(sampler.generate_many(chats, max_new_tokens=4, on_error=errors.__setitem__))
    assert [answer.index for answer in answers] == [1]
    assert "roles must alternate" in str(errors[0])
