"""What a checkpoint stores for `generate()` means what the same arguments mean, however decoding is begun."""

import functools
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from thinned import thinned

from apd import APDSampler, load_drafter
from apd.cli import main
from apd.included import DRAFTER_DIR, VERIFIER_DIR

PROMPT = 'Put the names in a new random order: ["Carl", "Wim", "Kurt", "Ada"].'
SEED = 5

# Each changes the answer to the prompt, or how it is drawn.
STORED: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True},
    "cold sampling": {"do_sample": True, "temperature": 0.0},
    "warm sampling": {"do_sample": True, "temperature": 3.0},
    "top_k": {"do_sample": True, "temperature": 3.0, "top_k": 2},
    "top_p": {"do_sample": True, "temperature": 3.0, "top_p": 0.5},
    "min_p": {"do_sample": True, "temperature": 3.0, "min_p": 0.2},
    "stop strings": {"stop_strings": [",", "]"]},
    "a stop string": {"stop_strings": "Carl"},
    "stop tokens": {"eos_token_id": [1, 12, 84]},
    "suppressed tokens": {"suppress_tokens": list(range(100, 200))},
    "suppressed at first": {"begin_suppress_tokens": list(range(150, 160))},
    "a penalty": {"repetition_penalty": 6.0},
    "no repetitions": {"no_repeat_ngram_size": 1},
    "a minimum": {"min_new_tokens": 14},
    "bad words": {"bad_words_ids": [[token] for token in range(100, 200)]},
}
LENGTHS: dict[str, dict[str, Any]] = {"max_new_tokens": {"max_new_tokens": 3}, "max_length": {"max_length": 24}}


@functools.cache
def plain() -> APDSampler:
    return APDSampler.from_included()


@functools.cache
def storing(**stored: str) -> APDSampler:
    """The included pair with a generation_config.json, each value as JSON."""
    with tempfile.TemporaryDirectory() as name:
        directory = write(Path(name) / "drafter", {name: json.loads(value) for name, value in stored.items()})
        return APDSampler(load_drafter(directory), plain().verifier, plain().tokenizer)


def of(fields: dict[str, Any]) -> APDSampler:
    return storing(**{name: json.dumps(value) for name, value in fields.items()})


def write(directory: Path, fields: dict[str, Any]) -> Path:
    shutil.copytree(DRAFTER_DIR, directory)
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return directory


def answer(sampler: APDSampler, **arguments: Any) -> list[int]:
    inputs = sampler.tokenizer([PROMPT], return_tensors="pt")
    return sampler.generate(**inputs, seed=SEED, **arguments)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", thinned(STORED | LENGTHS, 2))
def test_stored_values_mean_what_the_arguments_mean(case):
    fields = (STORED | LENGTHS)[case]
    length = {} if case in LENGTHS else {"max_new_tokens": 16}
    asked = answer(plain(), **length, **fields)
    assert answer(of(fields), **length) == asked
    if case != "cold sampling":
        assert asked != answer(plain(), max_new_tokens=16), "the case has no effect"
    many = next(of(fields).generate_many([PROMPT], seed=SEED, **length))
    assert many.tokens == next(plain().generate_many([PROMPT], seed=SEED, **length, **fields)).tokens


@pytest.mark.parametrize("case", ["top_k", "stop tokens", "suppressed tokens", "a penalty", "a minimum", "bad words"])
def test_stored_values_count_once_through_custom_generate(case):
    sampler = of(STORED[case])
    inputs = sampler.tokenizer([PROMPT], return_tensors="pt")
    given = sampler.drafter.model.generate(**inputs, custom_generate=sampler, seed=SEED, max_new_tokens=16)
    assert given[0, inputs["input_ids"].shape[1] :].tolist() == answer(sampler, max_new_tokens=16)


def test_an_argument_of_none_overrides_a_stored_value_through_custom_generate_too():
    sampler = of(STORED["stop tokens"])
    inputs = sampler.tokenizer([PROMPT], return_tensors="pt")
    given = sampler.drafter.model.generate(**inputs, custom_generate=sampler, max_new_tokens=16, eos_token_id=None)
    assert given[0, inputs["input_ids"].shape[1] :].tolist() == answer(sampler, max_new_tokens=16, eos_token_id=None)
    assert given.shape[1] == inputs["input_ids"].shape[1] + 16


def test_a_stored_length_does_not_precede_the_callers(recwarn):
    width = plain().tokenizer([PROMPT], return_tensors="pt")["input_ids"].shape[1]
    assert len(answer(of({"max_new_tokens": 3}), max_length=width + 5, eos_token_id=None)) == 5
    assert len(answer(of({"max_length": width + 3}), max_new_tokens=5, eos_token_id=None)) == 5
    assert not [each for each in recwarn if "takes precedence" in str(each.message)]


def test_the_command_line_keeps_stored_stop_strings(tmp_path, capsys):
    pair = ["--drafter", str(write(tmp_path / "drafter", {"stop_strings": ","})), "--verifier", str(VERIFIER_DIR)]
    assert main(["generate", "--prompt", PROMPT, "--max-new-tokens", "32", *pair]) == 0
    assert capsys.readouterr().out.count(",") == 1
    assert main(["generate", "--prompt", PROMPT, "--max-new-tokens", "32", *pair, "--stop-string", "]"]) == 0
    assert capsys.readouterr().out.count(",") > 1


def test_a_stored_temperature_of_0_is_for_stored_sampling_only():
    """Dream stores 0 for its own sampler beside no `do_sample`: a caller who asks for sampling gets it."""
    asked = {"do_sample": True, "max_new_tokens": 16}
    assert answer(of({"temperature": 0.0}), **asked) == answer(plain(), **asked)
    assert answer(of({"temperature": 0.0}), **asked, temperature=0.0) == answer(plain(), max_new_tokens=16)
    cold = of({"do_sample": True, "temperature": 0.0})
    assert answer(cold, max_new_tokens=16, temperature=3.0) == answer(plain(), **asked, temperature=3.0)


@pytest.mark.parametrize(
    "fields", [{"do_sample": True, "temperature": -1.0}, {"top_p": 1.5}, {"repetition_penalty": 0}]
)
def test_a_stored_value_outside_its_range_is_refused_as_the_argument_is(fields):
    with pytest.raises(ValueError, match=f"`{list(fields)[-1]}` must be "):
        answer(of(fields), max_new_tokens=8)
