"""What people type from other scripts is answered with what it becomes here; and what a sampler shows of itself."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from pairs import left_padded
from paths import ROOT
from toy import tiny_pair, toy
from transformers import pipeline

from apd import EXAMPLE_PROMPTS, APDSampler
from apd.config import KNOBS, LETTERS, APDConfig
from apd.generation.elsewhere import CALL, LOADING
from apd.kinds import GENERATION

PAGE = (ROOT / "docs/coming-from.md").read_text("utf-8")


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


def refusal(function, **arguments) -> str:
    with pytest.raises((TypeError, ValueError)) as refused:
        function(**arguments)
    return str(refused.value)


def test_every_name_of_another_script_is_answered(sampler: APDSampler) -> None:
    ids = torch.tensor([[5]])
    for name, becomes in CALL.items():
        said = refusal(sampler.generate, inputs=ids, max_new_tokens=1, **{name: 7})
        assert said == f"generate() has no argument `{name}`. {becomes.replace('{value}', '7')}."
    for name, becomes in LOADING.items():
        said = refusal(APDSampler.from_pretrained, drafter="nowhere", **{name: True})
        assert said.endswith(becomes.replace("{value}", "True").replace("{name}", name) + ".")


def test_what_works_here_is_no_name_of_another_script() -> None:
    assert not CALL.keys() & (KNOBS.keys() | GENERATION.keys())
    assert set(LETTERS.values()) <= KNOBS.keys() and not LETTERS.keys() & KNOBS.keys()


def test_letters_are_answered_with_their_knobs(sampler: APDSampler) -> None:
    assert {"R", "tau", "τ", "M", "W", "N"} <= LETTERS.keys()
    for letter, name in LETTERS.items():
        for function in (sampler.stream, APDSampler.from_included):
            assert f"no argument `{letter}`. Write {name}=0.5" in refusal(
                function, **{letter: 0.5, "inputs": torch.ones(1, 1)}
            )
        for function in (APDConfig, APDConfig.paper, APDConfig().replace):
            assert f"APDConfig() has no argument `{letter}`. Write {name}=0.5" in refusal(function, **{letter: 0.5})


def test_a_config_answers_unknown_knobs_and_is_otherwise_a_dataclass() -> None:
    assert refusal(APDConfig, mixture_wieght=1).endswith("Did you mean `mixture_weight`?")
    assert refusal(APDConfig, banana=1).endswith(f"Known: {', '.join(KNOBS)}.")
    assert list(inspect.signature(APDConfig).parameters) == list(KNOBS)
    config = APDConfig(0.25, window_size="auto")
    assert (
        copy.deepcopy(config)
        == pickle.loads(pickle.dumps(config))
        == APDConfig(mixture_weight=0.25, window_size="auto")
    )


@pytest.mark.parametrize(
    "function", [APDSampler.from_included, lambda config: APDSampler(toy().drafter, config=config)]
)
def test_what_is_no_config_is_refused(function) -> None:
    """A strategy's name in the first place was `str.replace`, which wanted two arguments."""
    said = refusal(function, config="threshold:0.9")
    assert said.startswith("`config` must be an APDConfig, got str 'threshold:0.9'. Give single knobs by name")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("mixture_wieght", "mixture_weight"), ("maxnewtokens", "max_new_tokens"), ("Temperature", "temperature")],
)
def test_a_misspelling_is_answered_with_the_nearest_name(sampler: APDSampler, typed: str, meant: str) -> None:
    assert refusal(sampler.generate, inputs=torch.tensor([[5]]), **{typed: 1}).endswith(f"Did you mean `{meant}`?")


@pytest.mark.parametrize("name", ["prompt", "text", "messages"])
def test_a_prompt_by_another_name_is_answered_before_it_is_missed(sampler: APDSampler, name: str) -> None:
    for function in (sampler.generate, sampler.stream):
        assert f"no argument `{name}`. Encode it first" in refusal(function, **{name: "Sort", "max_new_tokens": 4})
    assert "`input_ids` must hold at least one prompt token, got none" in refusal(sampler.generate, max_new_tokens=4)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("mixture_weight", "mixture_weight"), ("tau", "acceptance_threshold"), ("mixture_wieght", "mixture_weight")],
)
def test_a_knob_is_no_attribute_of_a_sampler(name: str, meant: str) -> None:
    """`sampler.mixture_weight = 0` was taken, and every call went on with 0.5."""
    made = APDSampler(toy().drafter, toy().verifier)
    with pytest.raises(
        AttributeError, match=f"`{name}` is no .* Pass {meant}=0.25 to generate\\(\\), or make the sampler"
    ):
        setattr(made, name, 0.25)
    with pytest.raises(AttributeError, match=r"Pass temperature=0.25 to generate\(\)\."):
        made.temperature = 0.25


