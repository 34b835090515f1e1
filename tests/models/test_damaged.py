"""Checkpoints with files that are damaged, missing, pickled, quantised, or no model at all: one line that names the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from test_models import copied, sharded, write_dream_tokenizer, write_fast_tokenizer

from apd import APDSampler, load_drafter, load_verifier
from apd.cli import main
from apd.models import load_tokenizer

DREAM = FIXTURES / "parity_dream"
PAIR = FIXTURES / "apd_traces" / "models"
LOAD = {"drafter": load_drafter, "verifier": load_verifier}
SOURCE = {"drafter": PAIR / "dream", "verifier": PAIR / "verifier"}
INDEX = "model.safetensors.index.json"

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7661584\n"
NESTED = b"[" * 100_000
DAMAGES = {
    "empty": (b"", "is empty"),
    "a git-lfs pointer": (POINTER, "git lfs pull"),
    "a page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "page of HTML"),
    "half": (b'{"vocab_size": 16', "cut off"),
}
DAMAGED_JSON = DAMAGES | {
    "a byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "nested too deeply": (NESTED, "recursion"),
    "a list": (b"[]", "must hold a JSON object"),
    "a text": (b'"model"', "must hold a JSON object"),
    "a number": (b"5", "must hold a JSON object"),
    "null": (b"null", "must hold a JSON object"),
}


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Files that torch unpickles."""
    files: list[str] = []
    monkeypatch.setattr(torch, "load", lambda file, *args, **kwargs: files.append(str(file)))
    return files


def pickled(source: Path, to: Path, name: str = "weights.bin") -> Path:
    """A copy of a checkpoint with its weights in a pickle."""
    directory = copied(source, to)
    torch.save(load_file(directory / "model.safetensors"), directory / name)
    (directory / "model.safetensors").unlink()
    return directory


def write_index(directory: Path, shard: str, name: str = INDEX) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": shard}}))


# Damaged files


@pytest.mark.parametrize("damage", DAMAGED_JSON)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "adapter_config.json"])
@pytest.mark.parametrize("role", LOAD)
def test_a_damaged_config_is_named_with_its_cause(role, file, damage, tmp_path):
    content, cause = DAMAGED_JSON[damage]
    directory = copied(SOURCE[role], tmp_path / "model")
    (directory / file).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        LOAD[role](directory)
    assert str(directory / file) in str(raised.value) and cause in str(raised.value)


@pytest.mark.parametrize("damage", [*DAMAGES, "cut"])
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("role", LOAD)
def test_damaged_weights_are_named_with_their_cause(role, is_sharded, damage, tmp_path):
    directory = copied(SOURCE[role], tmp_path / "model")
    if is_sharded:
        sharded(directory)
    file = sorted(directory.glob("*.safetensors"))[-1]
    content, cause = DAMAGES.get(damage, (file.read_bytes()[:-100], "cut off"))
    file.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        LOAD[role](directory)
    assert str(file) in str(raised.value) and cause in str(raised.value)


@pytest.mark.parametrize("damage", [*DAMAGED_JSON, "no weight_map", "no metadata", "weight_map a list"])
def test_a_damaged_index_is_named_with_its_cause(damage, tmp_path):
    directory = sharded(copied(DREAM, tmp_path / "model"))
    fields = {
        "no weight_map": (b'{"metadata": {}}', "`weight_map` is missing"),
        "no metadata": (b'{"weight_map": {}}', "`metadata` is missing"),
        "weight_map a list": (b'{"metadata": {}, "weight_map": []}', "`weight_map` in"),
    }
    content, cause = (DAMAGED_JSON | fields)[damage]
    (directory / INDEX).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        load_drafter(directory)
    assert str(directory / INDEX) in str(raised.value) and cause in str(raised.value)


def test_a_missing_shard_is_named_before_any_weight_is_read(tmp_path):
    directory = sharded(copied(DREAM, tmp_path / "model"))
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 3 .*model-00002-of-00003.safetensors"):
        load_drafter(directory)


@pytest.mark.parametrize("damage", DAMAGED_JSON)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_file_is_named_with_its_cause(file, damage, tmp_path):
    content, cause = DAMAGED_JSON[damage]
    directory = write_fast_tokenizer(copied(DREAM, tmp_path / "model"))
    (directory / file).write_bytes(content)
    if (file, damage) == ("tokenizer_config.json", "a byte order mark"):
        cause = "byte order mark"
    with pytest.raises(ValueError) as raised:
        load_tokenizer(directory)
    assert str(directory / file) in str(raised.value) and cause in str(raised.value)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "chat_template.jinja"])
def test_pointers_in_a_tokenizer_of_several_files_are_named(file, tmp_path):
    directory = write_dream_tokenizer(copied(DREAM, tmp_path / "model"))
    (directory / file).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{file} is .*git lfs pull"):
        load_tokenizer(directory)


