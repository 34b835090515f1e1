"""Verifiers of every kind that transformers has: with a cache as without one, whatever was drafted and taken back."""

import functools
import warnings

import pytest
import torch
from thinned import thinned
from toy import tiny_pair
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from apd import APDSampler
from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.models.horizon import CAUSAL
from apd.models.loading import as_verifier, load_verifier, verifier_config
from apd.models.span import Reach, Span
from benchmarks.architectures import LENGTHS, shrunk, tiny_model, worst_difference

pytestmark = pytest.mark.compat

#: Largest difference, in units of the largest logit, of what is the same. The models are float64, but some compute in float32.
ROUNDING = 3e-5

#: A model type of each kind, fields of its config, and how it is run.
KINDS = {
    "plain": ("qwen3", {}, "columns"),
    "one sliding window": ("mistral", {}, "columns"),
    "sliding and full layers": ("olmo3", {}, "columns"),
    "sliding, full, local rope": ("gemma3_text", {}, "columns"),
    "capped logits, sliding": ("gemma2", {"final_logit_softcapping": 1.0}, "own head"),
    "scaled logits, sliding": ("cohere2", {}, "own head"),
    "divided logits": ("granite", {"logits_scaling": 4.0}, "own head"),
    "shared keys, capped logits": ("gemma4_text", {"final_logit_softcapping": 1.0}, "own head"),
    "chunks": ("llama4_text", {}, "own cache"),
    "ALiBi": ("bloom", {}, "own cache"),
    "a mask of its own": ("gpt_neo", {}, "own cache"),
    "convolutions": ("lfm2", {}, "own cache"),
    "gated delta rule": ("qwen3_5_text", {}, "own cache"),
    "state space and attention": ("granitemoehybrid", {"num_local_experts": 0}, "own cache"),
    "both in each layer": ("falcon_h1", {}, "own cache"),
    "state space": ("mamba2", {}, "own cache"),
    "state space, token by token": ("mamba", {}, "own cache, one by one"),
    "a cache that is wrong": ("recurrent_gemma", {}, "no cache"),
    "a state in an argument of its own": ("rwkv", {}, "no cache"),
}


# Kinds that are run in the same way as another one.
ALIKE = {"divided logits", "shared keys, capped logits", "a mask of its own", "state space and attention"}
ALIKE |= {"both in each layer", "state space", "a cache that is wrong"}


def slow(*kinds: str) -> list:
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@functools.cache
def verifier_of(kind: str):
    model_type, fields, _ = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return as_verifier(tiny_model(model_type, **fields).double())  # rounding must not hide a fault


@pytest.mark.parametrize("kind", [*thinned([kind for kind in KINDS if kind not in ALIKE], 2), *slow(*sorted(ALIKE))])
def test_a_verifier_scores_as_the_model_alone_after_every_rollback(kind):
    """Ragged rows behind a window of 8, drafts that are taken back, single tokens, rows that leave and join."""
    verifier = verifier_of(kind)
    assert worst_difference(verifier.model, verifier, (40, 31, 26), steps=10, seed=1) < ROUNDING


@pytest.mark.parametrize("kind", ["sliding, full, local rope", *slow("convolutions")])
def test_a_row_of_1500_tokens_is_scored_as_the_model_alone(kind):
    verifier = verifier_of(kind)
    assert worst_difference(verifier.model, verifier, LENGTHS, steps=5) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_run_in_the_fastest_way_that_is_right(kind):
    """A way that is wrong is never found, so a fault in one shows as a slower way here."""
    assert verifier_of(kind).way == KINDS[kind][2]


class Alone:
    """A verifier that runs a model on each row alone, without padding or cache: slow and plain."""

    max_length = None

    def __init__(self, model):
        self.model, self.vocab_size = model, model.config.vocab_size

    def open(self, state):
        return self

    def logits(self, state, window, draft):
        canvas = window.fill(draft, state.tokens)
        whole = torch.zeros(*draft.shape, self.vocab_size, dtype=self.model.dtype)
        rows = zip(state.layout.padding, window.starts, window.ends, strict=True)
        for row, (padding, start, end) in enumerate(rows):
            if end > start:
                logits = self.model(input_ids=canvas[row : row + 1, padding : end - 1], use_cache=False).logits
                whole[row, : end - start] = logits[0, start - end :]
        return whole

    def select(self, rows):
        pass

    def join(self, state):
        pass


