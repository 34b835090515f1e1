"""Bad input gets a clear error at the edge: the argument, the rule, the value, the remedy.

`PYTHONPATH=.:tests python tests/generation/test_bad_input.py` prints the table of inputs and messages.
"""

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pairs import STOP, trace_prompts, trace_sampler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GenerationConfig, Qwen2ForCausalLM, TopKLogitsWarper

from apd import APDConfig, APDSampler, Confidence, LeftToRight
from apd.decoding.acceptance import Coupling, Rejection
from apd.decoding.step import APD
from apd.decoding.window import AutoWindow
from apd.strategies import KLASS, WINO, Blocks, EntropyBound, Factor, Threshold

try:
    import peft
except ImportError:
    peft = None

PROMPT = torch.tensor([[7, 107, 125, 41]])
MASK = 150


def generate(**kwargs: Any) -> Any:
    return trace_sampler().generate(**({"input_ids": PROMPT, "max_new_tokens": 4} | kwargs))


class Unhashable:
    """A window policy and acceptance rule as a dataclass that is not frozen."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, evidence: Any) -> Any: ...

    def window(self, state: Any) -> Any: ...

    def update(self, state: Any, info: Any) -> Any: ...


class Broken:
    """A drafter or verifier whose logits turn bad at the `step`-th call."""

    def __init__(self, model: Any, value: float, step: int) -> None:
        self.model, self.value, self.step = model, value, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def open(self, *args: Any) -> "Broken":
        self.session, self.calls = self.model.open(*args), 0
        return self

    def logits(self, *args: Any) -> torch.Tensor:
        self.calls += 1
        logits = self.session.logits(*args)[:, :]
        return logits.fill_(self.value) if self.calls == self.step else logits

    def select(self, rows: torch.Tensor) -> None:
        self.session.select(rows)


def broken(which: str, value: float, step: int) -> Any:
    sampler = trace_sampler()
    drafter, verifier = sampler.drafter, sampler.verifier
    if which == "drafter":
        drafter = Broken(drafter, value, step)
    else:
        verifier = Broken(verifier, value, step)
    return APDSampler(drafter, verifier).generate(PROMPT, max_new_tokens=40)


class Nothing(TopKLogitsWarper):
    """Leaves no token."""

    def __init__(self) -> None:
        pass

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)


def disjoint_models() -> Any:
    """Drafter and verifier that each give all probability to another token, so that the product is empty."""
    sampler = trace_sampler()

    class Only(Broken):
        def logits(self, *args: Any) -> torch.Tensor:
            logits = torch.full_like(self.session.logits(*args)[:, :], -torch.inf)
            return logits.index_fill(-1, torch.tensor([int(self.value)]), 0.0)

    return APDSampler(Only(sampler.drafter, 5, 0), Only(sampler.verifier, 6, 0)).generate(PROMPT, max_new_tokens=4)


def in_memory(**changes: Any) -> Any:
    model = copy.deepcopy(trace_sampler().drafter.model)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return APDSampler(model, trace_sampler().verifier, spec="dream")


def verifier_of_vocabulary(size: int) -> Any:
    config = copy.deepcopy(trace_sampler().verifier.model.config)
    config.vocab_size = size
    return APDSampler(trace_sampler().drafter, Qwen2ForCausalLM(config).eval())


CASES: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    # knobs
    "R above 1": (ValueError, r"`mixture_weight` must be in \[0, 1\], got 1.2", lambda: APDConfig(mixture_weight=1.2)),
    "R not a number": (TypeError, "`mixture_weight` must be a number", lambda: APDConfig(mixture_weight="0.5")),  # type: ignore[arg-type]
    "R NaN": (ValueError, "`mixture_weight` must be in", lambda: generate(mixture_weight=float("nan"))),
    "tau below 0": (ValueError, "`acceptance_threshold` must be in", lambda: generate(acceptance_threshold=-0.1)),
    "M of 0": (ValueError, "`window_size` must be at least 1, got 0. Use 1", lambda: generate(window_size=0)),
    "M a fraction": (TypeError, "`window_size` must be a whole number", lambda: generate(window_size=2.5)),
    "M of no kind": (TypeError, "`window_size` must be a whole number or None", lambda: generate(window_size="wide")),
    "M of its own": (
        ValueError,
        r"`window_size` must be a number or None with Confidence\(tokens_per_step=1\), got 'auto'",
        lambda: generate(window_size="auto", strategy=Confidence(1)),
    ),
    "M a policy of its own": (
        ValueError,
        r"`window_size` must be a number or None with Confidence\(tokens_per_step=1\), got AutoWindow\(",
        lambda: generate(window_size=AutoWindow(), strategy="confidence"),
    ),
    "M a class": (
        TypeError,
        "`window_size` must be an instance, got the class AutoWindow. Call it",
        lambda: generate(window_size=AutoWindow),
    ),
    "M that cannot be hashed": (
        TypeError,
        "`window_size` must be hashable, got .*frozen=True",
        lambda: APDConfig(window_size=Unhashable()),
    ),
    "N of 0": (ValueError, "`kv_refresh` must be at least 1, got 0", lambda: generate(kv_window=4, kv_refresh=0)),
    "N without W": (ValueError, "`kv_refresh` must be None without `kv_window`", lambda: generate(kv_refresh=4)),
    "W of 0": (ValueError, "`kv_window` must be at least 1, got 0. Use None", lambda: generate(kv_window=0)),
    "unknown rule": (
        ValueError,
        "`acceptance` must be one of 'coupling', 'rejection'",
        lambda: generate(acceptance="x"),
    ),
    "a rule of no kind": (ValueError, "or an `AcceptanceRule`, got 3", lambda: generate(acceptance=3)),
    "a rule's class": (
        TypeError,
        "`acceptance` must be an instance, got the class Coupling. Call it",
        lambda: generate(acceptance=Coupling),
    ),
    "a rule that cannot be hashed": (
        TypeError,
        "`acceptance` must be hashable, got .*frozen=True",
        lambda: generate(acceptance=Unhashable()),
    ),
    "a rule with tau": (
        ValueError,
        r"`acceptance_threshold` must be 0 with acceptance=Coupling\(.*Set them there",
        lambda: generate(acceptance=Coupling(), acceptance_threshold=0.5),
    ),
    "a rule with correction": (
        ValueError,
        "`correction` must be False with acceptance=Rejection",
        lambda: generate(acceptance=Rejection(), correction=True),
    ),
    "unknown strategy": (
        ValueError,
        r"`strategy` must be a known name, got 'confidense:2'. Did you mean `confidence`\?",
        lambda: generate(strategy="confidense:2"),
    ),
    "K of 0 in a name": (
        ValueError,
        "'confidence:0': `tokens_per_step` must be at least 1, got 0",
        lambda: generate(strategy="confidence:0"),
    ),
    "a strategy's class": (
        TypeError,
        "`strategy` must be an instance, got the class Confidence. Call it",
        lambda: generate(strategy=Confidence),
    ),
    "a strategy of no kind": (
        TypeError,
        r"`strategy` must be an object such as `apd.Confidence\(2\)` or a name such as 'confidence:2', got 2",
        lambda: APDSampler(trace_sampler().drafter, strategy=2),  # type: ignore[arg-type]
    ),
    "unknown noise": (ValueError, "`noise` must be one of 'keyed', 'step'", lambda: generate(noise="fresh")),
    "unknown first": (
        ValueError,
        "`first` must be one of 'draft', 'judge', got 'both'",
        lambda: generate(first="both"),
    ),
    "a judged first token without correction": (
        ValueError,
        "`correction` must be True with first='judge' and acceptance='coupling', got False: .* Set `correction`",
        lambda: generate(first="judge"),
    ),
    "a judged first token with tau": (
        ValueError,
        "`acceptance_threshold` must be 0 with first='judge', got 0.5: .* Leave it out",
        lambda: generate(first="judge", correction=True, acceptance_threshold=0.5),
    ),
    "a judged first token and a rule that gives none": (
        ValueError,
        r"`rule` must replace every first token that it rejects with first='judge', got Coupling\(.* Use Coupling",
        lambda: generate(first="judge", acceptance=Coupling()),
    ),
    "first of APD": (ValueError, "`first` must be one of 'draft', 'judge', got None", lambda: APD(0.5, first=None)),  # type: ignore[arg-type]
    "correction a number": (TypeError, "`correction` must be True or False", lambda: generate(correction=1)),
    "rejection with tau": (
        ValueError,
        "`acceptance_threshold` must be 0 with acceptance='rejection'",
        lambda: generate(acceptance="rejection", acceptance_threshold=0.5),
    ),
    "rejection with correction": (
        ValueError,
        "rejection always commits a draw",
        lambda: generate(acceptance="rejection", correction=True),
    ),
    "no verifier": (
        ValueError,
        r"`verifier` must be given with APD\(mixture_weight=0.5.*mixture_weight=1 needs none",
        lambda: APDSampler(trace_sampler().drafter).generate(PROMPT, max_new_tokens=4),
    ),
    "any order with W": (
        ValueError,
        r"`kv_window` must be None with Confidence\(tokens_per_step=1\), got 4",
        lambda: generate(kv_window=4, strategy=Confidence(1)),
    ),
    "K of 0": (ValueError, "`tokens_per_step` must be at least 1, got 0", lambda: LeftToRight(0)),
    # prompts
    "no prompt": (ValueError, "must hold at least one prompt token, got none", lambda: generate(input_ids=None)),
    "empty prompt": (ValueError, "at least one prompt token", lambda: generate(input_ids=PROMPT[:, :0])),
    "no rows": (ValueError, "at least one prompt token", lambda: generate(input_ids=PROMPT[:0])),
    "text as prompt": (TypeError, "Encode text with the tokenizer", lambda: generate(input_ids="hello")),
    "one dimension": (
        ValueError,
        r"two dimensions \[rows, tokens\], got shape \[4\]",
        lambda: generate(input_ids=PROMPT[0]),
    ),
    "float ids": (TypeError, "must hold integers, got torch.float32", lambda: generate(input_ids=PROMPT.float())),
    "prompt twice": (ValueError, "got both `inputs` and `input_ids`", lambda: generate(inputs=PROMPT)),
    "all padding": (
        ValueError,
        "row 0 is all padding",
        lambda: generate(attention_mask=torch.zeros_like(PROMPT)),
    ),
    "right padding": (
        ValueError,
        'tokenizer.padding_side = "left"',
        lambda: generate(attention_mask=torch.tensor([[1, 1, 1, 0]])),
    ),
    "right padding, no mask": (
        ValueError,
        "row 0 has padding behind a token",
        lambda: generate(input_ids=torch.tensor([[7, 8, 9, 3]]), pad_token_id=3, eos_token_id=STOP),
    ),
    "mask of another shape": (
        ValueError,
        "`attention_mask` must have the shape of `input_ids`",
        lambda: generate(attention_mask=torch.ones(1, 3)),
    ),
    "id outside the vocabulary": (
        ValueError,
        "must be below 160, the vocabulary that the models share, got 160",
        lambda: generate(input_ids=torch.tensor([[7, 160]])),
    ),
    "negative id": (ValueError, "must be below 160", lambda: generate(input_ids=torch.tensor([[7, -1]]))),
    "a hole before a causal model alone": (
        ValueError,
        "A hole needs a strategy that runs the drafter, got Autoregressive",
        lambda: generate(input_ids=torch.tensor([[7, MASK, 9]]), strategy="autoregressive"),
    ),
    "a hole with a strategy that revokes": (
        ValueError,
        "A hole needs a strategy that revokes nothing, got WINO",
        lambda: generate(input_ids=torch.tensor([[7, MASK, 9]]), strategy="wino:0.6"),
    ),
    # lengths
    "max_new_tokens below 0": (
        ValueError,
        "`max_new_tokens` must be greater than 0, but is -1",
        lambda: generate(max_new_tokens=-1),
    ),
    "max_new_tokens a fraction": (TypeError, "`max_new_tokens` must be a whole", lambda: generate(max_new_tokens=1.5)),
    "max_length within the prompt": (
        ValueError,
        "`max_length` must exceed the prompt's 4 columns",
        lambda: generate(max_new_tokens=None, max_length=4),
    ),
    "beyond the model's positions": (
        ValueError,
        "must fit the drafter's 2048 positions, got 5004 tokens",
        lambda: generate(max_new_tokens=5000),
    ),
    # sampling and counting
    "negative temperature": (
        ValueError,
        "`temperature` must be at least 0 and finite, got -1.0. Use 0",
        lambda: generate(do_sample=True, temperature=-1.0),
    ),
    "negative top_k": (ValueError, "`top_k` must be at least 0", lambda: generate(do_sample=True, top_k=-1)),
    "top_p above 1": (ValueError, r"`top_p` must be in \(0, 1\]", lambda: generate(do_sample=True, top_p=1.5)),
    "min_p above 1": (ValueError, r"`min_p` must be in \[0, 1\]", lambda: generate(do_sample=True, min_p=2.0)),
    "no copies": (
        ValueError,
        "`num_return_sequences` must be at least 1, got -2",
        lambda: generate(num_return_sequences=-2),
    ),
    "too few seeds": (ValueError, "one entry per row, 2 ", lambda: generate(seed=[1], input_ids=PROMPT.repeat(2, 1))),
    "copies of one greedy row": (
        ValueError,
        "do not support `num_return_sequences`",
        lambda: generate(num_return_sequences=2),
    ),
    "seed a word": (TypeError, "`seed` must be an integer or a list with one", lambda: generate(seed="now")),
    "stop token outside": (ValueError, "`eos_token_id` must be an id that can be", lambda: generate(eos_token_id=999)),
    "stop token is the mask": (ValueError, "not the mask token, got 150", lambda: generate(eos_token_id=MASK)),
    # argument names
    "misspelt argument": (
        TypeError,
        "no argument `temprature`. Did you mean `temperature`",
        lambda: generate(temprature=1),
    ),
    "misspelt knob": (
        TypeError,
        "no argument `windowsize`. Did you mean `window_size`",
        lambda: generate(windowsize=1),
    ),
    "a name of an inner function": (
        TypeError,
        r"generate\(\) has no argument `config`",
        lambda: generate(config=APDConfig()),
    ),
    "a name of another inner function": (
        TypeError,
        r"generate\(\) has no argument `models`",
        lambda: list(trace_sampler().generate_many([[7]], models=1)),
    ),
    "misspelt knob of the sampler": (
        TypeError,
        "Did you mean `kv_window`",
        lambda: APDSampler(trace_sampler().drafter, kvwindow=3),
    ),
    "misspelt argument of from_pretrained": (
        TypeError,
        "Did you mean `attn_implementation`",
        lambda: APDSampler.from_pretrained("x", attn_implementaton="sdpa"),
    ),
    "beam search": (ValueError, "`num_beams` is not supported, got 4: APD draws one", lambda: generate(num_beams=4)),
    "beam search in a config": (
        ValueError,
        "`num_beams` is not supported, got 2",
        lambda: generate(generation_config=GenerationConfig(num_beams=2)),
    ),
    "a cache of one's own": (ValueError, "`kv_window` says what is cached", lambda: generate(use_cache=True)),
    "an assistant": (ValueError, "the diffusion model is what drafts", lambda: generate(assistant_model=object())),
    # models
    "vocabularies far apart": (ValueError, "256", lambda: verifier_of_vocabulary(1000)),
    "a causal drafter": (ValueError, "is_causal", lambda: in_memory(is_causal=True)),
    "a drafter without its family": (
        ValueError,
        "dream",
        lambda: APDSampler(copy.deepcopy(trace_sampler().drafter.model)),
    ),
    "NaN drafter": (
        FloatingPointError,
        "The drafter gave NaN, infinite or no finite logits at step 2 of row 0",
        lambda: broken("drafter", float("nan"), 3),
    ),
    "infinite drafter": (
        FloatingPointError,
        "The drafter gave NaN, infinite",
        lambda: broken("drafter", float("inf"), 1),
    ),
    "NaN verifier": (
        FloatingPointError,
        "The verifier gave NaN or infinite logits at step 1",
        lambda: broken("verifier", float("nan"), 2),
    ),
    "infinite verifier": (
        FloatingPointError,
        "The verifier gave NaN or infinite logits",
        lambda: broken("verifier", float("inf"), 1),
    ),
    "a verifier that leaves no token": (
        FloatingPointError,
        "no token that both models allow, or the verifier none at all, at step 0",
        lambda: broken("verifier", -float("inf"), 1),
    ),
    "models that exclude each other": (FloatingPointError, "no token that both models allow", disjoint_models),
    "a warper that leaves no token": (  # token 0 was committed
        FloatingPointError,
        "no finite logits at step 0 .* leave a token",
        lambda: trace_sampler().generate(
            PROMPT, max_new_tokens=4, do_sample=True, top_k=0, logits_processor=[Nothing()]
        ),
    ),
    # once accepted in silence
    "seed a truth value": (TypeError, "`seed` must be an integer", lambda: generate(seed=[True])),
    "attention_mask a list": (TypeError, "`attention_mask` must be a tensor", lambda: generate(attention_mask=[[1]])),
    "generation_config a dict": (
        TypeError,
        "`generation_config` must be a GenerationConfig, got dict",
        lambda: generate(generation_config={"top_k": 3}),
    ),
    "generation_config with a misspelling": (
        TypeError,
        "Did you mean `temperature`",
        lambda: generate(generation_config=GenerationConfig(temprature=0.3)),
    ),
    "generation_config with a knob": (
        TypeError,
        "no argument `mixture_weight`",
        lambda: generate(generation_config=GenerationConfig(mixture_weight=0.3)),
    ),
    "R beside a strategy": (
        ValueError,
        "`mixture_weight` has no effect beside",
        lambda: generate(strategy=LeftToRight(), mixture_weight=0.9),
    ),
    "no counts of tokens": (ValueError, "`tokens_per_step` must be at least 1", lambda: LeftToRight([])),
    "blocks of KLASS": (TypeError, "must pick within a block by the state alone", lambda: Blocks(KLASS())),
    "blocks, length first": (
        TypeError,
        r"`strategy` must come first and `length` behind it, got 8 first\. Write Blocks\(Threshold\(.*\), 8\)",
        lambda: Blocks(8, Threshold(0.9)),
    ),
    "blocks of WINO": (TypeError, "must pick within a block by the state alone", lambda: Blocks(WINO())),
    "R of APD": (ValueError, r"`mixture_weight` must be in \[0, 1\], got 1.5", lambda: APD(1.5, Coupling())),
    "tau of Coupling": (ValueError, r"`threshold` must be in \[0, 1\], got 3.0", lambda: Coupling(3.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_argument_rule_value_and_remedy(case):
    error, message, call = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=message):
            call()


NUMBERS = (
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("no_repeat_ngram_size", "pad_token_id", "eos_token_id"),
)
NO_NUMBERS = ("8", "0.7", "", True, [[8]], {"value": 8}, float("nan"), -1, -0.5)
OF_OTHER_KINDS = {
    "eos_token_id": ("<eos>", [1, None], ["1"], 1.5),
    "suppress_tokens": ("1, 2", 5, ["5"], [1.5]),
    "begin_suppress_tokens": ("1, 2", 5, ["5"]),
    "stop_strings": (5, [5], ["a", None], {"a": 1}),
    "bos_token_id": ("<s>", 1.0),
    "bad_words_ids": ("word", 5, [5], [["5"]]),
    "sequence_bias": ("word", {"a": 1.0}, {(1,): "2"}),
    "do_sample": ("true", 1, 0.0, []),
    "renormalize_logits": ("no", 1),
    "return_dict_in_generate": ("yes", 1),
    "output_scores": ("yes", 1),
    "output_logits": ("yes", 1),
}


def refused_by_name(name: str, call: Callable[[], Any], value: Any) -> None:
    with warnings.catch_warnings(), pytest.raises((TypeError, ValueError), match=f"`{name}`") as raised:
        warnings.simplefilter("ignore")
        call()
    assert "not supported between" not in str(raised.value), f"{name}={value!r}"


@pytest.mark.parametrize("name", [*NUMBERS, *OF_OTHER_KINDS])
def test_a_value_of_another_kind_is_refused_by_name(name):
    """As text from a form or a YAML file comes: as an argument, in a configuration, in the model's own one."""
    values = (*(NO_NUMBERS if name in NUMBERS else ()), *OF_OTHER_KINDS.get(name, ()))
    model = trace_sampler().drafter.model
    for value in values:
        sampled = {} if name == "do_sample" else {"do_sample": True}
        refused_by_name(name, lambda value=value, more=sampled: generate(**(more | {name: value})), value)
        given = GenerationConfig()
        setattr(given, name, value)
        refused_by_name(name, lambda given=given, more=sampled: generate(generation_config=given, **more), value)
        stored = copy.deepcopy(model.generation_config)
        setattr(stored, name, value)
        drafter = copy.copy(trace_sampler().drafter)
        drafter.generation_config = stored
        sampler = APDSampler(drafter, trace_sampler().verifier)
        more = sampled if name.startswith("max_") else sampled | {"max_new_tokens": 4}
        refused_by_name(name, lambda sampler=sampler, more=more: sampler.generate(PROMPT, **more), value)


