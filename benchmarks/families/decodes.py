"""Greedy decodes that the published codes made, made again by this library: tokens and passes.

Each family's own rule is a strategy here. Its passes are fewer where a published code makes a pass of its own to store
the keys of a finished block: here they are stored by the pass that drafts the next one.

Left out, since nothing here computes it: the approximate cache within a block of Fast-dLLM v2; schedules of LLaDA2 whose
number of tokens per pass changes within a block; and what `NOTES.md` of the folders says is not to be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor

from apd.decoding.strategy import Strategy
from apd.models.drafter import MaskedDiffusionDrafter
from apd.models.loading import load_drafter
from apd.sampler import APDSampler
from apd.strategies import (
    Autoregressive,
    Blocks,
    Checked,
    Confidence,
    ConfidentPrefix,
    EntropyThreshold,
    LeftToRight,
    Seeded,
    Threshold,
    Unmasking,
)
from benchmarks.families.logits import FIXTURES, MASKS

Record = Mapping[str, Any]


class Tempered(LogitsProcessor):
    """Divides the logits: published confidences are those of the tempered distribution, with the token still the likeliest."""

    history_free = True

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores / self.temperature


@dataclass(frozen=True)
class Decode:
    """A recorded decode, and how it is made here.

    Attributes:
        rule: the published rule, in words.
        prompts: ids; several for a batch.
        recorded: new tokens of each prompt; what is decoded here is compared as far as both go.
        passes: forward passes of the published code.
        max_new_tokens: tokens to decode: a whole block or window where the published code decodes it to its end.
        strategy: the rule; `None` for APD with `arguments`.
        model: attributes of the drafter that this decode sets: block size and the like.
        stops: the stop tokens.
        arguments: further arguments of `generate`.
    """

    rule: str
    prompts: list[list[int]]
    recorded: list[list[int]]
    passes: int
    max_new_tokens: int
    strategy: Strategy | None
    model: dict[str, Any] = field(default_factory=dict)
    stops: list[int] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """What this library decodes.

    Attributes:
        tokens: new tokens of each prompt.
        is_equal: True if they are the recorded ones.
        passes: forward passes of both models until the recorded tokens were decided.
    """

    tokens: list[list[int]]
    is_equal: bool
    passes: int


def make(decode: Decode, loaded: MaskedDiffusionDrafter) -> Made:
    """Decode with the loaded model."""
    shift = {"logit_shift": loaded.logit_shift, "reads_causally": loaded.reads_causally}
    kind = {"attention": loaded.attention.kind, "block_size": loaded.attention.block_size}
    more: dict[str, Any] = {"mask_token_id": loaded.mask_token_id, **shift, **kind, **decode.model}
    drafter = MaskedDiffusionDrafter(loaded.model, **more)
    sampler = APDSampler(drafter, "self" if loaded.reads_causally else None)
    width = max(map(len, decode.prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in decode.prompts])
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in decode.prompts])
    output = sampler.generate(
        ids,
        attention_mask=real,
        max_new_tokens=decode.max_new_tokens,
        eos_token_id=decode.stops,
        pad_token_id=0,
        do_sample=False,
        strategy=decode.strategy,
        return_dict_in_generate=True,
        **decode.arguments,
    )
    rows = [trace.tokens for trace in output.trace]
    is_equal, passes = True, 0
    for tokens, recorded, trace, drafted, verified in zip(
        rows, decode.recorded, output.trace, output.drafter_forwards, output.verifier_forwards, strict=True
    ):
        ended = bool(decode.stops) and bool(tokens) and tokens[-1] in (decode.stops or ())
        is_equal &= tokens[: len(recorded)] == recorded[: len(tokens)]
        is_equal &= len(tokens) >= len(recorded) or ended
        steps = max(trace.steps[: len(recorded)], default=-1) + 1
        passes = max(passes, round(steps * int(drafted + verified) / max(len(trace.committed), 1)))
    return Made(rows, is_equal, passes)


def sdar(record: Record) -> Iterator[Decode]:
    for row in record["decodes"]:
        if row.get("comparable") is False:
            continue
        prompt, block = row["prompt"], row["block_length"]
        quota = block // row["steps"]
        name = row["strategy"].removeprefix("low_confidence_")
        rules: dict[str, Unmasking] = {
            "sequential": LeftToRight(quota),
            "static": Confidence(quota),
            "dynamic": Threshold(row.get("threshold", 1.0), quota),
        }
        recorded = row["output"][len(prompt) :]
        stops = row.get("stop_ids")
        recorded = [token for token in recorded if token != record["mask_id"]]
        yield Decode(
            f"{name}, B {block}" + (f", threshold {row['threshold']}" if "threshold" in row else ""),
            [prompt],
            [_cut(recorded, stops)],
            row["forwards"]["total"],
            _to_block_end(prompt, row["gen_length"], block),
            rules[name],
            {"block_size": block},
            stops,
        )


def fast_dllm_v2(record: Record) -> Iterator[Decode]:
    for row in record["rows"]:
        settings, is_batch = row["settings"], row["decoder"] == "batch_sample"
        if settings["use_block_cache"] or "published_quirk" in row:
            continue
        prompts = row["prompt_ids"] if is_batch else [row["prompt_ids"]]
        outputs = row["output_ids"] if is_batch else [row["output_ids"]]
        block, stops = settings["block_size"], [settings["stop_token"]]
        cut = [_cut(output[len(prompt) :], stops) for prompt, output in zip(prompts, outputs, strict=True)]
        yield Decode(
            ("batch, " if is_batch else "") + f"B {block}, threshold {settings['threshold']}",
            prompts,
            cut,
            row["forward_passes"],
            max(_to_block_end(prompt, len(output), block) for prompt, output in zip(prompts, outputs, strict=True)),
            Seeded(
                Blocks(Threshold(settings["threshold"]), settings["small_block_size"], aligned=True),
                block,
                aligned=True,
            ),
            {"block_size": block},
            stops,
        )


def wedlm(record: Record) -> Iterator[Decode]:
    for row in record["rows"]:
        settings, prompt = row["settings"], row["prompt_ids"]
        count, recorded = settings["max_new_tokens"], row["output_ids"][len(prompt) :]
        more: dict[str, Any] = {"model": {"block_size": None}}
        if row["decoder"] == "engine":
            entropy, window = settings["entropy_threshold"], settings["window_size"]
            rule: Unmasking = EntropyThreshold(entropy or 0.0, settings["pos_penalty_factor"])
            more |= {"stops": settings["stop_token_ids"], "arguments": {"window_size": window}}
            count += window  # its window goes on behind the last token
            name = "engine"
        else:
            threshold, name = settings["confidence_threshold"], "compat code"
            rule = Blocks(Threshold(threshold) if threshold else Confidence(1), settings["block_size"])
            if (temperature := settings["temperature"]) != 1:
                more["arguments"] = {"logits_processor": [Tempered(temperature)]}
        yield Decode(name, [prompt], [recorded], row["forward_passes"], count, rule, **more)


def llada2(record: Record) -> Iterator[Decode]:
    for row in record["runs"]:
        settings, prompt = row["settings"], row["prompt"]
        block, length = settings["block_length"], settings["gen_length"]
        steps = min(settings["steps"], length // settings["minimal_topk"])
        if block % steps:
            continue
        quota, threshold = block // steps, settings["threshold"]
        yield Decode(
            f"B {block}, " + ("scheduled" if threshold > 1 else f"threshold {threshold}"),
            [prompt],
            [row["output"]],
            row["forwards"],
            _to_block_end(prompt, length, block),
            Confidence(quota) if threshold > 1 else Threshold(threshold, quota),
            {"block_size": block},
            [settings["eos_id"]] if settings["eos_id"] >= 0 else None,
        )


def sdlm(record: Record) -> Iterator[Decode]:
    for row in record["runs"]:
        settings, prompt, recorded = row["settings"], row["prompt"], row["output"]
        draft, stops = settings["n_future_tokens"], [stop for stop in settings["eos_token_ids"] if stop >= 0]
        yield Decode(
            _SDLM[settings["alg"], settings["only_first_token_keep"]].format(settings["threshold"]),
            [prompt],
            [recorded],
            row["forwards"],
            max(settings["max_gen_len"], len(recorded)) + draft,  # its last window is not cut
            _of_sdlm(settings),
            {"block_size": draft},
            stops or None,
        )


_SDLM = {
    ("self_speculative", False): "self-speculative, here checked decoding of its own guesses",
    ("prob_conf", True): "one token per step",
    ("prob_conf", False): "confident prefix, threshold {}",
}


def _of_sdlm(settings: Record) -> Strategy:
    if settings["alg"] == "self_speculative":
        return Checked(LeftToRight(1), proposer="drafter", num_checked=settings["n_future_tokens"])
    return LeftToRight(1) if settings["only_first_token_keep"] else ConfidentPrefix(settings["threshold"])


def nemotron(record: Record) -> Iterator[Decode]:
    for row in record["runs"]:
        settings, prompt, method = row["settings"], row["prompt"], row["settings"]["method"]
        block, threshold = settings["block_length"] or 32, settings["threshold"]
        model: dict[str, Any] = {"block_size": block}
        arguments: dict[str, Any] = {}
        strategy: Strategy | None
        if method == "generate":
            rule = Confidence(1) if threshold is None else Threshold(threshold)
            strategy, model["anchored"] = Seeded(rule, block, by="verifier"), True
            name = f"blocks of {block}, " + ("one per pass" if threshold is None else f"threshold {threshold}")
        elif method == "ar_generate":
            strategy, name = Autoregressive(), "one token per step"
        else:
            strategy, arguments = None, {"mixture_weight": 0.0, "correction": True, "first": "judge"}
            name = f"linear speculation, B {block}" + (", drafted in several passes" if threshold else "")
        stop = settings["eos_token_id"]
        yield Decode(
            name,
            [prompt],
            [row["output"]],
            row["forwards"],
            settings["max_new_tokens"] if method == "generate" else len(row["output"]),
            strategy,
            model,
            [stop] if stop >= 0 else None,
            arguments,
        )


#: How the decodes of a folder are made here.
RULES: dict[str, Callable[[Record], Iterator[Decode]]] = {
    "parity_sdar": sdar,
    "parity_sdar_moe": sdar,
    "parity_fast_dllm_v2": fast_dllm_v2,
    "parity_wedlm": wedlm,
    "parity_wedlm_qwen3": wedlm,
    "decode_llada2_moe": llada2,
    "parity_sdlm": sdlm,
    "parity_nemotron": nemotron,
}


def load(folder: str) -> MaskedDiffusionDrafter:
    """The folder's model."""
    return load_drafter(FIXTURES / folder, mask_token_id=MASKS.get(folder))