@pytest.mark.parametrize(
    "kind",
    thinned(
        [
            "sliding, full, local rope",
            "capped logits, sliding",
            "a state in an argument of its own",
            "ALiBi",
            "gated delta rule",
        ],
        2,
    ),
)
def test_apd_generates_the_same_with_a_slow_verifier(kind):
    """Prompts of different lengths, more of them than rows, in one call of `generate`."""
    drafter = tiny_pair(vocab=96)[0]
    verifier = verifier_of(kind)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20, 21]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    outputs = [
        APDSampler(drafter, each, mixture_weight=0.5).generate(
            ids, attention_mask=mask, max_new_tokens=20, window_size=6, do_sample=True, seed=3
        )
        for each in (verifier, Alone(verifier.model))
    ]
    assert torch.equal(outputs[0], outputs[1])


def test_a_model_without_a_cache_that_goes_back_is_named_with_the_cost():
    with pytest.warns(UserWarning, match=r"RwkvForCausalLM has no cache that can go back .*whole rows in every pass"):
        assert as_verifier(tiny_model("rwkv")).way == "no cache"


@pytest.mark.parametrize("kind", ["one sliding window", "capped logits, sliding", "convolutions"])
def test_a_checkpoint_of_any_kind_loads(kind, tmp_path):
    own = verifier_of(kind)
    own.model.save_pretrained(tmp_path)
    verifier = load_verifier(tmp_path)
    assert verifier.way == own.way
    assert verifier_config(tmp_path).vocab_size == verifier.vocab_size == 96
    ids = torch.arange(4, 20)[None]
    assert torch.allclose(verifier.model(ids).logits, own.model(ids).logits.float(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_model_in_training_mode_is_refused():
    for kind in ("capped logits, sliding", "ALiBi", "a state in an argument of its own"):
        model = tiny_model(KINDS[kind][0]).train()
        with pytest.raises(ValueError, match="evaluation mode"):
            as_verifier(model)


def test_what_is_not_causal_is_refused():
    bert = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="attends both ways"):
        as_verifier(BertLMHeadModel(bert).eval())
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder"):
        as_verifier(T5ForConditionalGeneration(shrunk(T5Config(), d_kv=8)).eval())


def test_only_plain_verifiers_are_compiled():
    drafter = tiny_pair(vocab=96)[0]
    for kind in ("capped logits, sliding", "gated delta rule"):
        with pytest.raises(ValueError, match=r"A verifier that is compiled must .* is run with 'own"):
            APDSampler(drafter, verifier_of(kind), mixture_weight=0.5).compile(backend="eager")


@pytest.mark.parametrize("reach", [Reach(window=3), Reach(chunk=3), Reach(window=1)])
@pytest.mark.parametrize("is_level", [True, False])
def test_a_mask_reaches_as_far_back_as_a_layer(reach, is_level):
    starts, ends, paddings = ([4, 4], [9, 9], [0, 0]) if is_level else ([4, 2], [9, 5], [0, 2])
    span = Span.of_rows(starts, ends, paddings, torch.device("cpu"))
    mask = span.mask(9, CAUSAL, reach).expand(2, 1, -1, -1)
    for row in range(2):
        for query in range(starts[row], ends[row]):
            at = query - paddings[row]
            seen = [
                0 <= key - paddings[row] <= at
                and (reach.window is None or key > query - reach.window)
                and (reach.chunk is None or (key - paddings[row]) // reach.chunk == at // reach.chunk)
                for key in range(9)
            ]
            assert mask[row, 0, query - starts[row]].tolist() == seen
    assert mask.any(-1).all()  # fillers, too: their outputs stay finite


@pytest.mark.parametrize("kind", ["convolutions", "state space, token by token", *slow("gated delta rule", "ALiBi")])
def test_a_row_that_goes_on_by_single_tokens_runs_each_of_them_once(kind):
    """And a way back by n tokens runs few more than n again: states are saved at more and more distant columns."""
    model, again = verifier_of(kind).model, 16
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        state = DecodeState.start(torch.arange(60)[None] % 50 + 4, max_new_tokens=140, mask_token_id=0)
        session = verifier_of(kind).open(state)

        def run(frontier: int) -> int:
            """The tokens that are run for the token at this column."""
            widths.clear()
            decided = torch.arange(state.width)[None] < frontier
            at = state.with_decided(torch.where(decided, 7, 0), decided)
            session.logits(at, Window.of_rows(at, [frontier + 1]), torch.full((1, 1), 5))
            return sum(widths)

        assert run(60) == 60
        assert {run(frontier) for frontier in range(61, 190)} == {1}
        for distance in (1, 5, 20, 60):
            frontier = 190 - distance
            assert run(frontier) <= 2 * distance + 2 * again
            assert {run(each) for each in range(frontier + 1, 190)} <= {1}
    finally:
        hook.remove()
