"""A drop-in for transformers' `generate()`: which arguments there are, streams, many prompts, `custom_generate`."""

import inspect
import re
import threading
import warnings
from itertools import chain

import pytest
import torch
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler
from paths import ROOT
from thinned import thinned
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
)

from apd import EXAMPLE_PROMPTS, KLASS, WINO, APDSampler, Confidence
from apd.config import KNOBS
from apd.decoding.noise import mix_seed
from apd.generation.arguments import effective_config
from apd.generation.stop_strings import StopStrings
from apd.generation.support import REFUSED, SUPPORTED

pytestmark = pytest.mark.compat
DOCS = ROOT / "docs" / "generate.md"
SAMPLED = {"do_sample": True, "temperature": 1.2, "top_k": 0}


@pytest.fixture(scope="module")
def sampler():
    return APDSampler.from_included()


# --- arguments


def test_the_page_in_the_docs_names_every_argument():
    supported, refused = DOCS.read_text().split("## Refused, with the reason")
    assert set(SUPPORTED) == set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", supported, re.M)))) | {
        "seed",
        "strategy",
        "allow_stop_in_holes",
    }
    table = re.findall(r"^\| (`.*?) \| (.*) \|$", refused, re.M)
    assert {name: reason for names, reason in table for name in re.findall(r"`(\w+)`", names)} == REFUSED


def refusal(**arguments):
    """The error's message, or `None` where the arguments are taken."""
    try:
        trace_sampler().generate(torch.tensor([[5]]), max_new_tokens=1, **arguments)
    except ValueError as error:
        return str(error)


def test_refused_arguments_say_why():
    wrong = {}
    for name, reason in REFUSED.items():
        message = refusal(**{name: 7})
        if f"`{name}` is not supported, got 7: {reason}" not in (message or ""):
            wrong[name] = message
    assert not wrong


def test_a_default_generation_config_asks_for_nothing_that_is_refused():
    defaults = GenerationConfig()._get_default_generation_params()
    names = set(REFUSED) & set(vars(GenerationConfig()))
    refusals = {name: refusal(generation_config=GenerationConfig(**{name: defaults.get(name)})) for name in names}
    assert len(names) > 30
    assert not {name: message for name, message in refusals.items() if message}


# --- custom_generate


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"do_sample": True, "top_k": 0, "repetition_penalty": 1.3, "min_new_tokens": 9},
        {"do_sample": True, "num_return_sequences": 2},
        {"window_size": 4, "mixture_weight": 0.2, "kv_window": 5, "correction": True},
        {"window_size": 5, "kv_window": 1, "kv_refresh": 3},
        {"window_size": "auto"},
        {"do_sample": True, "seed": 5, "noise": "step"},
        {"eos_token_id": [1, 60], "pad_token_id": 0},
        {"prefix_allowed_tokens_fn": lambda row, ids: [10 + row, 20 + row]},
        {"begin_suppress_tokens": [100], "suppress_tokens": [7], "no_repeat_ngram_size": 3, "min_length": 40},
    ],
)
def test_custom_generate_gives_the_same_ids(sampler, arguments):
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:2], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    expected = sampler.generate(**inputs, max_new_tokens=16, **arguments)
    torch.manual_seed(0)
    model = sampler.drafter.model
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, custom_generate=sampler, **arguments), expected)


def test_every_knob_reaches_a_custom_generate(sampler):
    """transformers passes on the keyword arguments that the signature names."""
    named = inspect.signature(sampler).parameters
    assert {*KNOBS, "seed", "strategy"} <= set(named)
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[0], return_tensors="pt")
    for name in KNOBS:
        with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
            sampler.drafter.model.generate(**inputs, max_new_tokens=4, custom_generate=sampler, **{name: "wrong"})


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
    """transformers puts them in the place of its own, so they are of kinds that it makes itself."""
    pair, prompts = trace_sampler(), left_padded(trace_prompts())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = pair.drafter.model.generate(**prompts, max_new_tokens=8, seed=1, custom_generate=pair, **own)
    assert torch.equal(got, pair.generate(**prompts, seed=1, **({"max_new_tokens": 8} | meant)))


def test_custom_generate_refuses_contradictory_arguments(sampler):
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[0], return_tensors="pt")
    with pytest.raises(ValueError, match="`num_beams` is not supported, got 4"):
        sampler.drafter.model.generate(**inputs, max_new_tokens=4, num_beams=4, custom_generate=sampler)
    with pytest.raises(ValueError, match="must be given to the sampler's own drafter"):
        sampler.verifier.model.generate(**inputs, max_new_tokens=4, custom_generate=sampler)