def test_other_attributes_of_a_sampler_are_free() -> None:
    class Mine(APDSampler):
        first: str = "of a subclass"

    made = Mine(toy().drafter, toy().verifier)
    made.strategy, made.first, made.note = "left-to-right", "its own", "of the caller"
    for other in (copy.copy(made), copy.deepcopy(made)):
        assert (other.strategy, other.first, other.note) == ("left-to-right", "its own", "of the caller")


def test_the_page_has_the_sentences_of_the_refusals() -> None:
    rows = re.findall(r"^\| (`.*?`) \| (.*) \|$", PAGE, re.MULTILINE)
    shown = {(name, becomes) for names, becomes in rows for name in re.findall(r"`(\w+)`", names)}
    assert shown >= CALL.items() | LOADING.items()


def test_a_whole_encoding_is_answered_with_two_stars(sampler: APDSampler) -> None:
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:2], return_tensors="pt", padding=True)
    assert "Write two stars, `generate(**inputs)`" in refusal(sampler.generate, inputs=inputs)
    assert "Write `sampler.generate(**inputs)`" in refusal(sampler, **inputs)


def test_a_pipeline_decodes_with_the_sampler(sampler: APDSampler) -> None:
    prompts = EXAMPLE_PROMPTS[:2]
    write = pipeline(
        "text-generation", model=sampler.drafter.model, tokenizer=sampler.tokenizer, custom_generate=sampler
    )
    found = write(prompts, max_new_tokens=32, mixture_weight=0.2, return_full_text=False)
    answers = sampler.generate_many(prompts, max_new_tokens=32, mixture_weight=0.2)
    assert [one["generated_text"] for [one] in found] == [answer.text for answer in answers]


# ---------------------------------------------------------------- what is shown


def test_a_sampler_shows_models_knobs_and_device(sampler: APDSampler) -> None:
    shown = repr(APDSampler(sampler.drafter, sampler.verifier, sampler.tokenizer, mixture_weight=0.25))
    for part in ("Qwen2ForCausalLM, 1.9M parameters", "mixture_weight=0.25", "device=cpu", "logit_shift=1"):
        assert part in shown
    assert "strategy=Confidence(tokens_per_step=2)" in repr(APDSampler(sampler.drafter, strategy="confidence:2"))
    assert "'self', the drafter's own weights" in repr(APDSampler(sampler.drafter, sampler.drafter.model))
    assert sampler.device == sampler.drafter.device
    assert "vocab_size=" in repr(APDSampler(toy().drafter, toy().verifier))
    drafter = toy().drafter
    drafter.model = torch.nn.Linear(1, 1)  # of one's own, without transformers' attributes
    assert "vocab_size=" in repr(APDSampler(drafter, mixture_weight=1.0))


def test_an_output_has_the_text_of_its_rows(sampler: APDSampler) -> None:
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:3], return_tensors="pt", padding=True)
    output = sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
    assert output.text == [one.text for one in sampler.generate_many(EXAMPLE_PROMPTS[:3], max_new_tokens=32)]
    bare = APDSampler(*tiny_pair()).generate(
        **left_padded([[3, 4]], pad=0), max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True
    )
    assert bare.text is None


def test_an_output_shows_how_its_text_begins(sampler: APDSampler) -> None:
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:5], return_tensors="pt", padding=True)
    output = sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
    shown = repr(output)
    assert shown.startswith(
        f"APDOutput(text={[text[:60] for text in output.text[:4]]!r} (of 5 rows), sequences=tensor("
    )
    bare = APDSampler(*tiny_pair()).generate(
        **left_padded([[3, 4]], pad=0), max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True
    )
    assert repr(bare).startswith("APDOutput(sequences=tensor(")
    assert repr(type(output)()) == "APDOutput()"


@pytest.mark.slow  # imports the compiler
def test_compiling_on_a_cpu_is_warned_of_where_it_is_asked_for() -> None:
    with pytest.warns(UserWarning, match="is made for GPUs") as warned:
        APDSampler(*tiny_pair()).compile()
    assert warned[0].filename == __file__


def test_a_missing_verifier_is_warned_of_before_weights_are_read(tmp_path) -> None:
    with (
        pytest.warns(UserWarning, match=r"`verifier` is None, and APD\(mixture_weight=0.5.* needs one") as warned,
        pytest.raises(ValueError, match=r"No config\.json"),
    ):
        APDSampler.from_pretrained(str(tmp_path))
    assert warned[0].filename == __file__
