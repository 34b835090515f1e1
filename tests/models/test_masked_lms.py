"""Masked LMs of transformers as drafters: what they compute, how they load, and every refusal."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pairs import left_padded
from safetensors.torch import load_file, save_file
from toy import tiny_pair
from transformers import (
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertForPreTraining,
    ElectraForPreTraining,
    PreTrainedTokenizerFast,
)

from apd import WINO, APDSampler, Drafter, LeftToRight, MaskedLMDrafter, ModelSpec, load_drafter
from apd.decoding.protocols import CanvasSession
from apd.decoding.window import Window
from apd.generation.many import encode
from apd.integrations.scoring import sequential_logprobs
from apd.models.loading import as_drafter, as_verifier, drafter_config, drafter_family, load_tokenizer
from apd.models.masked_lm import TRIED
from benchmarks.masked_lms import (
    MASK,
    PROMPTS,
    STRATEGIES,
    VOCABULARY,
    differences,
    equal_tokens,
    examine,
    generated,
    load,
    state_of,
    tiny,
)

pytestmark = pytest.mark.compat

#: Absolute, float32; logits reach 20.
ROUNDING = 1e-5
SIX = ("bert", "distilbert", "electra", "esm", "modernbert", "roberta")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a small checkpoint of a model type, written once."""

    def path(model_type: str) -> Path:
        directory = tmp_path_factory.getbasetemp() / f"masked_{model_type}"
        if not directory.exists():
            tiny(model_type).save_pretrained(directory)
        return directory

    return path


