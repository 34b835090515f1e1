"""Loading: the published formats, what is computed with them, and every refusal."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import CASES, TOLERANCE, difference
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import tiny_pair
from transformers import (
    BertConfig,
    BertLMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
)

from apd import APDSampler
from apd.models.checks import check_vocabularies
from apd.models.families import FAMILIES, ModelSpec, decoder_fields, llada_fields
from apd.models.loading import (
    as_drafter,
    as_verifier,
    load_drafter,
    load_tokenizer,
    load_verifier,
)

pytestmark = pytest.mark.compat
DREAM, LLADA, A2D = (FIXTURES / f"parity_{name}" for name in ("dream", "llada", "a2d_qwen3"))
TRACED = FIXTURES / "apd_traces" / "models"
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny_qwen2(**config: object) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY, **config)).eval()


def bidirectional(model):
    model.config.is_causal = False
    return model


def copied(source: Path, to: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other values in its `config.json`; `None` removes one."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("parity.safetensors", "NOTES.md"))
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return to


def sharded(directory: Path) -> Path:
    """The checkpoint with its weights in several files and an index, as large ones are published."""
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    weight_map = {name: f"model-0000{1 + (i % 3)}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: weights[name] for name in names if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    return directory


# What is computed


@pytest.mark.parametrize("implementation", ["grouped_sdpa", "sdpa", "eager"])
@pytest.mark.parametrize(("family", "case"), [(family, case) for family in CASES for case in CASES[family]])
def test_logits_equal_those_of_the_published_code(family, case, implementation):
    largest_difference, largest_logit = difference(family, case, implementation)
    print(f"{family} {case} {implementation}: {largest_difference:.1e} of {largest_logit:.1f}")
    assert largest_difference <= TOLERANCE * largest_logit


@pytest.mark.parametrize("implementation", ["grouped_sdpa", "sdpa", "eager"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("path", [DREAM, LLADA, A2D], ids=lambda path: path.name)
@torch.no_grad()
def test_the_last_token_is_seen_by_the_first(path, is_padded, implementation):
    model = load_drafter(path, mask_token_id=60, attn_implementation=implementation).model
    assert model.config._attn_implementation == implementation
    ids = torch.arange(16).view(2, 8)
    mask = torch.ones_like(ids)
    mask[0, : 2 * is_padded] = 0
    before = model(ids, attention_mask=mask).logits
    ids[:, -1] += 1
    after = model(ids, attention_mask=mask).logits
    assert (before - after)[:, 2].abs().max(dim=-1).values.min() > 1e-3


def test_families_have_their_logit_shifts():
    assert {name: FAMILIES[name].logit_shift for name in ("dream", "llada", "a2d-qwen3")} == {
        "dream": 1,
        "llada": 0,
        "a2d-qwen3": 0,
    }
    for path in (DREAM, TRACED / "dream"):
        assert load_drafter(path).logit_shift == 1
    assert load_drafter(LLADA).logit_shift == 0
    assert load_drafter(A2D, mask_token_id=60).logit_shift == 0


# Loading


@pytest.mark.parametrize("source", [DREAM, LLADA], ids=lambda path: path.name)
def test_sharded_weights_load_as_whole_ones(source, tmp_path):
    whole = load_drafter(source).model.state_dict()
    parts = load_drafter(sharded(copied(source, tmp_path / "sharded"))).model.state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_wrong_key_mapping_is_an_error_and_not_random_weights():
    unmapped = replace(FAMILIES["llada"], key_mapping={})
    with pytest.raises(ValueError, match=r"do not fit LlamaForCausalLM: 21 missing keys"):
        load_drafter(LLADA, spec=unmapped)
    # What once passed unnoticed: two capture groups in a pattern.
    block = {r"^model\.transformer\.blocks\.(\d+)\.(q|k|v)_proj\.": r"model.layers.\1.self_attn.\2_proj."}
    others = {theirs: ours for theirs, ours in FAMILIES["llada"].key_mapping.items() if "self_attn.o" in ours}
    others |= {theirs: ours for theirs, ours in FAMILIES["llada"].key_mapping.items() if "self_attn" not in ours}
    with pytest.raises(ValueError, match=r"do not fit LlamaForCausalLM"):
        load_drafter(LLADA, spec=replace(FAMILIES["llada"], key_mapping=block | others))


@pytest.mark.parametrize("source", [DREAM, LLADA], ids=lambda path: path.name)
def test_weights_that_do_not_fit_are_an_error(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if "up_proj" in name)
    for kind, changed in {
        "1 missing keys": {key: weight for key, weight in weights.items() if key != name},
        "1 unexpected keys": weights | {"model.surprise.weight": torch.zeros(3)},
        "1 mismatched keys": weights | {name: torch.zeros(41, 24)},
    }.items():
        directory = copied(source, tmp_path / kind.replace(" ", "_"))
        save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=kind):
            load_drafter(directory)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    directory = copied(DREAM, tmp_path / "old")
    weights = load_file(DREAM / "model.safetensors")
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert load_drafter(directory).mask_token_id == 60


def test_pickled_weights_are_not_read(tmp_path):
    directory = copied(DREAM, tmp_path / "pickled")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"safetensors"):
        load_drafter(directory)


def test_weights_are_float32_on_a_cpu_by_default(tmp_path):
    directory = copied(DREAM, tmp_path / "half", torch_dtype="bfloat16")
    weights = {name: weight.bfloat16() for name, weight in load_file(DREAM / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert load_drafter(directory).model.dtype == torch.float32
    assert load_drafter(directory, device_map="cpu").model.dtype == torch.float32
    assert load_drafter(directory, dtype="auto").model.dtype == torch.bfloat16
    assert load_verifier(TRACED / "verifier", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load_verifier(TRACED / "verifier").model.dtype == torch.float32


def test_generation_config_keeps_stop_tokens_and_drops_a_useless_temperature(tmp_path):
    model = load_drafter(TRACED / "dream").model
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (151, 151)
    assert model.generation_config.temperature is None
    assert not hasattr(model.generation_config, "alg")  # an option of Dream's own sampler
    # Without a generation config the model's ids count, and without those there are none: Llama's defaults are not ours.
    assert load_drafter(LLADA).model.generation_config.eos_token_id == 61
    silent = load_drafter(copied(LLADA, tmp_path / "silent", eos_token_id=None)).model
    assert silent.config.eos_token_id is None and silent.generation_config.eos_token_id is None
    directory = copied(DREAM, tmp_path / "stops")
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.5}')
    kept = load_drafter(directory).model.generation_config
    assert kept.eos_token_id == [7, 8] and kept.pad_token_id == 61 and kept.temperature == 0.5


def test_mask_token_comes_from_argument_config_tokenizer_in_that_order(tmp_path):
    assert load_drafter(DREAM).mask_token_id == 60
    assert load_drafter(DREAM, mask_token_id=5).mask_token_id == 5
    with pytest.raises(ValueError, match=r"`mask_token_id` must be given"):
        load_drafter(A2D)
    directory = copied(A2D, tmp_path / "a2d")
    write_fast_tokenizer(directory, mask_token="[M]")
    assert load_drafter(directory).mask_token_id == 4
    with pytest.raises(ValueError, match=r"got 64"):
        load_drafter(DREAM, mask_token_id=64)


def test_transformers_names_load_with_a_spec(tmp_path):
    model = bidirectional(tiny_qwen2(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    model.save_pretrained(tmp_path)
    mine = ModelSpec("mine", Qwen2ForCausalLM, logit_shift=0)
    drafter = load_drafter(tmp_path, spec=mine, mask_token_id=31)
    assert drafter.logit_shift == 0 and drafter.model.config.is_causal is False
    assert drafter.model.config.rope_parameters["rope_theta"] == 5e5
    ids = torch.arange(6)[None]
    assert torch.equal(drafter.model(ids).logits, model(ids).logits)


def test_the_hub_cache_is_read_without_a_network(tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    write_fast_tokenizer(copied(DREAM, snapshot), mask_token="[M]")
    refs = tmp_path / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    drafter = load_drafter("org/tiny", **hub)
    assert drafter.mask_token_id == 60 and drafter.model.generation_config.eos_token_id == 61
    assert load_drafter("org/tiny", revision="main", **hub).logit_shift == 1
    assert load_tokenizer("org/tiny", **hub).padding_side == "left"
    for name in ("org/other", "not a model id"):
        with pytest.raises(ValueError, match=r"No config.json found"):
            load_drafter(name, **hub)


def test_a_registered_family_is_recognised(monkeypatch, tmp_path):
    directory = copied(A2D, tmp_path / "mine", model_type="mine", architectures=["MineLM"])
    with pytest.raises(ValueError, match=r"none of the families"):
        load_drafter(directory, mask_token_id=60)
    mine = ModelSpec("mine", Qwen3ForCausalLM, 1, model_types=("mine",), architectures=("MineLM",))
    monkeypatch.setitem(FAMILIES, "mine", mine)
    assert load_drafter(directory, mask_token_id=60).logit_shift == 1


def test_an_unknown_family_is_refused_with_a_remedy(tmp_path):
    unknown = copied(DREAM, tmp_path / "unknown", model_type="unheard_of")
    with pytest.raises(ValueError, match=r"none of the families that work: 'dream', 'llada', .*`spec=`"):
        load_drafter(unknown)
    with pytest.raises(ValueError, match=r"config.json lacks `d_model`"):
        load_drafter(unknown, spec="llada")


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (LLADA, {"alibi": True}, "`alibi` in config.json must be False for this family, got True"),
        (LLADA, {"activation_type": "swiglu"}, "`activation_type` in config.json must be 'silu'"),
        (LLADA, {"mlp_hidden_size": None}, "lacks `mlp_hidden_size`"),
        (DREAM, {"use_sliding_window": True}, "`use_sliding_window` in config.json must be False"),
        (DREAM, {"hidden_size": None}, "lacks `hidden_size`"),
        (DREAM, {"rope_theta": None}, "lacks `rope_theta`"),
        (DREAM, {"architectures": None}, "architectures None"),
    ],
)
def test_invalid_config_fields_are_refused(source, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_drafter(copied(source, tmp_path / "odd", **changes))


def test_config_fields_are_read_from_checkpoints():
    dream = json.loads((DREAM / "config.json").read_text())
    assert decoder_fields(dream)["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    scaled = decoder_fields(dream | {"rope_scaling": {"type": "linear", "factor": 2.0}})["rope_parameters"]
    assert scaled == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    llada = json.loads((LLADA / "config.json").read_text())
    assert llada_fields(llada | {"n_kv_heads": None, "embedding_size": 128})["num_key_value_heads"] == 3
    assert llada_fields(llada | {"embedding_size": 128})["vocab_size"] == 128


def test_arguments_of_loading_are_checked(tmp_path):
    with pytest.raises(TypeError, match=r"`revison`"):
        load_drafter(DREAM, revison="main")
    with pytest.raises(TypeError, match=r"`trust_remote_code`"):
        load_verifier(TRACED / "verifier", trust_remote_code=True)
    with pytest.raises(
        ValueError, match=r"`spec` must be a `ModelSpec` or one of 'dream', 'llada', 'a2d-qwen3', .*got 'x'"
    ):
        load_drafter(DREAM, spec="x")
    with pytest.raises(ValueError, match=r"`logit_shift` must be 0"):
        ModelSpec("x", Qwen2ForCausalLM, logit_shift=2)
    for load in (load_drafter, load_verifier):
        with pytest.raises(ValueError, match=r"No config.json found"):
            load(tmp_path / "nothing")
        with pytest.raises(ValueError, match=r"must be 'grouped_sdpa', 'sdpa' or 'eager', got 'fl.*flash attention"):
            load(DREAM, attn_implementation="flash_attention_2")


# Verifiers


def test_a_causal_model_loads_as_verifier():
    verifier = load_verifier(TRACED / "verifier")
    assert verifier.vocab_size == 160
    ids = torch.arange(6)[None]
    changed = ids.clone()
    changed[0, -1] = 9
    with torch.no_grad():
        difference = verifier.model(ids).logits - verifier.model(changed).logits
    assert difference[0, :-1].abs().max() == 0


@pytest.mark.parametrize("path", [DREAM, LLADA, A2D, FIXTURES / "parity_llada_moe"], ids=lambda path: path.name)
def test_a_diffusion_model_is_no_verifier(path):
    with pytest.raises(ValueError, match=r"verifier must be a causal model"):
        load_verifier(path)


def test_unsuitable_verifiers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no code for model_type 'unheard_of'.*never run"):
        load_verifier(copied(TRACED / "verifier", tmp_path / "unknown", model_type="unheard_of"))
    weights = load_file(TRACED / "verifier" / "model.safetensors")
    directory = copied(TRACED / "verifier", tmp_path / "incomplete")
    save_file(
        {k: v for k, v in weights.items() if "up_proj" not in k}, directory / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"2 missing keys"):
        load_verifier(directory)


def test_unsuitable_verifiers_in_memory_are_refused():
    assert as_verifier(tiny_qwen2()).vocab_size == 32
    with pytest.raises(ValueError, match=r"verifier must be a causal model"):
        as_verifier(bidirectional(tiny_qwen2()))
    with pytest.raises(ValueError, match=r"verifier must be a causal model"):
        as_verifier(BertLMHeadModel(BertConfig(**TINY, num_labels=2, is_decoder=False)))
    with pytest.raises(TypeError, match=r"`verifier` must be a transformers model"):
        as_verifier("Qwen/Qwen2.5-0.5B")
    own = load_verifier(TRACED / "verifier")
    assert as_verifier(own) is own


# Models in memory


def test_a_model_in_memory_needs_a_spec_and_attention_both_ways():
    model = bidirectional(tiny_qwen2())
    with pytest.raises(ValueError, match=r"`spec` must be given.*Qwen2ForCausalLM.*'dream', 'llada', 'a2d-qwen3'"):
        as_drafter(model)
    with pytest.raises(ValueError, match=r"`mask_token_id` must be given"):
        as_drafter(model, "dream")
    drafter = as_drafter(model, "dream", mask_token_id=31)
    assert (drafter.model, drafter.mask_token_id, drafter.logit_shift) == (model, 31, 1)
    model.config.mask_token_id = 30
    assert as_drafter(model, ModelSpec("mine", Qwen2ForCausalLM, logit_shift=0)).mask_token_id == 30
    with pytest.raises(ValueError, match=r"computed by LlamaForCausalLM, but the model is a Qwen2ForCausalLM"):
        as_drafter(model, "llada")
    with pytest.raises(ValueError, match=r"`model.config.is_causal = False`"):
        as_drafter(tiny_qwen2(), "dream", 31)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash attention"):
        as_drafter(model, "dream")
    with pytest.raises(ValueError, match=r"DynamicSlidingWindowLayer"):
        as_drafter(
            bidirectional(tiny_qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1)), "dream", 31
        )


def test_a_drafter_is_taken_as_it_is():
    drafter = load_drafter(DREAM)
    assert as_drafter(drafter) is drafter
    with pytest.raises(ValueError, match=r"knows its own"):
        as_drafter(drafter, spec="dream")
    with pytest.raises(TypeError, match=r"`drafter` must be a transformers model"):
        as_drafter(str(DREAM))


# Tokenizers


def byte_level(*words: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE that knows these words (of two letters) besides the bytes."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in words:
        vocabulary[word] = len(vocabulary)
    return vocabulary, [(word[0], word[1]) for word in words]


def write_dream_tokenizer(directory: Path) -> Path:
    """As Dream has it: Qwen2's files, a tokenizer class and code of its own, no tokenizer.json."""
    vocabulary, merges = byte_level("hi", "ho")
    added = ["<|endoftext|>", "<|beginoftext|>", "<|mask|>"]
    decoder = {
        str(len(vocabulary) + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(added)
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "tokenization_dream.py").write_text("raise RuntimeError('remote code was run')")
    return directory


def write_fast_tokenizer(directory: Path, tokenizer_class: str = "PreTrainedTokenizerFast", **tokens: str) -> Path:
    """As in LLaDA and the included pair: tokenizer.json and its settings."""
    tokens = {"pad_token": "[P]", "eos_token": "[E]"} | tokens
    words = ["[U]", "[P]", "[E]", "hi", *(token for name, token in tokens.items() if name == "mask_token"), "ho"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[U]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(tokens.values()))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": tokenizer_class, "model_max_length": 512, "unk_token": "[U]", **tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_dream_tokenizer_is_qwen2s(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    directory = write_dream_tokenizer(copied(DREAM, tmp_path / "dream"))
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer("hiho<|mask|>").input_ids) == ["hi", "ho", "<|mask|>"]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (258, 259, 260)
    assert tokenizer.decode([256, 257, 260]) == "hiho<|mask|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    batch = tokenizer(["hi", "hi ho"], padding=True, return_tensors="pt")
    assert tokenizer.padding_side == "left" and batch.attention_mask[0].tolist()[-1] == 1
    assert batch.attention_mask[0].tolist()[0] == 0


