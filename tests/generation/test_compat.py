"""What is assumed of transformers beyond its documented arguments, one sentence each.

A release that breaks an assumption fails here first, and the sentence says what to look at. What may change without
harm is not listed: the library asks a signature or a default instead.
"""

import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers
from toy import tiny_pair
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LogitsProcessor,
    MambaForCausalLM,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PrefixConstrainedLogitsProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    TextStreamer,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from apd import APDSampler
from apd.decoding.processing import STATEFUL, WARPERS, split_processors
from apd.generation.support import REFUSED, SUPPORTED
from apd.models.cache import ColumnCache, ColumnLayer, cache_argument
from apd.models.loading import as_verifier

pytestmark = pytest.mark.compat
IDS = torch.tensor([[0, 3, 4, 5], [6, 7, 8, 9]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
PROMPT = {"input_ids": IDS, "attention_mask": MASK}
CALL = PROMPT | {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler(*tiny_pair())


def generated(sampler: APDSampler, given: Any = None, **arguments: Any) -> torch.Tensor:
    """`model.generate` with the sampler, or with a callable around it that gets more than today."""
    return sampler.drafter.model.generate(**CALL, custom_generate=given or sampler, **arguments)


def handing_over(sampler: APDSampler, **more: Any) -> Any:
    """The sampler as a later transformers might call it."""

    def custom_generate(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
        return sampler(model, input_ids, **prepared, **more)

    return custom_generate


# --- arguments of `generate`


def test_every_argument_of_generate_is_supported_or_refused() -> None:
    """Decide in `apd/generation/support.py` about each argument that a release adds; it is refused by name until then."""
    there = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    there |= {name for name in vars(GenerationConfig()) if name[0] != "_"} - {"transformers_version"}
    assert there - set(SUPPORTED) - set(REFUSED) == set()
    assert set(SUPPORTED) & set(REFUSED) == set()


@pytest.fixture
def new_field(monkeypatch: pytest.MonkeyPatch) -> str:
    """A field that a later transformers adds to the configuration, and resolves to 5 where it is not given."""
    construct, resolve = GenerationConfig.__init__, GenerationConfig._get_default_generation_params

    def with_field(self: GenerationConfig, **kwargs: Any) -> None:
        self.new_field = kwargs.pop("new_field", None)
        construct(self, **kwargs)

    monkeypatch.setattr(GenerationConfig, "__init__", with_field)
    monkeypatch.setattr(
        GenerationConfig, "_get_default_generation_params", staticmethod(lambda: resolve() | {"new_field": 5})
    )
    return "new_field"


@pytest.mark.parametrize("value", [None, False, 0, 5])
def test_a_new_field_that_asks_for_nothing_does_no_harm(sampler, new_field, value) -> None:
    assert torch.equal(sampler.generate(**CALL, new_field=value), generated(sampler, new_field=value))


def test_a_new_field_that_asks_for_something_is_refused_by_name(sampler, new_field) -> None:
    for call in (sampler.generate, lambda **given: sampler.drafter.model.generate(**given, custom_generate=sampler)):
        config = GenerationConfig(new_field=[1, 2], max_new_tokens=6)
        for asked in ({"new_field": 3, "max_new_tokens": 6}, {"generation_config": config}):
            with pytest.raises(
                ValueError, match=r"`new_field` is not supported, got .*newer than this version of apd"
            ):
                call(**PROMPT, **asked)


def test_a_resolved_configuration_has_readable_defaults() -> None:
    """`GenerationConfig._get_default_generation_params()` gives what `generate` puts in fields that are `None`."""
    assert GenerationConfig._get_default_generation_params()["num_assistant_tokens_schedule"] is not None
    assert GenerationConfig().num_assistant_tokens_schedule is None


# --- custom_generate


def test_arguments_that_transformers_prepares_are_no_misspelling(sampler) -> None:
    """`generate` hands a callable what `forward` or `prepare_inputs_for_generation` take, by any name."""
    seen: dict[str, Any] = {}

    def probe(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
        seen.update(prepared)
        return sampler(model, input_ids, **prepared)

    expected = sampler.generate(**CALL)
    assert torch.equal(generated(sampler, probe), expected)
    assert "generation_config" in seen and seen.keys() & {"cache", "past_key_values"}
    assert torch.equal(generated(sampler, handing_over(sampler, labels=IDS, is_first_iteration=True)), expected)


def test_unknown_model_arguments_are_ignored_with_a_warning(sampler) -> None:
    with pytest.warns(UserWarning, match="`rope_plan` has no effect with `custom_generate`") as caught:
        found = generated(sampler, handing_over(sampler, rope_plan=1, another=None))
    assert torch.equal(found, sampler.generate(**CALL))
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("wrong, right", {"mixture_wieght": "mixture_weight", "strategi": "strategy"}.items())
def test_a_misspelled_argument_is_refused(sampler, wrong, right) -> None:
    """`generate` refuses arguments that the model does not take, before it calls a `custom_generate`."""
    with pytest.raises(ValueError, match=wrong):
        generated(sampler, **{wrong: 0.5})
    with pytest.raises(TypeError, match=f"has no argument `{wrong}`. Did you mean `{right}`?"):
        generated(sampler, handing_over(sampler, **{wrong: 0.5}))


def test_arguments_of_the_model_that_cannot_be_meant_are_refused(sampler) -> None:
    with pytest.raises(ValueError, match="`inputs_embeds` is not supported"):
        generated(sampler, handing_over(sampler, inputs_embeds=torch.zeros(2, 4, 16)))
    with pytest.raises(ValueError, match=r"`cache` is not supported, got .*: `kv_window` says"):
        sampler.generate(**CALL, cache=DynamicCache(config=sampler.drafter.model.config))


def test_options_of_a_models_own_sampler_do_no_harm() -> None:
    """`generate` copies what the model's generation config holds, options that transformers does not know included."""
    sampler = APDSampler(*tiny_pair())
    sampler.drafter.model.generation_config.update(alg="entropy", allow_custom_entries=True)
    assert torch.equal(generated(sampler), sampler.generate(**CALL))


def test_generate_prepares_objects_whose_values_can_be_read(sampler) -> None:
    """`generate` makes these objects of these options, and each keeps its value under the option's name."""
    seen: dict[str, Any] = {}

    def probe(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
        seen.update(prepared)
        return input_ids

    options = {
        "min_new_tokens": 2,
        "begin_suppress_tokens": [3],
        "eos_token_id": [1],
        "max_time": 9.0,
        "repetition_penalty": 1.5,
        "pad_token_id": 0,
    }
    generated(sampler, probe, **options)
    objects = {type(each): each for each in [*seen["logits_processor"], *seen["stopping_criteria"]]}
    assert objects.keys() == {
        MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        SuppressTokensAtBeginLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        EosTokenCriteria,
        MaxLengthCriteria,
        MaxTimeCriteria,
    }
    assert objects[MinLengthLogitsProcessor].min_length == 6  # with the prompt's four columns
    assert objects[MinNewTokensLengthLogitsProcessor].min_new_tokens == 2
    assert torch.as_tensor(objects[SuppressTokensAtBeginLogitsProcessor].begin_suppress_tokens).tolist() == [3]
    assert torch.as_tensor(objects[EosTokenCriteria].eos_token_id).tolist() == [1]
    assert objects[MaxLengthCriteria].max_length == 10
    assert objects[RepetitionPenaltyLogitsProcessor].penalty == 1.5


@pytest.mark.parametrize("given", [{}, {"prompt_ignore_length": 3}])
def test_a_repetition_penalty_of_the_callers_is_kept_as_it_is(sampler, given) -> None:
    """It was made again from the penalty alone, without the prompt tokens that it was to ignore."""
    processors = [RepetitionPenaltyLogitsProcessor(5.0, **given)]
    expected = sampler.generate(**CALL, logits_processor=processors)
    assert torch.equal(generated(sampler, logits_processor=processors), expected)


# --- processors


PURE = """
    EncoderNoRepeatNGramLogitsProcessor EncoderRepetitionPenaltyLogitsProcessor ExponentialDecayLengthPenalty
    ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor LogitNormalization
    MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
    PrefixConstrainedLogitsProcessor RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor
    SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor TopHLogitsWarper WatermarkLogitsProcessor
""".split()


def test_every_processor_is_known_to_be_pure_or_not() -> None:
    """Read each processor that a release adds: one that keeps a state belongs in `STATEFUL` of `apd/decoding/processing.py`."""
    there = {
        name
        for name, kind in vars(transformers.generation.logits_process).items()
        if isinstance(kind, type) and issubclass(kind, LogitsProcessor) and kind is not LogitsProcessor
    }
    assert there - {*PURE, *STATEFUL, *(warper.__name__ for warper in WARPERS)} == set()


def test_a_grammar_can_be_taken_out_of_its_processor() -> None:
    """`PrefixConstrainedLogitsProcessor` keeps the caller's function."""

    def grammar(row: int, ids: torch.Tensor) -> list[int]:
        return [1]

    assert split_processors([PrefixConstrainedLogitsProcessor(grammar, num_beams=1)])[2] is grammar


# --- models, caches, attention


@pytest.mark.parametrize("kind", [Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM, GPT2LMHeadModel])
def test_a_decoder_takes_its_cache_by_one_of_two_names(kind) -> None:
    """`forward` of a decoder, and of the model inside, takes the cache as `cache` or `past_key_values`."""
    inside = type(kind(kind.config_class(num_hidden_layers=0, hidden_size=16, num_attention_heads=2)).base_model)
    names = {cache_argument(kind), cache_argument(inside)}
    assert len(names) == 1 and names <= {"cache", "past_key_values"}


def test_a_decoder_without_a_cache_is_run_without_one() -> None:
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    with pytest.warns(
        UserWarning, match=r"`cache` or `past_key_values`, but OpenAIGPTModel.forward takes `input_ids`"
    ):
        assert as_verifier(model).way == "no cache"


def test_a_pass_and_a_call_are_not_deprecated(sampler) -> None:
    """What transformers only logs is looked for in every test, see `conftest.py`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kv_window in (None, 2):
            sampler.generate(**CALL, kv_window=kv_window)
            generated(sampler, kv_window=kv_window)


def test_the_cache_has_every_method_that_models_ask_for(sampler) -> None:
    """A layer of a cache has no abstract methods but those that `ColumnLayer` has, and `Cache` is made of layers."""
    assert not ColumnLayer.__abstractmethods__
    assert CacheLayerMixin.__abstractmethods__ <= vars(ColumnLayer).keys()
    cache = ColumnCache(sampler.drafter.model, 2, 8)
    assert len(cache.layers) == 2 and cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == (0, 0)
    assert cache.get_max_length() == 8


def test_layers_with_full_attention_are_recognised() -> None:
    """`DynamicCache(config=…)` has a `DynamicLayer` for each layer with full attention, and others for the rest."""

    def layers(**config: Any) -> set[type]:
        return {type(layer) for layer in DynamicCache(config=Qwen2Config(num_hidden_layers=2, **config)).layers}

    assert layers() == {DynamicLayer}
    assert DynamicLayer not in layers(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert MambaForCausalLM._is_stateful


def test_attention_is_known_by_name() -> None:
    """Both registries know "sdpa", and a model tells its implementation by `config._attn_implementation`."""
    assert "sdpa" in AttentionInterface() and "sdpa" in AttentionMaskInterface()
    model = tiny_pair()[1].model
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name


def test_loading_reports_what_did_not_fit(sampler, tmp_path) -> None:
    """`from_pretrained(output_loading_info=True)` reports missing, mismatched and unexpected weights."""
    sampler.drafter.model.save_pretrained(tmp_path)
    _, report = Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {
        kind: len(report[kind]) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
    } == dict.fromkeys(("missing_keys", "mismatched_keys", "unexpected_keys"), 0)


def test_a_streamer_tells_text_by_a_method_to_be_overridden() -> None:
    """`TextStreamer` calls `on_finalized_text(text, stream_end=…)` with every piece."""
    assert list(inspect.signature(TextStreamer.on_finalized_text).parameters) == ["self", "text", "stream_end"]