def test_custom_generate_returns_the_output_class(sampler):
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[0], return_tensors="pt")
    output = sampler.drafter.model.generate(
        **inputs, max_new_tokens=24, custom_generate=sampler, return_dict_in_generate=True
    )
    assert output.tokens_per_forward[0] > 1


# --- stop strings and streams


@pytest.mark.parametrize("knobs", [{}, {"mixture_weight": 1.0}, {"strategy": Confidence(1)}])
def test_stop_strings_cut_at_the_token_that_completes_them(sampler, knobs):
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[::3], return_tensors="pt", padding=True)
    whole = sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True, **knobs)
    texts = [sampler.tokenizer.decode(row) for row in new_tokens(whole)]
    cut = sampler.generate(
        **inputs, max_new_tokens=32, stop_strings=['", "', " = "], return_dict_in_generate=True, **knobs
    )
    for text, whole_row, row in zip(texts, new_tokens(whole), new_tokens(cut), strict=True):
        assert row == whole_row[: len(row)]
        stops_found = ['", "' in text, " = " in text]
        got, before = sampler.tokenizer.decode(row), sampler.tokenizer.decode(row[:-1])
        assert any(stop in got for stop in ('", "', " = ")) == any(stops_found)
        assert not any(stop in before for stop in ('", "', " = "))