KNOBS = {
    "mixture_weight": lambda value: APDConfig(mixture_weight=value),
    "acceptance_threshold": lambda value: APDConfig(acceptance_threshold=value),
    "window_size": lambda value: APDConfig(window_size=value),
    "kv_window": lambda value: APDConfig(kv_window=value),
    "kv_refresh": lambda value: APDConfig(kv_window=4, kv_refresh=value),
    "batch_size": lambda value: trace_sampler().generate_many([[7]], batch_size=value),
    "mask_token_id": lambda value: in_memory_with_mask(value),
    "tokens_per_step": LeftToRight,
    "threshold": Threshold,
    "factor": Factor,
    "bound": EntropyBound,
    "length": lambda value: Blocks(Confidence(), value),
    "kl_threshold": lambda value: KLASS(kl_threshold=value),
    "history": lambda value: KLASS(history=value),
    "revoke_below": lambda value: WINO(revoke_below=value),
}


def in_memory_with_mask(mask_token_id: Any) -> Any:
    return APDSampler(
        trace_sampler().drafter.model, trace_sampler().verifier, spec="dream", mask_token_id=mask_token_id
    )


@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_of_another_kind_is_refused_by_name(name):
    for value in (*NO_NUMBERS, [8, "8"]):
        refused_by_name(name, lambda value=value: KNOBS[name](value), value)