def test_a_tokenizer_that_is_none_is_named_by_its_directory(tmp_path):
    directory = write_fast_tokenizer(copied(DREAM, tmp_path / "model"))
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"The tokenizer of '.*model' cannot be read from tokenizer.json, tokenizer_config"
    ):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", POINTER),
        ("tokenizer.json", POINTER),
        ("config.json", b""),
        ("generation_config.json", NESTED),
    ],
)
@pytest.mark.parametrize("role", LOAD)
def test_the_command_line_says_so_in_one_line(role, file, content, tmp_path, capsys):
    pair = {name: tmp_path / name for name in LOAD}
    for name, directory in pair.items():
        write_fast_tokenizer(copied(SOURCE[name], directory))
    (pair[role] / file).write_bytes(content)
    arguments = ["generate", "--prompt", "hi", "--drafter", str(pair["drafter"]), "--verifier", str(pair["verifier"])]
    assert main(arguments) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("apd: error: ") and str(pair[role] / file) in last


def test_small_files_are_looked_at_before_weights(tmp_path):
    """Each checkpoint has broken weights too: what is complained of is what costs nothing to see."""
    drafter, verifier = (copied(SOURCE[role], tmp_path / role) for role in LOAD)
    for directory in (drafter, verifier):
        write_fast_tokenizer(directory)
        (directory / "model.safetensors").write_bytes(b"")

    def complaint() -> str:
        with pytest.raises(ValueError) as raised:
            APDSampler.from_pretrained(str(drafter), str(verifier))
        return str(raised.value)

    assert "model.safetensors is not safetensors" in complaint()
    write_fast_tokenizer(verifier, mask_token="[M]")
    assert "must share a vocabulary" in complaint()
    (verifier / "tokenizer.json").write_text("")
    assert "verifier/tokenizer.json is not JSON" in complaint()
    (drafter / "tokenizer.json").write_text("")
    assert "drafter/tokenizer.json is not JSON" in complaint()
    shutil.rmtree(drafter)
    copied(SOURCE["drafter"], drafter, mask_token_id=999)
    assert "`mask_token_id` must be an id of the drafter, 0 to 159, got 999" in complaint()


# Pickles


@pytest.mark.parametrize("role", LOAD)
def test_an_index_that_names_a_pickle_is_refused_unread(role, tmp_path, opened):
    directory = pickled(SOURCE[role], tmp_path / "model")
    write_index(directory, "weights.bin")
    with pytest.raises(ValueError, match=r"index.json must name safetensors files only, got 'weights.bin'.*Convert"):
        LOAD[role](directory)
    assert not opened


@pytest.mark.parametrize("named", ["weights.safetensors.index.json", "adapter_model.bin"])
@pytest.mark.parametrize("role", LOAD)
def test_a_config_that_names_the_way_to_a_pickle_is_refused_unread(role, named, tmp_path, opened):
    directory = pickled(SOURCE[role], tmp_path / "model", "adapter_model.bin")
    config = json.loads((directory / "config.json").read_text()) | {"transformers_weights": named}
    (directory / "config.json").write_text(json.dumps(config))
    if named != "adapter_model.bin":
        write_index(directory, "adapter_model.bin", named)
    with pytest.raises(ValueError, match=r"pickled weights are never read"):
        LOAD[role](directory)
    assert not opened


@pytest.mark.parametrize("role", LOAD)
def test_weights_of_another_name_are_read_where_the_config_names_them(role, tmp_path):
    directory = copied(SOURCE[role], tmp_path / "model", transformers_weights="other.safetensors")
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    assert LOAD[role](directory).vocab_size == 160


@pytest.mark.parametrize("role", LOAD)
def test_pickles_alone_are_refused_with_how_to_convert_them(role, tmp_path, opened):
    directory = pickled(SOURCE[role], tmp_path / "model", "pytorch_model.bin")
    with pytest.raises(OSError, match=r"in pytorch_model.bin and not in safetensors.*Convert.*save_file"):
        LOAD[role](directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"No weights found"):
        LOAD[role](directory)
    assert not opened