def decodes(folder: str) -> list[Decode]:
    """The recorded decodes of a folder that can be compared."""
    return list(RULES[folder](json.loads((FIXTURES / folder / "decode.json").read_text())))


def report(folder: str) -> Iterator[str]:
    """Lines of a Markdown table: each rule of the folder, and all of them."""
    loaded, counts = load(folder), dict[str, list[int]]()
    for decode in decodes(folder):
        made = make(decode, loaded)
        for rule in (decode.rule, "**all**"):
            count = counts.setdefault(rule, [0, 0, 0, 0])
            for i, more in enumerate((made.is_equal, 1, made.passes, decode.passes)):
                count[i] += more
    counts["**all**"] = counts.pop("**all**")  # last
    for rule, (equal, total, ours, theirs) in counts.items():
        yield f"| {folder} | {rule} | {equal} of {total} | {ours} | {theirs} | {ours / theirs:.2f} |"


def _cut(tokens: list[int], stops: list[int] | None) -> list[int]:
    """The tokens up to the first stop token."""
    ends = [i for i, token in enumerate(tokens) if token in (stops or ())]
    return tokens[: ends[0] + 1] if ends else tokens


def _to_block_end(prompt: list[int], length: int, block: int) -> int:
    """New tokens up to the end of the last block, which is decoded as a whole."""
    return -(-(len(prompt) + length) // block) * block - len(prompt)