def test_numbers_of_arrays_are_numbers():
    plain = generate(do_sample=True, temperature=0.5, top_k=5, seed=1)
    assert torch.equal(plain, generate(do_sample=True, temperature=np.float32(0.5), top_k=np.int64(5), seed=1))
    assert torch.equal(plain, generate(do_sample=True, temperature=torch.tensor(0.5), top_k=5, seed=1))
    assert torch.equal(generate(eos_token_id=[STOP]), generate(eos_token_id=torch.tensor([STOP])))


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids", "inputs_embeds", "negative_prompt_ids"])
def test_refused_tensors_say_why(name):
    """A tensor has no truth value, so it cannot be compared with a default."""
    for value in (torch.arange(3)[None], torch.zeros(1)):
        with pytest.raises(ValueError, match=f"`{name}` is not supported"):
            generate(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [{"max_time": 0.1}, {"min_length": 7}],
)
def test_arguments_of_a_whole_batch_are_refused_for_many_prompts(settings):
    """Taken from the first prompt, they would stop or prolong the later ones."""
    name = next(iter(settings))
    for given in (settings, {"generation_config": GenerationConfig(**settings)}):
        with pytest.raises(ValueError, match=f"`{name}` cannot be meant in generate_many"):
            trace_sampler().generate_many(trace_prompts(), max_new_tokens=4, **given)


