"""What parts of one's own are tried on: a small random pair, ragged rows, and a limit of time."""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from apd.decoding.state import DecodeState, to_device
from apd.inspection.report import Finding
from apd.models.loading import as_drafter, as_verifier
from apd.sampler import APDSampler

#: New tokens of a row.
NEW_TOKENS = 8
_LENGTHS = (2, 1, 4, 3)  # of the prompts: the rows are ragged
_VOCABULARY = 32
_PACKAGE = Path(__file__).parents[1]


@functools.cache
def sampler_of_bed() -> APDSampler:
    """A random pair in which every token depends on its context, in float64, so that rounding tips no tie."""
    models = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            config = Qwen2Config(
                vocab_size=_VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                initializer_range=0.35,
                tie_word_embeddings=False,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
            models.append(Qwen2ForCausalLM(config).double().eval().requires_grad_(False))
    models[0].config.is_causal = False
    drafter = as_drafter(models[0], spec="dream", mask_token_id=_VOCABULARY - 1)
    return APDSampler(drafter, as_verifier(models[1]))


def prompts_of(vocab_size: int, mask_token_id: int) -> list[list[int]]:
    """Prompts of different lengths, of ids below `vocab_size` that are not the mask."""
    ids = [id for id in range(vocab_size) if id != mask_token_id]
    return [[ids[(3 * row + 5 * i + 1) % len(ids)] for i in range(length)] for row, length in enumerate(_LENGTHS)]


def state_of_rows(
    prompts: Sequence[Sequence[int]], mask_token_id: int, new_tokens: int, device: torch.device
) -> DecodeState:
    """The rows of a batch, padded on the left, before the first step."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[0] * before + list(prompt) for before, prompt in zip(padding, prompts, strict=True)]
    return DecodeState.start(
        to_device(rows, device),
        max_new_tokens=new_tokens,
        mask_token_id=mask_token_id,
        padding=to_device(padding, device),
        seeds=torch.arange(len(rows), device=device),
    )


def answers(
    sampler: APDSampler,
    prompts: list[list[int]],
    *,
    batch_size: int,
    alone: bool = False,
    passes: bool = False,
    **call: Any,
) -> Any:
    """Tokens and end of the answer to each prompt, with `passes` also the forwards of both models; `alone` decodes each in a
    call of its own."""
    common: dict[str, Any] = {"batch_size": batch_size, "seed": 5, "pad_token_id": 0, **call}
    if alone:
        parts = [sampler.generate_many([p], indices=[i], **common) for i, p in enumerate(prompts)]
        found = [one for part in parts for one in part]
    else:
        found = list(sampler.generate_many(prompts, **common))
    forwards = [(one.drafter_forwards, one.verifier_forwards) if passes else () for one in found]
    return [(one.tokens, one.finish, *each) for one, each in zip(found, forwards, strict=True)]


class Broken(ValueError):
    """A law that does not hold; the message says what is wrong and what to do."""


@dataclass
class Trial:
    """Runs laws one after another, until one of those that the others need fails.

    Args:
        part: what is tried, by name.
        findings: what was found.
        doing: the law that is tried now.
        since: when it began, by `time.monotonic`.
        is_over: a law failed without which the others mean nothing.
    """

    part: str
    findings: list[Finding] = field(default_factory=list)
    doing: str = "contract"
    since: float = field(default_factory=time.monotonic)
    is_over: bool = False

    def law(self, name: str, expected: str, holds: Callable[[], Any], *, needed: bool = False) -> bool:
        """Try a law. It holds unless `holds` raises; what it returns in words is shown.

        Args:
            name: of at most 19 characters.
            expected: what the law says, in a few words.
            needed: the laws behind this one mean nothing without it.
        """
        if self.is_over:
            return False
        self.doing, self.since = name, time.monotonic()
        try:
            found = holds()
        except Exception as error:  # code of the caller raises anything
            self.findings.append(Finding(name, type(error).__name__, expected, "problem", sentence(error)))
            self.is_over = needed
            return False
        self.findings.append(Finding(name, found if isinstance(found, str) else "holds", expected, "ok"))
        return True


def sentence(error: Exception) -> str:
    """An error in words. One that the library raises names the culprit; any other is told with its place."""
    said, last = " ".join(str(error).split()), traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, Broken) or ("`" in said and Path(last.filename).is_relative_to(_PACKAGE)):
        return said
    return f"{type(error).__name__}: {said or 'no message'} (line {last.lineno} of {last.filename}, in {last.name}: {last.line})."


def run(trial: Trial, laws: Callable[[Trial], None], seconds: float) -> Iterator[Finding]:
    """The findings of some laws, up to one that does not come back within so many seconds."""
    failed: list[BaseException] = []

    @torch.no_grad()  # as in decoding; the caller's own setting does not reach another thread
    def work() -> None:
        try:
            laws(trial)
        except BaseException as error:  # ours: raised again below
            failed.append(error)

    # A daemon: code that never comes back can only be left behind.
    worker = threading.Thread(target=work, name=f"check of {trial.part}", daemon=True)
    worker.start()
    while worker.is_alive() and (left := trial.since + seconds - time.monotonic()) > 0:
        worker.join(left)
    if failed:
        raise failed[0]
    found = list(trial.findings)
    if worker.is_alive():
        found.append(
            Finding(
                trial.doing,
                f"over {seconds:g} s",
                "comes back",
                "problem",
                f"`{trial.part}` did not come back within {seconds:g} seconds: a loop in it may never end. If it is only slow, give "
                "`seconds=`.",
            )
        )
    yield from found


def equal(name: str, found: Tensor, expected: Tensor, where: str, remedy: str, *, tolerance: float = 1e-3) -> None:
    """Refuse logits, `… v` each up to a constant, that differ by more than `tolerance` of the largest finite one.

    Args:
        name: what gave them.
        where: in which case they differ.
        remedy: sentences that end the message.

    Raises:
        Broken: they differ.
    """
    both = torch.stack([found.double(), expected.double()])
    if both.shape[-1] > 1:
        both = both.log_softmax(-1)
    finite = both.isfinite().all(0)
    scale = float(both[:, finite].abs().max()) if finite.any() else 1.0
    differs = bool((both[0].isneginf() != both[1].isneginf()).any())
    worst = float((both[0] - both[1])[finite].abs().max()) if finite.any() else 0.0
    if differs or worst > tolerance * max(scale, 1e-30):
        raise Broken(f"`{name}` gives other logits {where}; they differ by up to {worst:.2g}. {remedy}")