def test_stop_strings_are_found_where_transformers_finds_them():
    """Byte-level BPE, random ids: split characters, strings within tokens and across them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["the end. The END\n\nof é story … über", "stop stop sto p\n", "ende ende\n\n\nü"]
    bpe.train_from_iterator(text * 5, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    stops = ["stop", "\n\n", "end", "ü", ". T"]
    ours, theirs = StopStrings(stops, tokenizer), StopStringCriteria(tokenizer, stops)
    rng = torch.Generator().manual_seed(0)
    likely = torch.tensor(tokenizer("stop end the ü\n\n. Ten")["input_ids"])
    rows = likely[torch.randint(len(likely), (4000, 6), generator=rng)]
    rows[::2, 3] = torch.randint(len(tokenizer), (2000,), generator=rng)
    found = ours(rows, None)
    assert torch.equal(found, theirs(rows, None))
    assert 100 < found.sum() < 3900


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="`tokenizer` must be given with `stop_strings`"):
        trace_sampler().generate(torch.tensor([[5]]), max_new_tokens=2, stop_strings=["x"])


class Noted(TextStreamer):
    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True)
        self.puts, self.drafts, self.ended = [], [], False

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def put_draft(self, value):
        self.drafts.append((len(self.puts), value.tolist()))

    def end(self):
        self.ended = True


@pytest.mark.parametrize("knobs", [{}, {"correction": True, "mixture_weight": 0.0}, {"strategy": Confidence(2)}])
@pytest.mark.parametrize("prompt", [0, 3, 11])
def test_a_streamer_gets_committed_tokens_only_and_all_of_them(sampler, knobs, prompt):
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[prompt], return_tensors="pt")
    streamer = Noted(sampler.tokenizer)
    output = sampler.generate(
        **inputs, max_new_tokens=32, streamer=streamer, return_dict_in_generate=True, **SAMPLED, seed=1, **knobs
    )
    echoed, *committed = streamer.puts
    assert echoed == inputs["input_ids"][0].tolist()
    assert list(chain(*committed)) == new_tokens(output)[0]
    assert streamer.ended
    assert [draft for _, draft in streamer.drafts] == output.trace[0].drafts
    if "strategy" not in knobs:
        assert [len(tokens) for tokens in committed] == output.committed_per_step[0]


def test_a_text_iterator_streamer_ends(sampler):
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[0], return_tensors="pt")
    streamer = TextIteratorStreamer(sampler.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=lambda: sampler.generate(**inputs, max_new_tokens=32, streamer=streamer))
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = sampler.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    assert text == sampler.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_streamer_takes_one_row(sampler):
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:2], return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match="`streamer` must be given one row, got 2"):
        sampler.generate(**inputs, max_new_tokens=4, streamer=TextStreamer(sampler.tokenizer))


@pytest.mark.parametrize("knobs", [{}, {"strategy": Confidence(2)}])
def test_a_stream_adds_up_to_the_output_row_by_row(sampler, knobs):
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[::2], return_tensors="pt", padding=True)
    output = sampler.generate(**inputs, max_new_tokens=16, return_dict_in_generate=True, **SAMPLED, seed=2, **knobs)
    chunks = list(sampler.stream(**inputs, max_new_tokens=16, **SAMPLED, seed=2, **knobs))
    for row, tokens in enumerate(new_tokens(output)):
        own = [chunk for chunk in chunks if chunk.row == row]
        assert list(chain(*(chunk.tokens for chunk in own))) == tokens
        assert (
            "".join(chunk.text for chunk in own).strip()
            == sampler.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        )
        assert [chunk.step for chunk in own] == list(range(output.drafter_forwards[row]))
        assert [chunk.done for chunk in own] == [False] * (len(own) - 1) + [True]


def test_a_stream_without_a_tokenizer_has_ids():
    chunks = list(trace_sampler().stream(**left_padded(trace_prompts()[:2]), max_new_tokens=8, eos_token_id=[]))
    assert sum(len(chunk.tokens) for chunk in chunks) == 16
    assert {chunk.text for chunk in chunks} == {""}


# --- many prompts


@pytest.mark.parametrize(
    "knobs",
    thinned(
        [
            SAMPLED | {"kv_window": 4, "window_size": 6},
            SAMPLED,
            {"strategy": KLASS(0.5, 0.5, 1)},
            {},
            SAMPLED | {"strategy": WINO(0.2, 0.9, 5)},
            {"strategy": Confidence(1)},
        ],
        2,
    ),
)
def test_many_prompts_equal_single_calls(knobs):
    """More prompts than rows, of all lengths: rows are refilled while others are half-way."""
    prompts = [p[:cut] for p in trace_prompts()[:4] for cut in (8, 24)]
    common = {"max_new_tokens": 12, "eos_token_id": [STOP, 61, 83]} | knobs
    single_calls = [
        trace_sampler().generate(
            torch.tensor([prompt]), seed=[mix_seed(9, index)], return_dict_in_generate=True, **common
        )
        for index, prompt in enumerate(prompts)
    ]
    for batch_size in (1, 3, 20):
        answers = list(trace_sampler().generate_many(prompts, batch_size=batch_size, seed=9, **common))
        assert [answer.index for answer in answers] == list(range(len(prompts)))
        for answer, alone in zip(answers, single_calls, strict=True):
            check_answer(answer, alone)


def check_answer(answer, alone):
    """An answer of `generate_many` is the output of a call of its own."""
    assert answer.tokens == new_tokens(alone)[0]
    assert answer.drafter_forwards == alone.drafter_forwards[0]
    assert answer.verifier_forwards == alone.verifier_forwards[0]
    assert answer.tokens_per_forward == pytest.approx(alone.tokens_per_forward[0].item())
    assert answer.finish == ("stop" if answer.tokens[-1] in (STOP, 61, 83) else "length")
    trace = alone.trace[0]
    assert (answer.trace.steps, answer.trace.starts, answer.trace.drafts) == (
        trace.steps,
        trace.starts,
        trace.drafts,
    )
    assert answer.trace.target_probs == pytest.approx(trace.target_probs, rel=1e-4)


class TooLong(StoppingCriteria):
    def __init__(self, length):
        self.length, self.seen = length, set()

    def __call__(self, input_ids, scores, **kwargs):
        self.seen |= set(input_ids[0].tolist())
        return torch.tensor([input_ids.shape[1] > self.length and input_ids[0, 0] == trace_prompts()[1][0]])


def test_criteria_do_not_run_behind_the_end_of_a_row():
    """Beside a wider row they were asked about its columns too, mask after mask, and a row that was full "stopped"."""
    criterion, prompts = TooLong(12), [trace_prompts()[1][:3], trace_prompts()[0][:12]]
    settings = {"max_new_tokens": 9, "eos_token_id": [], "window_size": 4, "seed": 0}
    answers = trace_sampler().generate_many(prompts, batch_size=2, stopping_criteria=[criterion], **settings)
    assert [answer.finish for answer in answers] == ["length", "length"]
    assert trace_sampler().drafter.mask_token_id not in criterion.seen


def test_prompts_are_drawn_as_rows_become_free():
    drawn = []

    def endless():
        index = 0
        while True:
            drawn.append(index)
            yield trace_prompts()[index % 6]
            index += 1

    answers = trace_sampler().generate_many(endless(), batch_size=4, max_new_tokens=6, ordered=False, eos_token_id=[])
    for _ in range(5):
        next(answers)
    assert len(drawn) <= 5 + 4 + 1


def test_text_and_chats_are_prompts_too(sampler):
    text, ids = EXAMPLE_PROMPTS[0], sampler.tokenizer(EXAMPLE_PROMPTS[0])["input_ids"]
    sampler_of_chats = APDSampler(sampler.drafter, sampler.verifier, APDSampler.from_included().tokenizer)
    sampler_of_chats.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    prompts = [text, ids, torch.tensor(ids), [{"role": "user", "content": text}]]
    answers = list(sampler_of_chats.generate_many(prompts, max_new_tokens=32))
    assert {answer.text for answer in answers} == {answers[0].text}
    assert answers[0].text.strip().startswith('["')


def test_earlier_defaults_take_precedence():
    defaults = [{"eos_token_id": None, "pad_token_id": 1}, {"eos_token_id": 5, "pad_token_id": 6}]
    config = effective_config(None, defaults, {})
    assert (config.eos_token_id, config.pad_token_id) == (5, 1)
    assert effective_config(GenerationConfig(eos_token_id=3), defaults, {}).eos_token_id == 3
    assert effective_config(None, defaults, {"eos_token_id": None}).eos_token_id is None


def test_a_refused_prompt_raises_with_its_number_or_is_left_out():
    prompts = [trace_prompts()[0], [], trace_prompts()[1], [7, 400], trace_prompts()[2]]
    with pytest.raises(ValueError, match="Prompt 1: `input_ids` must hold at least one"):
        list(trace_sampler().generate_many(prompts, max_new_tokens=4))
    errors = {}
    answers = trace_sampler().generate_many(prompts, max_new_tokens=4, batch_size=2, on_error=errors.__setitem__)
    assert [answer.index for answer in answers] == [0, 2, 4]
    assert list(errors) == [1, 3]
    assert "below" in str(errors[3])


def test_a_part_of_a_run_equals_that_part_of_the_whole_run():
    whole = list(trace_sampler().generate_many(trace_prompts(), seed=4, max_new_tokens=8, **SAMPLED))
    part = trace_sampler().generate_many(
        (trace_prompts()[i] for i in (5, 2, 0)), indices=[5, 2, 0], seed=4, batch_size=2, max_new_tokens=8, **SAMPLED
    )
    assert [(answer.index, answer.tokens) for answer in part] == [(i, whole[i].tokens) for i in (5, 2, 0)]


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("index", [1.0, "1", None, True, [1], torch.tensor(1.5), torch.tensor([1, 2])])
def test_indices_that_are_no_whole_numbers_are_refused(index, copies):
    call = {"indices": [0, index], "num_return_sequences": copies, "max_new_tokens": 4, **SAMPLED}
    message = f"`indices` must be whole numbers, one per prompt, got {index!r}. Leave"
    with pytest.raises(TypeError, match=re.escape(message)):
        list(trace_sampler().generate_many(trace_prompts()[:2], **call))


@pytest.mark.parametrize(
    ("indices", "copies", "message"),
    [
        ([-1], 1, "at least 0 and below 2^63, got -1."),
        ([-1], 3, "at least 0 and below 2^63 / 3, got -1."),
        ([1 << 63], 1, f"at least 0 and below 2^63, got {1 << 63}."),
        ([1 << 62], 3, f"at least 0 and below 2^63 / 3, got {1 << 62}."),
        ([3, 3], 1, "all be different, got 3 twice."),
        ([3, 3], 3, "all be different, got 3 twice."),
        ([], 1, "have a number for each of 1 prompts, got 0."),
    ],
)
def test_indices_out_of_range_missing_or_there_twice_are_refused(indices, copies, message):
    """With several answers to a prompt, the number of an answer was named in place of the prompt's."""
    call = {"indices": indices, "num_return_sequences": copies, "max_new_tokens": 4, **SAMPLED}
    with pytest.raises(ValueError, match=re.escape(message)):
        list(trace_sampler().generate_many(trace_prompts()[: len(indices) or 1], **call))


def test_indices_may_be_numbers_of_torch():
    options = {"seed": 4, "max_new_tokens": 8, **SAMPLED}
    plain = list(trace_sampler().generate_many(trace_prompts()[:2], indices=[7, 3], **options))
    found = list(trace_sampler().generate_many(trace_prompts()[:2], indices=torch.tensor([7, 3]), **options))
    assert [(answer.index, answer.tokens) for answer in found] == [(answer.index, answer.tokens) for answer in plain]
    with pytest.raises(ValueError, match="`indices` must all be different, got 3 twice"):
        list(trace_sampler().generate_many(trace_prompts()[:2], indices=torch.tensor([3, 3]), max_new_tokens=4))


def test_words_that_the_tokenizer_does_not_know_are_warned_of(sampler):
    """The included pair answered nothing to "Hello world", without a word."""
    with pytest.warns(UserWarning, match="words that the tokenizer does not know"):
        sampler.generate(**sampler.tokenizer("Hello world.", return_tensors="pt"), max_new_tokens=2)


def test_no_prompts_no_answers():
    assert list(trace_sampler().generate_many([], max_new_tokens=4)) == []