def test_streams_and_many_prompts_check_their_arguments_at_once():
    """Not at the first `next`."""
    with pytest.raises(TypeError, match="Did you mean `temperature`"):
        trace_sampler().stream(PROMPT, temprature=2)
    with pytest.raises(TypeError, match="Did you mean `temperature`"):
        trace_sampler().generate_many(trace_prompts(), temprature=2, on_error=lambda *_: None)


@pytest.mark.parametrize("pad_token_id", [-1, 160, 2**40])
def test_a_pad_token_outside_the_vocabulary_is_refused(pad_token_id):
    with pytest.raises(
        ValueError, match=rf"`pad_token_id` must be an id that can be decoded, 0 to 159, got {pad_token_id}"
    ):
        generate(pad_token_id=pad_token_id)


def test_a_pad_token_that_the_tokenizer_alone_knows_will_do():
    class Tokenizer:
        pad_token_id = eos_token_id = unk_token_id = None

        def __len__(self) -> int:
            return 161

    assert generate(pad_token_id=160, tokenizer=Tokenizer()).shape[1] == PROMPT.shape[1] + 4


@pytest.mark.parametrize("role", ["drafter", "verifier"])
def test_a_wrapper_around_a_model_is_refused_with_how_to_unwrap_it(role):
    model = getattr(trace_sampler(), role).model

    class Sharded(torch.nn.Module):  # as torch's FullyShardedDataParallel, which needs a process group
        module = model

        def summon_full_params(self) -> None: ...

    wrapped = {
        "model._orig_mod": torch.compile(model, backend="eager"),
        "model.module": torch.nn.DataParallel(model),
        "full state dict": Sharded(),
        "from_pretrained": "org/model",
    }
    if peft is not None:
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        wrapped["merge_and_unload"] = peft.get_peft_model(copy.deepcopy(model), settings)
    for remedy, one in wrapped.items():
        models = {"drafter": trace_sampler().drafter, "verifier": trace_sampler().verifier} | {role: one}
        with pytest.raises(TypeError, match=rf"`{role}` must be a transformers model .*{remedy}"):
            APDSampler(**models, spec="dream" if role == "drafter" else None)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("role", ["drafter", "verifier"])
