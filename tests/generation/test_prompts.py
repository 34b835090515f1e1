"""What `generate_many` makes of a prompt before it is decoded: text, chats, and what is refused with its number."""

import copy
import warnings

import numpy as np
import pytest
import torch
from pairs import trace_prompts, trace_sampler

from apd import EXAMPLE_PROMPTS, APDSampler

CLOSED = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONTENT = "{{ messages[0]['content'] }}"
# What the messages of other prompts do not meet.
BAD_TEMPLATES = {
    "a division by zero": "{{ 1 / (messages[0]['content']|length - 3) }}",
    "a range that the sandbox refuses": "{% if messages[0]['content'] == 'bad' %}{% for i in range(10**6) %}{% endfor %}{% endif %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{% if messages[0]['content'] == 'bad' %}{{ f() }}{% endif %}",
    "a missing attribute": "{% if messages[0]['content'] == 'bad' %}{{ messages[0].a.b }}{% endif %}",
    "a number that is too large": "{% if messages[0]['content'] == 'bad' %}{{ (10.0 ** 200) ** 2 }}{% endif %}",
    "a format that does not fit": "{% if messages[0]['content'] == 'bad' %}{{ '%d' % 'x' }}{% endif %}",
    "an exception of its own": "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}",
}


@pytest.fixture(scope="module")
def shared():
    return APDSampler.from_included()


@pytest.fixture
def sampler(shared):
    """With a tokenizer of its own, which a test may change."""
    mine = copy.copy(shared)
    mine.tokenizer = copy.deepcopy(shared.tokenizer)
    return mine


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_a_chat_is_continued_where_the_assistant_has_begun(sampler):
    sampler.tokenizer.chat_template = CLOSED
    begun, asked = chat(EXAMPLE_PROMPTS[0], '["Ada",'), chat(EXAMPLE_PROMPTS[0])
    wanted = [
        sampler.tokenizer.apply_chat_template(begun, continue_final_message=True, return_dict=False),
        sampler.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False),
    ]
    assert wanted[0][-1] != sampler.tokenizer.eos_token_id
    of_chats = sampler.generate_many([begun, asked, chat(EXAMPLE_PROMPTS[0], "")], max_new_tokens=8, seed=0)
    of_ids = sampler.generate_many([*wanted, wanted[1]], max_new_tokens=8, seed=0)
    for ours, theirs in zip(of_chats, of_ids, strict=True):
        assert (ours.tokens, ours.trace.prompt) == (theirs.tokens, theirs.trace.prompt)


@pytest.mark.parametrize("template", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_whatever_a_template_raises_belongs_to_its_prompt(sampler, template):
    sampler.tokenizer.chat_template = template + CONTENT
    chats, told = [chat(text) for text in ('["Mia", "Leo"].', "bad", '["Zoe", "Ada"].')], {}
    answers = list(sampler.generate_many(chats, max_new_tokens=2, on_error=told.__setitem__))
    assert [answer.index for answer in answers] == [0, 2]
    assert list(told) == [1]
    with pytest.raises(ValueError, match="Prompt 1: The chat must suit the tokenizer's template"):
        list(sampler.generate_many(chats, max_new_tokens=2))


def test_half_a_surrogate_pair_is_refused_by_name(sampler):
    sampler.tokenizer.chat_template = CONTENT
    cut = "caf\ud83d"
    for prompt in (cut, chat(cut)):
        with pytest.raises(ValueError, match=r"Prompt 1: A prompt must be text .* got '\\ud83d' at character 4"):
            list(sampler.generate_many([EXAMPLE_PROMPTS[0], prompt], max_new_tokens=2))
    with pytest.raises(ValueError, match="`stop_strings` must be text"):
        list(sampler.generate_many([EXAMPLE_PROMPTS[0]], max_new_tokens=2, stop_strings=["\n", cut]))


class Counting:
    """A tokenizer, and how many characters it was asked to split."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **kwargs):
        self.seen += len(text)
        return self.tokenizer(text, **kwargs)


def test_a_far_too_long_prompt_is_refused_by_its_beginning(sampler):
    most = sampler.drafter.max_length
    sampler.tokenizer.chat_template = CONTENT
    sampler.tokenizer = Counting(sampler.tokenizer)
    text = "Ada " * 100 * most
    for prompt in (text, chat(text)):
        sampler.tokenizer.seen, told = 0, {}
        assert not list(sampler.generate_many([prompt], max_new_tokens=2, on_error=told.__setitem__))
        assert f"must fit the models' {most} positions" in str(told[0])
        assert sampler.tokenizer.seen < len(text) / 10


def test_characters_that_become_no_tokens_make_no_prompt_too_long(sampler):
    prompt = EXAMPLE_PROMPTS[0]
    padded = " " * 100 * sampler.drafter.max_length + prompt
    plain, padded = sampler.generate_many([prompt, padded], max_new_tokens=8)
    assert plain.tokens == padded.tokens


@pytest.mark.parametrize("prompts", ["copy", {"input_ids": [[1]]}, torch.zeros(2, 3, dtype=torch.int64)])
def test_one_thing_is_not_many_prompts(prompts):
    """A string would give an answer for each of its letters, a tokenizer's output one for each of its keys."""
    with pytest.raises(TypeError, match="`prompts` must be"):
        trace_sampler().generate_many(prompts, max_new_tokens=4)


def test_prompts_may_be_arrays_and_numpy_integers():
    ids = trace_prompts()[0]
    forms = [ids, torch.tensor(ids), torch.tensor([ids]), np.array(ids), [np.int64(token) for token in ids]]
    answers = list(trace_sampler().generate_many(forms, max_new_tokens=6))
    assert all(answer.tokens == answers[0].tokens for answer in answers)
    with pytest.raises(ValueError, match="Prompt 0: A prompt must be"):
        list(trace_sampler().generate_many([torch.tensor([ids, ids])], max_new_tokens=4))


@pytest.mark.parametrize("progress", [False, True])
def test_a_forgotten_length_is_warned_of_where_it_was_forgotten(progress, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(trace_sampler().generate_many(trace_prompts()[:1], progress=progress))
    (warning,) = (each for each in caught if "max_new_tokens" in str(each.message))
    assert warning.filename == __file__