@pytest.mark.parametrize("role", LOAD)
def test_the_same_on_the_hub(role, tmp_path, opened):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    directory = pickled(SOURCE[role], snapshot, "pytorch_model.bin")
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    hub: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(OSError, match=r"'org/tiny' has its weights in pytorch_model.bin"):
        LOAD[role]("org/tiny", **hub)
    write_index(directory, "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"got 'pytorch_model.bin': pickled weights are never read"):
        LOAD[role]("org/tiny", **hub)
    (directory / INDEX).unlink()
    (directory / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"model.safetensors is not safetensors .*git lfs pull"):
        LOAD[role]("org/tiny", **hub)
    assert not opened


# Checkpoints that are no whole model, or stored in another way


@pytest.mark.parametrize("role", LOAD)
def test_an_adapter_is_refused_with_how_to_merge_it(role, tmp_path):
    """With a model beside it too: transformers would load whatever base model the adapter names."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
    (tmp_path / "alone").mkdir()
    for directory in (tmp_path / "alone", copied(SOURCE[role], tmp_path / "model")):
        (directory / "adapter_config.json").write_text(json.dumps(adapter))
        with pytest.raises(ValueError, match=r"holds an adapter .*LORA.*'org/base'.*merge_and_unload"):
            LOAD[role](directory)


def test_a_drafter_that_is_stored_quantised_is_loaded_by_its_own_settings(tmp_path):
    """8-bit floats, which transformers unpacks on a CPU: their scales find a place, and the weights are right."""
    weights = load_file(DREAM / "model.safetensors")
    stored = dict(weights)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale_inv")] = scale.view(1, 1)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    directory = copied(DREAM, tmp_path / "fp8", quantization_config=settings)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    loaded = load_drafter(directory).model.state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(loaded[name].float(), weight.float(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("role", LOAD)
def test_quantised_weights_that_do_not_fit_are_refused_as_such(role, tmp_path):
    """transformers only logs a method that it does not know."""
    directory = copied(SOURCE[role], tmp_path / "model", quantization_config={"quant_method": "none of these"})
    weights = load_file(directory / "model.safetensors")
    packed = {name.replace("proj.weight", "proj.qweight"): weight for name, weight in weights.items()}
    save_file(packed, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit .* loaded as quantised: .*none of these"):
        LOAD[role](directory)
    directory = copied(SOURCE[role], tmp_path / "text", quantization_config="gptq")
    with pytest.raises(ValueError, match=r"`quantization_config` in .*config.json must be an object"):
        LOAD[role](directory)


# Fields of another type


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("dream", {"mask_token_id": "60"}, r"`mask_token_id` in .*config.json must be a token id, got '60'"),
        ("dream", {"mask_token_id": [60]}, r"`mask_token_id` in .*config.json must be a token id, got \[60\]"),
        ("dream", {"mask_token_id": -1}, r"`mask_token_id` must be an id of the drafter, 0 to 63, got -1"),
        ("dream", {"hidden_size": "24"}, r"`hidden_size` in config.json must be a whole number, got '24'"),
        ("dream", {"hidden_size": True}, r"`hidden_size` in config.json must be a whole number, got True"),
        ("dream", {"num_attention_heads": 0}, r"`num_attention_heads` in config.json must be above 0, got 0"),
        ("dream", {"rope_theta": float("nan")}, r"`rope_theta` in config.json must be above 0, got nan"),
        ("dream", {"rope_scaling": "linear"}, r"`rope_scaling` in .*config.json must be an object"),
        ("dream", {"tie_word_embeddings": "no"}, r"config.json is no config of a model: .*tie_word_embeddings"),
        (
            "dream",
            {"eos_token_id": [1, None]},
            r"`eos_token_id` in .*config.json must be a token id or a list of them",
        ),
        ("dream", {"architectures": 5}, r"`architectures` in .*config.json must be a list of names, got 5"),
        ("dream", {"model_type": ["Dream"]}, r"`model_type` in .*config.json must be text, got \['Dream'\]"),
        ("dream", {"pad_token_id": "0"}, r"pad_token_id"),
        ("llada", {"d_model": "24"}, r"`d_model` in config.json must be a whole number, got '24'"),
    ],
)
def test_a_field_of_config_json_that_is_of_another_type_is_named(source, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_drafter(copied(FIXTURES / f"parity_{source}", tmp_path / "model", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "24"}, r"config.json is no config of a model: .*hidden_size"),
        ({"quantization_config": []}, r"`quantization_config` in .*config.json must be an object"),
        ({"model_type": 5}, r"`model_type` in .*config.json must be text, got 5"),
        ({"model_type": None}, r"model_type None"),
    ],
)
def test_the_same_of_a_verifier(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_verifier(copied(PAIR / "verifier", tmp_path / "model", **changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "0.7"), ("eos_token_id", [1, None]), ("top_k", 5.5), ("do_sample", "yes"), ("stop_strings", [5])],
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_field_of_a_stored_generation_config_that_is_of_another_type_is_named(file, name, value, tmp_path):
    """Without a generation_config.json the fields of config.json count, as in transformers."""
    directory = copied(DREAM, tmp_path / "model")
    (directory / "generation_config.json").unlink()
    fields = json.loads((directory / file).read_text()) if (directory / file).exists() else {}
    (directory / file).write_text(json.dumps(fields | {name: value}))
    with pytest.raises(ValueError, match=rf"`{name}` in .*{file}.* must be "):
        load_drafter(directory)


@pytest.mark.parametrize(
    ("name", "value"), [("model_max_length", "512"), ("padding_side", 1), ("tokenizer_class", [])]
)
def test_a_field_of_a_tokenizer_config_that_is_of_another_type_is_named(name, value, tmp_path):
    directory = write_fast_tokenizer(copied(DREAM, tmp_path / "model"))
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {name: value}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"`{name}` in .*tokenizer_config.json must be "):
        load_tokenizer(directory)