def test_a_model_after_fully_shard_is_refused(role, process_group):
    """It is still a transformers model, but its weights are DTensors: torch's own error comes with the first forward."""
    mesh = init_device_mesh("cpu", (1,))
    sharded = fully_shard(copy.deepcopy(getattr(trace_sampler(), role).model), mesh=mesh)
    models = {"drafter": trace_sampler().drafter, "verifier": trace_sampler().verifier} | {role: sharded}
    with pytest.raises(TypeError, match=rf"`{role}` must be a transformers model .* got FSDP.*full state dict"):
        APDSampler(**models, spec="dream" if role == "drafter" else None)


def test_sampling_arguments_without_do_sample_are_warned_of_once():
    """transformers logged that the argument may be ignored, and then we warned that it has no effect."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("transformers.generation.configuration_utils")
    type(logger).warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for config in (None, GenerationConfig(max_new_tokens=4)):
                generate(temperature=0.7, top_k=3, generation_config=config)
        said = [str(each.message) for each in caught]
        assert said == [f"`{name}` has no effect without `do_sample=True`." for name in ("temperature", "top_k")] * 2
        assert not logged
        GenerationConfig().update(temperature=0.7, top_k=3)
        assert "ignored" in logged[0]  # it would have been seen
    finally:
        logger.removeHandler(handler)


def test_warnings_point_at_the_caller():
    for call in (generate, lambda **kwargs: list(trace_sampler().stream(PROMPT, max_new_tokens=1, **kwargs))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(temperature=0.5)
        assert [warning.filename for warning in caught if "no effect" in str(warning.message)] == [__file__]


def test_no_length_is_warned_of():
    with pytest.warns(UserWarning, match="20 new tokens at most"):
        assert generate(max_new_tokens=None, eos_token_id=[]).shape[1] == PROMPT.shape[1] + 20


def test_padding_that_cannot_be_told_from_stop_tokens_is_warned_of():
    with pytest.warns(UserWarning, match="Pass `attention_mask`"):
        generate(input_ids=torch.tensor([[STOP, 7, 8]]), pad_token_id=STOP, eos_token_id=STOP)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name, (_, _, call) in CASES.items():
        try:
            call()
            message = "(accepted!)"
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        print(f"| {name} | {message} |")