@pytest.mark.parametrize("source", [LLADA, DREAM], ids=["llada", "included"])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_a_tokenizer_file_is_loaded_unchanged(source, tokenizer_class, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    directory = write_fast_tokenizer(copied(source, tmp_path / "model"), tokenizer_class, mask_token="[M]")
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    batch = tokenizer(["hi", "hi ho [M]"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[1, 1, 3], [3, 5, 4]]
    assert set(batch) == {"input_ids", "attention_mask"}  # no token_type_ids: no model here takes them
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (4, 2)


def test_no_tokenizer_files_no_tokenizer(tmp_path):
    assert load_tokenizer(DREAM) is None
    with pytest.raises(TypeError, match=r"`padding`"):
        load_tokenizer(DREAM, padding="left")


# Vocabularies


def words(*words: str, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_padding_rows_are_not_shared():
    same = words("[U]", "a", "b")
    assert check_vocabularies(3, 3, same, same) == 3
    assert check_vocabularies(2000, 100, same, words("[U]", "a", "b")) == 100
    assert check_vocabularies(152064, 151936, None, None) == 151936
    assert check_vocabularies(151936, 152064, same, None) == 151936


def test_without_tokenizers_sizes_may_differ_by_a_padding():
    assert check_vocabularies(1256, 1000) == 1000
    with pytest.raises(ValueError, match=r"at most 256 rows, got 1257 \(drafter\) and 1000 \(verifier\)"):
        check_vocabularies(1257, 1000)


def test_the_first_id_that_is_spelt_differently_is_named():
    with pytest.raises(ValueError, match=r"id 1 is 'a' to the drafter and 'x' to the verifier"):
        check_vocabularies(8, 8, words("[U]", "a", "b"), words("[U]", "x", "y"))


def test_an_id_that_only_one_model_has_is_named():
    with pytest.raises(ValueError, match=r"drafter's tokenizer uses id 3 \('c'\) and the models share only 3 ids"):
        check_vocabularies(8, 3, words("[U]", "a", "b", "c"), words("[U]", "a", "b"))
    # An id that the other tokenizer lacks is a padding row there, like Dream's <|beginoftext|> in Qwen2.5.
    assert check_vocabularies(8, 4, words("[U]", "a", "b", "c"), words("[U]", "a", "b")) == 4


def test_the_mask_token_is_the_drafters_own():
    drafter, verifier = words("[U]", "a", "b", "[M]", mask_token="[M]"), words("[U]", "a", "b")
    assert check_vocabularies(4, 3, drafter, verifier) == 3
    assert check_vocabularies(4, 4, drafter, words("[U]", "a", "b", "c")) == 4
    unnamed = words("[U]", "a", "b", "[M]")
    assert check_vocabularies(4, 3, unnamed, verifier, mask_token_id=3) == 3
    with pytest.raises(ValueError, match=r"id 3"):
        check_vocabularies(4, 3, unnamed, verifier)


def test_one_model_is_drafter_and_verifier_at_once():
    """It verifies as its copy with causal attention does, in passes that are counted, with and without a cache."""
    model = tiny_pair()[0].model
    causal = copy.deepcopy(model)
    causal.config.is_causal = True
    for module in causal.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    ids = torch.tensor([[0, 3, 4, 5], [6, 7, 8, 9]])
    call = {
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "max_new_tokens": 10,
        "return_dict_in_generate": True,
        "mixture_weight": 0.3,
    }
    for implementation in ("sdpa", "eager"):
        for each in (model, causal):
            each.set_attn_implementation(implementation)
        itself, twin = (APDSampler(model, verifier, spec="dream", mask_token_id=31) for verifier in (model, causal))
        for knobs in (
            {},
            {"window_size": 3, "kv_window": 2},
            {"do_sample": True, "seed": 1, "acceptance": "rejection"},
        ):
            found, wanted = itself.generate(ids, **call, **knobs), twin.generate(ids, **call, **knobs)
            assert found.sequences.tolist() == wanted.sequences.tolist()
            assert found.committed_per_step == wanted.committed_per_step
            assert found.drafter_forwards.tolist() == found.verifier_forwards.tolist()
            assert found.drafter_forwards.tolist() == wanted.drafter_forwards.tolist()
    assert [row.verifier_probs for row in found.trace] == [row.verifier_probs for row in wanted.trace]
    assert model.config.is_causal is False


def test_another_model_that_attends_both_ways_is_no_verifier():
    model = tiny_pair()[0].model
    with pytest.raises(
        ValueError, match=r"attends both ways. Give a causal model .*, the drafter's own model, or none"
    ):
        APDSampler(model, copy.deepcopy(model), spec="dream", mask_token_id=31)
