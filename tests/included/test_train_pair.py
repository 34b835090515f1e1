"""`examples/train_pair.py`: what it trains on, that it goes on where it was interrupted, and where it writes."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import Tensor

from apd.included import DRAFTER_DIR

EXAMPLES = ROOT / "examples"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the package `training`, importable."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return EXAMPLES


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Sums, as prompts and answers."""
    path = tmp_path / "sums.jsonl"
    records = [{"prompt": f"{a} + {b} =", "answer": f" {a + b}"} for a in range(12) for b in range(12)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_pair.py", *arguments])
    runpy.run_path(str(EXAMPLES / "train_pair.py"), run_name="__main__")


def test_a_pair_of_ones_own_is_trained_measured_and_loaded(
    lines: Path, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in DRAFTER_DIR.parent.rglob("*.safetensors")}
    run(["--data", str(lines), "--quick"], monkeypatch)
    printed = capsys.readouterr().out
    assert "zeros are expected" in printed
    assert re.match(r"\d+ lines to train on, \d+ held out; \d+ tokens; 8 new tokens hold every answer\n", printed)
    assert "| held out (4 lines) |" in printed and "| trained on (4 lines) |" in printed
    assert "--drafter pair/drafter --verifier pair/verifier --prompt" in printed
    stored = [tmp_path / "pair" / name / "generation_config.json" for name in ("drafter", "verifier")]
    assert json.loads(stored[0].read_text())["max_new_tokens"] == 8 and not stored[1].exists()
    assert before == {path: path.stat().st_mtime_ns for path in DRAFTER_DIR.parent.rglob("*.safetensors")}


@pytest.mark.parametrize("is_timed", [False, True])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    is_timed: bool,
    lines: Path,
    training: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from training import networks, own

    tokenizer = own.build_tokenizer(own.read(lines), 300)
    source = own.row_source(own.read(lines), tokenizer, 0)
    recipe = networks.Recipe(1, 24, 2, 32, rows=4, causal_steps=3, masked_steps=5)
    seconds = iter(range(10**6))
    monkeypatch.setattr(networks.time, "perf_counter", lambda: next(seconds))

    def trained(name: str, *, stop: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = networks.build_network(recipe, tokenizer, is_causal=False)
        saved = networks.save_checkpoint

        def save(path: Path, network: Any, optimizers: Any, step: int, seconds: float) -> None:
            saved(path, network, optimizers, step, seconds)
            if step == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(networks, "save_checkpoint", save)
            patched.setattr(networks, "SAVE_EVERY", 0)
            patched.setattr(networks, "SAY_EVERY", 0)
            networks.train(
                network,
                recipe,
                source,
                tmp_path / f"{name}.safetensors",
                is_content=own.content(tokenizer),
                mask=tokenizer.mask_token_id,
                title=name,
                minutes=7 / 60 if is_timed else None,
                is_compiled=False,
            )
        return network.state_dict()

    whole = trained("whole", stop=None)
    with pytest.raises(KeyboardInterrupt):
        trained("parts", stop=5)
    said = capsys.readouterr().out
    assert "parts: begins\n" in said and re.search(r"^parts: \d+%, step 5, loss \d", said, re.MULTILINE)
    again = trained("parts", stop=None)
    assert re.match(r"parts: goes on from step 5, \d+% of the training\n", capsys.readouterr().out)
    if is_timed:  # the first step of a process is spent compiling, and not counted
        assert networks.load_checkpoint(tmp_path / "parts.safetensors", *fresh(networks, recipe, tokenizer))[0] == 9
    else:
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def fresh(networks: Any, recipe: Any, tokenizer: Any) -> tuple[Any, Any]:
    network = networks.build_network(recipe, tokenizer, is_causal=False)
    return network, networks.build_optimizers(network, 1.0)


def test_ones_own_vocabulary_spells_any_text(lines: Path, training: Path) -> None:
    from training import own

    tokenizer = own.build_tokenizer(own.read(lines), 300)
    for text in ("11 + 7 = 18", " naïve «β» 東京", "a\n\tb  c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4


def test_held_out_lines_are_never_trained_on(lines: Path, training: Path) -> None:
    from training import own

    read = own.read(lines)
    tokenizer = own.build_tokenizer(read, 300)
    source = own.row_source(read, tokenizer, 0)
    held_out = {line.prompt for line in read if line.is_held_out}
    drawn = source.draw(0, 2000, 0)
    prompts = {tokenizer.decode(ids[:start]) for ids, [start] in zip(drawn.ids, drawn.starts.tolist(), strict=True)}
    assert held_out and not held_out & prompts
    # 2000 of 144 or fewer lines: one is missing with a probability of at most 144 · (1 − 1/144)^2000 < 2e-4, once and for all
    assert len(prompts) == len({line.prompt for line in read}) - len(held_out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\nno json', "got line 2: "),
        ('{"prompt": "a"}', r"got line 1: KeyError\('answer'\)"),
        ('{"prompt": "a", "answer": " "}', "not empty, got line 1"),
        ('{"prompt": "a", "answer": 3}', "not empty, got line 1"),
        ('{"prompt": "a", "answer": "b"}', "none among 1: one prompt in ten is held out"),
    ],
)
def test_lines_that_are_none_are_refused_by_number(text: str, message: str, training: Path, tmp_path: Path) -> None:
    from training import own

    path = tmp_path / "lines.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        own.read(path)


def test_a_text_may_hold_a_line_separator_of_unicode(training: Path, tmp_path: Path) -> None:
    """JSON leaves U+2028 and U+0085 as they are; only a line feed ends a line."""
    from training import own

    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "a\u2028b", "answer": "c\x85d"}\n', "utf-8")
    assert own.lines_of(path) == [own.Line("a\u2028b", "c\x85d")]


def test_the_lines_of_the_documentation_are_lines(
    training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import own

    page = (ROOT / "docs" / "own-pair.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    lines = own.read(tmp_path / "dates.jsonl")
    assert len(lines) == 20000 and 1800 < sum(line.is_held_out for line in lines) < 2200  # 2000 ± 42 by a uniform hash


def test_a_line_that_is_too_long_is_refused_by_number(training: Path) -> None:
    from training import own

    lines = [own.Line("a", "b"), own.Line("x" * 300, "b")]
    with pytest.raises(ValueError, match=r"at most 248 tokens beside answers of 8, got 300 in line 2"):
        own.row_source(lines, own.build_tokenizer(lines[:1], 259), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "5"], "--minutes and --vocabulary go with --data"),
        (["--data", "x", "--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--data", "x", "--vocabulary", "100"], "--vocabulary must be at least 259, got 100"),
        (["--into-package", "--quick"], "--into-package goes without"),
        (["--data", "x", "--table"], "the pair in --out, got none"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_trained(
    arguments: list[str],
    message: str,
    training: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(arguments, monkeypatch)
    assert message in f"{capsys.readouterr().err} {stop.value}"


@pytest.mark.parametrize("size", [1, 8, 32])
def test_a_block_drafter_is_trained_on_what_decoding_shows_it(size: int, training: Path) -> None:
    """One pass over a batch has the losses of separate passes, each over finished blocks and one noisy."""
    from training import included
    from training.batches import block_batch
    from training.networks import build_network

    mask = 2
    torch.manual_seed(0)
    recipe = replace(included.DRAFTER, layers=2, width=24, heads=2, hidden=32)
    tokenizer = included.build_tokenizer()
    network = build_network(recipe, tokenizer, is_causal=False).eval()
    rows = included.row_source(tokenizer, 0).draw(0, 8, 0, block_size=size)
    assert all((rows.ends % size == 0) & (rows.ends - rows.tails < size))
    noised = {}

    def noise(blocks: Any) -> tuple[Tensor, Tensor]:
        masked = (torch.arange(size) >= blocks.starts) & (torch.arange(size) < blocks.ends)
        masked &= torch.rand(masked.shape) < 0.6
        noised.update(masked=masked, weights=torch.rand(masked.shape) * masked)
        return masked, noised["weights"]

    batch = block_batch(rows, mask, noise, size, included.SHAPE)
    masked, weights = (noised[name].view(len(rows.ids), -1) for name in ("masked", "weights"))
    with torch.no_grad():
        bias = torch.where(batch.visible, 0.0, -1e9)
        arguments = {"attention_mask": bias, "position_ids": batch.positions}
        logits = network(input_ids=batch.inputs, **arguments).logits.log_softmax(-1)
        found = -(logits.gather(2, batch.targets[..., None])[..., 0] * batch.weights).sum(1)
        for r, ids in enumerate(rows.ids):
            loss, first = 0.0, int(rows.starts[r]) // size * size
            for start in range(first, int(rows.ends[r]), size):
                here = slice(start - first, start - first + size)
                shown = ids[: start + size].clone()
                shown[start:][masked[r, here]] = mask
                block = torch.arange(len(shown)) // size
                bias = torch.where(block[:, None] >= block, 0.0, -1e9)[None, None]
                scores = network(input_ids=shown[None], attention_mask=bias).logits[0].log_softmax(-1)
                predicted = scores.roll(1, 0)[start:].gather(1, ids[start : start + size, None])[:, 0]
                loss -= float((predicted * weights[r, here]).sum())
            torch.testing.assert_close(float(found[r]), loss, rtol=1e-4, atol=1e-4)