def altered(source: Path, to: Path, weights=None, **fields: object) -> Path:
    """A copy of a checkpoint with other weights or other fields in its config.json; `None` removes a field."""
    to.mkdir()
    config = json.loads((source / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    if weights is not None:
        save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


# What is computed


@pytest.mark.parametrize("model_type", SIX)
def test_drafted_logits_are_those_of_the_class_for_each_row_alone(model_type, saved):
    drafter, theirs = load(saved(model_type))
    assert drafter.pads and drafter.splits
    found = differences(drafter, theirs)
    print(model_type, found)
    assert max(found.values()) <= ROUNDING


@pytest.mark.parametrize("model_type", ["esm", "modernbert"])
def test_eager_attention_computes_the_same(model_type, saved):
    drafter, theirs = load(saved(model_type), attn_implementation="eager")
    assert drafter.model.config._attn_implementation == "eager"
    assert max(differences(drafter, theirs).values()) <= ROUNDING


def test_a_row_decodes_in_a_batch_as_it_does_alone(saved):
    """ESM-2 scales its embeddings by the share of masks among the row's own columns."""
    equal, total = equal_tokens(load(saved("esm"))[0])
    assert equal == total == 12 * len(PROMPTS) * len(STRATEGIES)


@pytest.mark.parametrize("model_type", ["bert", "esm", "roberta"])
def test_holes_are_filled_from_both_sides_alone_as_in_a_batch(model_type, saved):
    sampler = APDSampler(load_drafter(saved(model_type), mask_token_id=MASK), mixture_weight=1.0)
    rows = [[5, MASK, MASK, 9, 11, MASK, 7], [6, 8, MASK, 10], [5, 6, 7, MASK, MASK, MASK, 12, 13, MASK, 9]]
    settings = {"strategy": "left-to-right:1", "eos_token_id": None, "pad_token_id": 0}
    alone = [sampler.generate(**left_padded([row], pad=0), **settings)[0].tolist() for row in rows]
    for strategy in ("left-to-right:1", "checked:proposer=drafter"):
        batch = sampler.generate(**left_padded(rows, pad=0), **settings | {"strategy": strategy}).tolist()
        assert [ids[-len(row) :] for ids, row in zip(batch, rows, strict=True)] == alone
    # By definition: the leftmost mask, given all else.
    row, model = list(rows[0]), sampler.drafter.model
    while MASK in row:
        with torch.no_grad():
            logits = model(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits[0]
        logits[:, [MASK, *sampler.drafter.never_drawn]] = -torch.inf
        row[row.index(MASK)] = int(logits[row.index(MASK)].argmax())
    assert row == alone[0]


@pytest.mark.parametrize("strategy", ["left-to-right:1", "checked:proposer=drafter"])
@pytest.mark.parametrize(
    ("model_type", "first"), [("bert", 0), ("distilbert", None), ("electra", 0), ("esm", 2), ("roberta", 2)]
)
def test_masks_behind_the_window_are_not_seen_though_given_tokens_stand_behind_them(
    model_type, first, strategy, saved
):
    """By definition they are no part of the model's input. `first`: the first position; `None`: the class takes none."""
    drafter = load_drafter(saved(model_type), mask_token_id=MASK)
    row = [5, MASK, MASK, MASK, 9, 11, MASK, 7, MASK]
    settings = {"strategy": strategy, "window_size": 2, "eos_token_id": None, "pad_token_id": 0}
    rows = [row, [6, 8, MASK, 10]]
    found = APDSampler(drafter, mixture_weight=1.0).generate(**left_padded(rows, pad=0), **settings)[0].tolist()
    model = drafter.model
    while MASK in row:
        masks = [i for i, token in enumerate(row) if token == MASK]
        seen = [i for i in range(len(row)) if row[i] != MASK or i in masks[:2]]
        columns = seen if first is not None else range(len(row))
        inputs = {"input_ids": torch.tensor([[row[i] for i in columns]])}
        if first is not None:
            inputs["position_ids"] = torch.tensor([[first + i for i in seen]])
        inputs["attention_mask"] = torch.tensor([[int(i in seen) for i in columns]])
        with torch.no_grad():
            logits = model(**inputs).logits[0, list(columns).index(masks[0])]
        logits[[MASK, *drafter.never_drawn]] = -torch.inf
        row[masks[0]] = int(logits.argmax())
    assert row == found


def test_a_class_that_reads_what_its_mask_leaves_out_takes_no_window_with_holes(saved):
    with pytest.warns(UserWarning, match="FNetForMaskedLM was not tried"):
        drafter = as_drafter(tiny("fnet"), mask_token_id=MASK)
    call = {"strategy": "left-to-right:1", "eos_token_id": None, "pad_token_id": 0}
    with pytest.raises(ValueError, match="`window_size` must be None with holes and a FNetForMaskedLM"):
        APDSampler(drafter, mixture_weight=1.0).generate(torch.tensor([[5, MASK, MASK, 9]]), window_size=1, **call)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(TRIED))
def test_every_model_type_that_is_called_tried_was(model_type):
    found = examine(model_type)
    assert not found.why
    assert max(found.gaps.values()) <= ROUNDING and found.equal[0] == found.equal[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["albert", "fnet", "longformer", "mobilebert", "mpnet", "nystromformer"])
def test_other_classes_run_in_a_way_that_is_right_for_them(model_type):
    """FNet, MobileBERT and Nyströmformer read padding; Longformer's own forward computes more than its encoder and head."""
    found = examine(model_type)
    assert not found.why
    assert max(found.gaps.values()) <= ROUNDING and found.equal[0] == found.equal[1] > 0


def test_a_class_that_reads_padding_gets_a_pass_per_length():
    with pytest.warns(UserWarning, match="FNetForMaskedLM was not tried"):
        drafter = as_drafter(tiny("fnet"), mask_token_id=MASK)
    assert not drafter.pads
    assert max(differences(drafter, drafter.model).values()) <= ROUNDING
    together = generated(drafter, PROMPTS, STRATEGIES["checked"])
    assert together == [generated(drafter, [row], STRATEGIES["checked"])[0] for row in PROMPTS]


def test_columns_behind_the_window_are_not_shown(saved):
    drafter, _ = load(saved("bert"))
    state = state_of(PROMPTS, 9)
    window = Window.of_rows(state, [t + 4 for t in state.layout.frontier])
    logits = drafter.open(state).logits(state, window)[:, :]
    behind = state.tokens.clone()
    behind[:, window.ends[0] :] = 40
    changed = replace(state, tokens=behind)
    assert torch.equal(drafter.open(changed).logits(changed, window)[:, :], logits)
    last = state.tokens.clone()
    last[:, window.ends[0] - 1] = 40
    changed = replace(state, tokens=last)
    assert not torch.allclose(drafter.open(changed).logits(changed, window)[:, :1], logits[:, :1])


def test_parts_of_a_window_are_computed_alone(saved):
    drafter, _ = load(saved("roberta"))
    state = state_of(PROMPTS, 9)
    session = drafter.open(state)
    assert isinstance(drafter, Drafter) and isinstance(session, CanvasSession)
    found = session.logits(state, Window.of_rows(state, state.layout.end))
    whole = found[:, :]
    assert whole.shape == (len(PROMPTS), 9, VOCABULARY)
    assert torch.allclose(found[:, 3:7], whole[:, 3:7], atol=1e-5)
    rows, positions = torch.arange(len(PROMPTS))[:, None], torch.tensor([[8, 0]] * len(PROMPTS))
    assert torch.allclose(found[rows, positions], whole[rows, positions], atol=1e-5)


def test_the_model_is_left_as_it_was(saved):
    model = AutoModelForMaskedLM.from_pretrained(saved("bert")).eval()
    parts, ids = [name for name, _ in model.named_modules()], torch.tensor([[7, 8, MASK, 9]])
    before = model(ids).logits
    APDSampler(model, mask_token_id=MASK, mixture_weight=1.0).generate(ids[:, :2], max_new_tokens=3)
    assert [name for name, _ in model.named_modules()] == parts and torch.equal(model(ids).logits, before)


# Lengths


def test_a_row_may_have_as_many_tokens_as_the_model_has_positions(saved):
    """80 positions; RoBERTa and its kin begin to count behind the pad token's id."""
    assert {name: load(saved(name))[0].max_length for name in SIX} == {
        **dict.fromkeys(("bert", "distilbert", "electra", "modernbert"), 80),
        **dict.fromkeys(("esm", "roberta"), 78),
    }
    sampler = APDSampler(load(saved("roberta"))[0], strategy="one-step")
    ids = torch.full((1, 70), 9)
    assert sampler.generate(ids, max_new_tokens=8, eos_token_id=None).shape == (1, 78)
    with pytest.raises(ValueError, match="must fit the drafter's 78 positions, got 79 tokens"):
        sampler.generate(ids, max_new_tokens=9)


# Special tokens


def liking(ids: list[int]) -> BertForMaskedLM:
    """A model whose likeliest tokens are these, wherever it is asked, in this order."""
    model = tiny("bert")
    for rank, id in enumerate(ids):
        model.cls.predictions.bias[id] += 1000.0 - 100 * rank
    return model


def test_special_tokens_are_never_drawn_unless_they_stop_a_row(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "[MASK]", *"bcdefghij"]
    tokenizer = write_bert_tokenizer(tmp_path, words)
    model = liking([MASK, 2, 3, 0, 1, 9])
    sampler = APDSampler(model, tokenizer=tokenizer, mixture_weight=1.0)
    assert sampler.drafter.never_drawn == [0, 1, 2, 3]
    call = {"max_new_tokens": 3, "pad_token_id": 0}
    ids = torch.tensor([[2, 7, 8]])
    assert sampler.generate(ids, **call).tolist() == [[2, 7, 8, 9, 9, 9]]
    assert sampler.generate(ids, **call, eos_token_id=3).tolist() == [[2, 7, 8, 3]]
    scored = sequential_logprobs(sampler.drafter, [([7], [9]), ([7], [2])], vocab_size=VOCABULARY, batch_size=2)
    assert {pair: logprob for pair, logprob, *_ in scored} == {0: pytest.approx(0, abs=1e-6), 1: -torch.inf}
    # Without a tokenizer, those that the config names.
    assert as_drafter(tiny("modernbert"), mask_token_id=MASK).never_drawn == [0, 2, 3]
    sampler = APDSampler(model, mask_token_id=MASK, mixture_weight=1.0)
    assert sampler.generate(ids, **call).tolist() == [[2, 7, 8, 2, 2, 2]]


def write_bert_tokenizer(directory: Path, words: list[str]) -> PreTrainedTokenizerFast:
    """The files of an early checkpoint, in which only the tokenizer's class knows the special tokens."""
    (directory / "vocab.txt").write_text("\n".join(words))
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    (directory / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def test_tokenizers_of_early_checkpoints_know_their_mask(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"]
    write_bert_tokenizer(tmp_path, words)
    tiny("bert").save_pretrained(tmp_path)
    drafter = load_drafter(tmp_path)
    assert drafter.mask_token_id == 4 and drafter.never_drawn == [0, 1, 2, 3]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.padding_side == "left" and set(tokenizer("a b")) == {"input_ids", "attention_mask"}


def test_a_text_is_left_open_for_its_continuation(tmp_path):
    tokenizer = write_bert_tokenizer(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"])
    assert tokenizer("a b").input_ids == [2, 5, 6, 3]
    assert encode("a b", tokenizer).tolist() == [[2, 5, 6]]
    assert encode("a b [SEP]", tokenizer).tolist() == [[2, 5, 6, 3]]
    assert encode([2, 5, 6, 3], tokenizer).tolist() == [[2, 5, 6, 3]]


def test_a_mask_token_must_be_known(saved):
    with pytest.raises(ValueError, match="`mask_token_id` must be given"):
        load_drafter(saved("bert"))
    assert load_drafter(saved("esm")).mask_token_id == MASK  # its config says it
    with pytest.raises(ValueError, match=f"0 to {VOCABULARY - 1}, got {VOCABULARY}"):
        load_drafter(saved("bert"), mask_token_id=VOCABULARY)


# Loading


def test_checkpoints_and_instances_are_recognised(saved):
    ids = torch.tensor([[7, 8, 9]])
    call = {"max_new_tokens": 5, "window_size": 4}
    sampler = APDSampler.from_pretrained(str(saved("bert")), mask_token_id=MASK, mixture_weight=1.0)
    model = AutoModelForMaskedLM.from_pretrained(saved("bert")).eval()
    expected = sampler.generate(ids, **call)
    mine = ModelSpec("bert", BertForMaskedLM, logit_shift=0)
    for drafter in (
        as_drafter(model, mask_token_id=MASK),
        as_drafter(model, mine, mask_token_id=MASK),
        load_drafter(saved("bert"), spec=mine, mask_token_id=MASK),
    ):
        assert isinstance(drafter, MaskedLMDrafter) and drafter.logit_shift == 0
        assert torch.equal(APDSampler(drafter, mixture_weight=1.0).generate(ids, **call), expected)
    assert drafter_family(saved("bert")).name == "BertForMaskedLM"
    assert drafter_config(saved("bert"), mask_token_id=MASK).mask_token_id == MASK


def test_a_verifier_of_the_same_ids_mixes(saved):
    verifier = tiny_pair(vocab=VOCABULARY)[1]
    sampler = APDSampler(load(saved("modernbert"))[0], verifier, mixture_weight=0.5)
    inputs = left_padded(PROMPTS, pad=0)
    output = sampler.generate(**inputs, max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True)
    assert output.verifier_forwards.min() > 0 and output.new_tokens.tolist() == [8] * len(PROMPTS)


TIED = {
    "bert": ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"],
    "roberta": ["lm_head.decoder.weight", "lm_head.decoder.bias"],
    "distilbert": ["vocab_projector.weight"],
    "modernbert": ["decoder.weight"],
    "esm": ["lm_head.decoder.weight"],
    "electra": ["generator_lm_head.weight"],
}


@pytest.mark.parametrize("model_type", TIED)
def test_tied_weights_may_be_absent_or_stored_twice_and_others_may_not_be_absent(model_type, saved, tmp_path):
    source = saved(model_type)
    weights, ids = load_file(source / "model.safetensors"), torch.tensor([[7, 8, MASK, MASK]])
    model = AutoModelForMaskedLM.from_pretrained(source).eval()
    expected, whole = model(ids).logits, model.state_dict()
    twice = weights | {name: whole[name].clone() for name in TIED[model_type]}
    once = {name: weight for name, weight in weights.items() if name not in TIED[model_type]}
    for name, stored in {"twice": twice, "once": once}.items():
        drafter = load_drafter(altered(source, tmp_path / name, stored), mask_token_id=MASK)
        assert torch.equal(drafter.model(ids).logits, expected)
    lost = next(name for name in sorted(once) if name.endswith("bias"))
    with pytest.raises(ValueError, match="missing keys"):
        load_drafter(
            altered(source, tmp_path / "lost", {name: once[name] for name in once if name != lost}), mask_token_id=MASK
        )


def test_poolers_and_heads_of_other_tasks_may_be_stored_too(saved, tmp_path):
    """As in the published bert-base-uncased."""
    model = tiny("bert")
    whole = BertForPreTraining(model.config).eval()
    missing, _ = whole.load_state_dict(model.state_dict(), strict=False)
    assert missing
    whole.save_pretrained(tmp_path / "whole")
    path = altered(saved("bert"), tmp_path / "published", load_file(tmp_path / "whole/model.safetensors"))
    assert max(differences(load(path)[0], model).values()) <= ROUNDING


def test_classes_that_were_not_tried_load_with_a_warning(saved):
    with pytest.warns(UserWarning, match=r"AlbertForMaskedLM was not tried .*Run `apd check --drafter ") as found:
        drafter = load_drafter(saved("albert"), mask_token_id=MASK)
    assert len(found) == 1 and str(saved("albert")) in str(found[0].message)
    assert max(differences(drafter, drafter.model).values()) <= ROUNDING
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(saved("bert"))


# What is refused


def test_a_kv_window_and_orders_that_revoke_are_refused_before_weights_are_read(saved, tmp_path):
    empty = str(altered(saved("bert"), tmp_path / "empty"))
    for more, message in (
        ({"kv_window": 4}, "`kv_window` must be None with a masked LM, got 4"),
        ({"strategy": WINO(0.1, 0.5, 4)}, "must not predict decided tokens with a masked LM"),
        ({"verifier": "self"}, "`verifier` must be a causal model"),
        ({"block_size": 4}, "block"),
    ):
        with pytest.raises(ValueError, match=message):
            APDSampler.from_pretrained(empty, mask_token_id=MASK, **more)
    drafter = load(saved("bert"))[0]
    with pytest.raises(ValueError, match="`kv_window` must be None"):
        APDSampler(drafter, mixture_weight=1.0).generate(torch.tensor([[7]]), max_new_tokens=2, kv_window=2)


def test_a_masked_lm_is_no_verifier(saved):
    drafter = load(saved("bert"))[0]
    for verifier in ("self", drafter.model):
        with pytest.raises(ValueError, match="must be a causal model"):
            as_verifier(verifier, drafter)
    modern = load(saved("modernbert"))[0]
    with pytest.raises(ValueError, match="verifier must"):
        as_verifier(modern.model, modern)


def test_a_masked_lm_is_not_compiled(saved):
    with pytest.raises(
        TypeError, match="`drafter` must be a transformers decoder to be compiled, got MaskedLMDrafter"
    ):
        APDSampler(load(saved("bert"))[0], mixture_weight=1.0).compile(backend="eager")


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "message"),
    [
        ("bart", "BartForConditionalGeneration", {"is_encoder_decoder": True}, "has an encoder and a decoder"),
        ("layoutlm", "LayoutLMForMaskedLM", {}, "place of each token on a page"),
        ("modernvbert", "ModernVBertForMaskedLM", {}, "reads images"),
        ("bert", "BertForMaskedLM", {"is_decoder": True}, "set up as a causal model"),
        (
            "bert",
            "BertForTokenClassification",
            {},
            "none of the families .*A masked LM of that model type is a BertForM",
        ),
    ],
)
def test_other_models_are_refused_by_name(model_type, architecture, fields, message, tmp_path):
    config = {"model_type": model_type, "architectures": [architecture]} | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_drafter(tmp_path, mask_token_id=MASK)


def test_a_discriminator_is_refused(tmp_path):
    ElectraForPreTraining(tiny("electra").config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="none of the families"):
        load_drafter(tmp_path, mask_token_id=MASK)
    mine = ModelSpec("generator", type(tiny("electra")), 0)
    with pytest.raises(ValueError, match="missing keys, such as generator_"):
        load_drafter(tmp_path, spec=mine, mask_token_id=MASK)


def test_pickled_weights_are_not_read(saved, tmp_path):
    path = altered(saved("bert"), tmp_path / "pickled")
    torch.save(tiny("bert").state_dict(), path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_drafter(path, mask_token_id=MASK)


def test_a_shift_means_nothing_for_a_masked_lm():
    with pytest.raises(ValueError, match="predicts each mask at its own row"):
        ModelSpec("bert", BertForMaskedLM, logit_shift=1)
    with pytest.raises(ValueError, match="predicts each mask at its own row"):
        ModelSpec("bert", BertForMaskedLM, logit_shift=0, attention="causal")
    with pytest.raises(ValueError, match="`reads_causally` False, got 0, 'full' and True"):
        ModelSpec("bert", BertForMaskedLM, logit_shift=0, reads_causally=True)
    with pytest.raises(ValueError, match="`spec` 'dream' is computed by Qwen2ForCausalLM, but the model is a BertFor"):
        as_drafter(tiny("bert"), "dream", MASK)


def test_a_model_in_training_mode_is_refused(saved):
    with pytest.raises(ValueError, match="evaluation mode"):
        as_drafter(tiny("bert").train(), mask_token_id=MASK)
    drafter = load(saved("bert"))[0]
    drafter.model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        APDSampler(drafter, strategy=LeftToRight(1)).generate(torch.tensor([[7]]), max_new_tokens=2)
