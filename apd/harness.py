"""APD as a model of EleutherAI's evaluation harness (the extra `eval`): its tasks, with tokens per forward beside accuracy.

    python -m apd lm-eval --model apd --model_args pair=embedded --tasks ... --include_path ...

or `lm_eval.simple_evaluate(model=APDLM(sampler), tasks=[...])`. `docs/evaluation.md` says what the numbers mean.

Answers are written by `APDSampler.generate_many`. Given texts are scored by the drafter alone, with the left-to-right chain
rule: log p(text | context) = Σ_j log p_D(token_j | context, the tokens before it, masks for it and all behind it). That
is the probability with which sequential decoding writes them on a canvas of just this length. No knob enters into it.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import json
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from apd.arguments import refuse_unknown
from apd.config import KNOBS
from apd.drafter import Drafter
from apd.models import HUB_ARGUMENTS
from apd.probability import log_normalise
from apd.returned import CheckedLogits, check_session, name_of
from apd.sampler import APDSampler
from apd.state import DecodeState, Window
from apd.step import Strategy
from apd.stop_strings import StopStrings
from apd.strategies import LeftToRight

try:
    import lm_eval.models  # noqa: F401 (fills the registry, which fills itself only while it is empty)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
    from pytablewriter import MarkdownTableWriter  # type: ignore[import-not-found, unused-ignore]
except ImportError as error:
    raise ImportError(f"{error}. The evaluation harness is an extra: pip install 'apd-decoding[eval]'.") from error

__all__ = ["APDLM", "Counts", "main", "register", "sequential_logprobs"]

_log = logging.getLogger(__name__)

_LOADING = ("dtype", "device_map", "attn_implementation", "revision", "verifier_revision", "spec", "mask_token_id")
_OWN = "pair drafter verifier batch_size max_new_tokens max_length seed tokens_per_step strategy device".split()
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# The models that the harness's command line makes while `main` runs, which hands nobody the model it made.
_MADE: ContextVar[list[APDLM]] = ContextVar("made")


@dataclass
class Counts:
    """What some requests cost. A forward is one drafter pass of one row.

    Attributes:
        requests: how many were answered.
        tokens: generated up to and including the stop token, or scored.
        drafter_forwards: drafter passes of rows that were not done.
        verifier_forwards: likewise; no text is scored by the verifier.
    """

    requests: int = 0
    tokens: int = 0
    drafter_forwards: int = 0
    verifier_forwards: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per *drafter* forward; verifier passes stand beside it."""
        forwards = self.drafter_forwards or self.verifier_forwards  # the latter where the verifier decoded alone
        return self.tokens / forwards if forwards else math.nan

    def add(self, requests: int, tokens: int, drafter_forwards: int, verifier_forwards: int = 0) -> None:
        self.requests += requests
        self.tokens += tokens
        self.drafter_forwards += drafter_forwards
        self.verifier_forwards += verifier_forwards


class APDLM(TemplateLM):
    """A drafter and its verifier, as a model that the harness can evaluate.

    Args:
        sampler: the models and knobs; or else they are loaded from what follows.
        pair: `"embedded"` for the pair that ships with the package.
        drafter: directory or hub id of a diffusion LM.
        verifier: directory or hub id of a causal LM; not needed with `mixture_weight=1`.
        batch_size: rows decoded or scored together.
        max_new_tokens: masks behind the prompt of a task that names no `max_gen_toks`; 256, or 32 with the embedded
            pair, which was trained for that.
        max_length: tokens a row may have, where that is less than the models allow; longer contexts lose their left end.
        seed: of the run; request i is sampled with `mix_seed(seed, i)`, whatever its batch.
        tokens_per_step: decode with `LeftToRight` of so many tokens instead of APD; 1 is sequential decoding.
        strategy: decode with this instead of APD.
        device: where the models are put, the harness's `--device`; a CUDA device that is not there is the CPU.
        **arguments: the knobs of `APDConfig` and the arguments of `APDSampler.from_pretrained`.

    Attributes:
        generated: by task, what its answers cost. Adds up over runs until `reset_counts()`.
        scored: what scoring given texts cost, all tasks together.

    Raises:
        ValueError: models are given twice or not at all, or an argument is out of its range.
        TypeError: an unknown argument; the nearest is named.
    """

    def __init__(
        self,
        sampler: APDSampler | None = None,
        *,
        pair: str | None = None,
        drafter: str | None = None,
        verifier: str | None = None,
        batch_size: int | str = 8,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        tokens_per_step: int | None = None,
        strategy: Strategy | None = None,
        device: str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(arguments, [*_OWN, *KNOBS, *_LOADING, *HUB_ARGUMENTS], "APDLM()")
        if sum(source is not None for source in (sampler, pair, drafter)) != 1:
            raise ValueError("Exactly one of `sampler`, `pair` and `drafter` must be given. Try pair=embedded.")
        if pair not in (None, "embedded"):
            raise ValueError(f"`pair` must be 'embedded', got {pair!r}. Name models as drafter=..., verifier=....")
        if verifier is not None and drafter is None:
            raise ValueError(f"`verifier` goes with `drafter`, got verifier={verifier!r} alone.")
        if sampler is not None and (arguments or device is not None):
            given = ", ".join([*arguments, *(["device"] if device is not None else [])])
            raise ValueError(f"`sampler` holds models and knobs already, got {given} too. Set them there.")
        if device is not None:
            arguments.setdefault("device_map", _present(device))
        if drafter is not None:
            sampler = APDSampler.from_pretrained(drafter, verifier, **arguments)
        self.sampler: APDSampler = sampler or APDSampler.from_embedded(**arguments)
        if self.sampler.tokenizer is None:
            raise ValueError("The harness deals in text: `sampler` must have a tokenizer, got None.")
        self.tokenizer = self.sampler.tokenizer
        self.batch_size = _count("batch_size", batch_size)
        self.max_new_tokens = _count("max_new_tokens", max_new_tokens or (32 if pair else 256))
        limits = [max_length, self.sampler.drafter.max_length, getattr(self.sampler.verifier, "max_length", None)]
        self.max_length: int | None = min((limit for limit in limits if limit is not None), default=None)
        self.seed = seed
        if tokens_per_step is not None:
            if strategy is not None:
                raise ValueError("`tokens_per_step` names a strategy, got `strategy` too. Give one of them.")
            strategy = LeftToRight(_count("tokens_per_step", tokens_per_step))
        self.strategy = strategy
        self._device = self.sampler.drafter.device
        self.reset_counts()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> APDLM:
        """From `"pair=embedded,mixture_weight=0.7"`, as the harness does it."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> APDLM:
        """From the harness's `model_args`, which count before its own `--batch_size` and `--device`."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        given |= {name: None if value == "none" else value for name, value in arg_dict.items()}
        model = cls(**given)
        _MADE.get([]).append(model)
        return model

    # ---------------------------------------------------------------- text

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the BOS token, else the EOS token."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template may have written the BOS token already
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ---------------------------------------------------------------- answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, cut before the first of its stop sequences.

        A request's arguments are its context and `until`, `max_gen_toks`, `do_sample`, `temperature` and whatever
        else `APDSampler.generate` takes, knobs included.
        """
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for gen_kwargs, indices in _by_setting(requests):
                stops, setting = self._setting(gen_kwargs)
                prompts = {i: self._prompt(requests[i].args[0], setting["max_new_tokens"]) for i in indices}
                longest_first = sorted(indices, key=lambda i: -len(prompts[i]))
                for answer in self.sampler.generate_many(
                    [prompts[i] for i in longest_first],
                    indices=longest_first,
                    batch_size=self.batch_size,
                    ordered=False,
                    seed=self.seed,
                    strategy=self.strategy,
                    stopping_criteria=[StopInAnswer(stops, self.tokenizer, prompts.values())] if stops else None,
                    **setting,
                ):
                    request = requests[answer.index]
                    answers[answer.index] = _cut(answer.text or "", stops)
                    self.generated[request.task_name or "no task"].add(
                        1, len(answer.tokens), answer.drafter_forwards, answer.verifier_forwards
                    )
                    self.cache_hook.add_partial("generate_until", request.args, answers[answer.index])
                    bar.update()
        return [answers[i] for i in range(len(requests))]

    def _setting(self, gen_kwargs: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Stop sequences, and arguments of `APDSampler.generate`."""
        setting: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_new_tokens))
        stops = [stop for stop in setting.pop("until") if stop]
        if not setting["do_sample"]:  # tasks say temperature: 0.0 of greedy decoding
            setting = {name: value for name, value in setting.items() if name not in _SAMPLING}
        return stops, setting | {"max_new_tokens": setting.pop("max_gen_toks")}

    def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
        ids = self.tok_encode(context) or [self.prefix_token_id]
        if self.max_length is None:
            return ids
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(
                f"`max_gen_toks` must leave room for a prompt in {self.max_length} tokens, got {max_new_tokens}."
            )
        if len(ids) > room:
            _log.warning("A prompt of %d tokens loses its left end: %d fit.", len(ids), room)
        return ids[-room:]

    # ---------------------------------------------------------------- given texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether greedy sequential decoding writes it."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        scores: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for i, logprob, is_greedy, num_rows in sequential_logprobs(
                self.sampler.drafter, pairs, vocab_size=self.sampler.vocab_size, batch_size=self.batch_size
            ):
                scores[i] = logprob, is_greedy
                self.scored.add(1, len(pairs[i][1]), num_rows)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], scores[i])
                bar.update()
        return [scores[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text behind a BOS token, in windows where it is longer than the model takes."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [
            (i, make_disjoint_window(window))
            for i, ids in enumerate(texts)
            for window in get_rolling_token_windows(
                ids,
                prefix_token=self.prefix_token_id,
                # The last token of a causal model is not an input; here it is a mask, and takes a place too.
                max_seq_len=max(1, len(ids) if self.max_length is None else self.max_length - 1),
                context_len=1,
            )
        ]
        scores = self._loglikelihood_tokens([(None, *window) for _, window in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (i, _), (logprob, _) in zip(windows, scores, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The pair without what is left of the last `max_length` tokens."""
        context = context or [self.prefix_token_id]
        if self.max_length is None:
            return context, continuation
        room = self.max_length - len(continuation)
        if room < 1:
            raise ValueError(
                f"A continuation must leave room for context in {self.max_length} tokens, got {len(continuation)}."
            )
        if len(context) > room:
            _log.warning("A context of %d tokens loses its left end: %d fit.", len(context), room)
        return context[-room:], continuation

    # ---------------------------------------------------------------- what it cost

    def reset_counts(self) -> None:
        """Forget what earlier runs cost."""
        self.generated: defaultdict[str, Counts] = defaultdict(Counts)
        self.scored = Counts()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into `results["config"]`: the knobs, and what the answers cost."""
        total = Counts()
        for counts in self.generated.values():
            total.add(**asdict(counts))
        return {
            "apd_config": asdict(self.sampler.config),
            "apd_strategy": None if self.strategy is None else repr(self.strategy),
            "apd_seed": self.seed,
            "apd_max_new_tokens": self.max_new_tokens,
            "tokens_per_forward": total.tokens_per_forward if total.requests else None,
            "generated": {
                task: asdict(counts) | {"tokens_per_forward": counts.tokens_per_forward}
                for task, counts in self.generated.items()
            },
            "scored": asdict(self.scored),
        }

    def summary(self) -> str:
        """What the answers cost, as a table like the harness's own."""
        lines = []
        if self.generated:
            table = MarkdownTableWriter()
            table.headers = "Task,Answers,Tokens,Drafter forwards,Tokens per forward,Verifier forwards".split(",")
            table.value_matrix = [
                [
                    task,
                    counts.requests,
                    counts.tokens,
                    counts.drafter_forwards,
                    f"{counts.tokens_per_forward:.2f}",
                    counts.verifier_forwards,
                ]
                for task, counts in self.generated.items()
            ]
            lines.append(table.dumps())
        if self.scored.requests:
            lines.append(
                f"{self.scored.requests} given texts of {self.scored.tokens} tokens were scored in "
                f"{self.scored.drafter_forwards} drafter forwards."
            )
        return "\n".join(lines)


class StopInAnswer(StopStrings):
    """Ends a row at the token that completes a stop sequence in the text of its answer.

    `stop_strings` of `generate` may begin in the prompt, as in transformers: with `until: ["\\n\\n"]`, behind a prompt
    that ends in a line break, an answer that begins with one would be over at once. The harness means the answer alone.

    Args:
        stops: the stop sequences.
        tokenizer: decodes the row.
        prompts: ids of all prompts, since the criterion is asked with prompt and answer in one row.
    """

    def __init__(self, stops: list[str], tokenizer: Any, prompts: Iterable[list[int]]) -> None:
        super().__init__(stops, tokenizer)
        self.prompts = {tuple(prompt) for prompt in prompts}
        self.lengths = sorted({len(prompt) for prompt in self.prompts}, reverse=True)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped = super().__call__(input_ids, scores, **kwargs)
        if stopped.any():
            (row,) = input_ids.tolist()
            start = next(length for length in self.lengths if tuple(row[:length]) in self.prompts)
            answer = self.tokenizer.decode(row[start:], clean_up_tokenization_spaces=False)
            stopped &= any(stop in answer for stop in self.stop_strings)
        return stopped


@dataclass(frozen=True)
class _Row:
    """A canvas to be asked for its first mask: what is known, and who wants to know about which token."""

    context: tuple[int, ...]
    before: tuple[int, ...]
    masks: int
    requests: list[int]


def sequential_logprobs(
    drafter: Drafter, pairs: Sequence[tuple[list[int], list[int]]], *, vocab_size: int, batch_size: int
) -> Iterator[tuple[int, float, bool, int]]:
    """What sequential decoding assigns to given continuations, each on a canvas of just its length.

    One forward per position; requests that have context, length and the tokens so far in common share it.

    Args:
        drafter: neural or exact.
        pairs: ids of context (at least one) and continuation.
        vocab_size: ids below it can be decoded, the mask token aside; all others have probability 0.
        batch_size: forwards that are made together.
    Yields:
        The request's number, log p of its continuation in nats, whether every token is the likeliest, and the forwards
        made for it, shared ones counted once. As soon as it is known, in no particular order.
    Raises:
        FloatingPointError: the drafter gave NaN, +∞ or nothing finite.
    """
    total = [0.0] * len(pairs)
    greedy = [True] * len(pairs)
    num_rows = [0] * len(pairs)
    for i, (_, continuation) in enumerate(pairs):
        if not continuation:
            yield i, 0.0, True, 0
    rows = _rows(pairs)
    while batch := list(islice(rows, batch_size)):
        logprobs = _first_mask(drafter, batch, vocab_size)
        asked = [(r, i, pairs[i][1][len(row.before)]) for r, row in enumerate(batch) for i in row.requests]
        of_row, tokens = torch.tensor([[r, token] for r, _, token in asked], device=logprobs.device).T
        values = logprobs[of_row, tokens.clamp(max=vocab_size - 1)].masked_fill(tokens >= vocab_size, -torch.inf)
        likeliest = logprobs.argmax(-1)[of_row] == tokens
        for (r, i, _), value, is_likeliest in zip(asked, values.tolist(), likeliest.tolist(), strict=True):
            total[i] += value
            greedy[i] &= is_likeliest
            num_rows[i] += i == batch[r].requests[0]
            if batch[r].masks == 1:
                yield i, total[i], greedy[i], num_rows[i]


def _rows(pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[_Row]:
    """One row per position, wide ones first; among requests with the same canvas each known prefix once."""
    canvases: defaultdict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for i, (context, continuation) in enumerate(pairs):
        canvases[tuple(context), len(continuation)].append(i)
    for (known, length), members in sorted(canvases.items(), key=lambda item: -len(item[0][0]) - item[0][1]):
        for position in range(length):
            by_prefix: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
            for i in members:
                by_prefix[tuple(pairs[i][1][:position])].append(i)
            for before, requests in by_prefix.items():
                yield _Row(known, before, length - position, requests)


@torch.inference_mode()
def _first_mask(drafter: Drafter, rows: list[_Row], vocab_size: int) -> Tensor:
    """log p_D at the first mask of each row, `b v` float32, under the sampler's rule of support."""
    state = _canvases(rows, drafter.mask_token_id, drafter.device)
    # One column, although all are seen: logits of the masks behind it are never computed.
    layout = state.layout
    window = Window(state.frontier[:, None], torch.ones_like(state.decided[:, :1]), layout.frontier, layout.end)
    session = drafter.open(state, None, None)
    check_session(session, name_of(drafter, "open"), "logits")
    of_window = CheckedLogits(session.logits(state, window), name_of(session, "logits"), (len(rows), 1), vocab_size)
    logits = of_window[:, :1][:, 0, :vocab_size].float()
    if drafter.mask_token_id < vocab_size:
        logits[:, drafter.mask_token_id] = -torch.inf
    logprobs = log_normalise(logits)
    if logprobs.isnan().any():
        raise FloatingPointError(
            "The drafter gave NaN, infinite or no finite logits for a given text. Check its weights and dtype (float16 "
            "overflows where bfloat16 does not)."
        )
    return logprobs


def _canvases(rows: list[_Row], mask_token_id: int, device: torch.device) -> DecodeState:
    """The rows level at their right end."""
    known = [row.context + row.before for row in rows]
    width = max(len(ids) + row.masks for ids, row in zip(known, rows, strict=True))
    masks = torch.tensor([row.masks for row in rows], device="cpu")
    padding = masks.new_tensor([width - len(ids) - row.masks for ids, row in zip(known, rows, strict=True)])
    tokens = [[0] * (width - len(ids) - row.masks) + [*ids] for ids, row in zip(known, rows, strict=True)]
    nothing = torch.zeros_like(masks)
    state = DecodeState(
        tokens=masks.new_tensor([ids + [mask_token_id] * row.masks for ids, row in zip(tokens, rows, strict=True)]),
        decided=torch.arange(width, device="cpu") < width - masks[:, None],
        frontier=width - masks,
        done=nothing.bool(),
        padding=padding,
        start=width - masks - masks.new_tensor([len(row.before) for row in rows]),
        end=nothing + width,
        seeds=nothing,
        steps=nothing,
        rows=torch.arange(len(rows), device="cpu"),
        pace=nothing.float(),
    )
    return DecodeState(**{name: value.to(device) for name, value in vars(state).items()})


def _by_setting(requests: Iterable[Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The numbers of the requests that have the same generation arguments, and these."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    settings: dict[str, dict[str, Any]] = {}
    for i, request in enumerate(requests):
        setting = request.args[1]
        key = json.dumps(setting, sort_keys=True, default=repr)
        groups[key].append(i)
        settings[key] = setting
    for key, indices in groups.items():
        yield settings[key], indices


def _cut(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _present(device: str) -> str:
    """The device, or the CPU: the harness's command line asks for `cuda:0` on every machine."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        _log.warning("There is no %s here: the models are put on the CPU.", device)
        return "cpu"
    return device


def _count(name: str, value: Any) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    return int(value)


def register() -> None:
    """Make `model="apd"` known to the harness, in this process."""
    register_model("apd")(APDLM)


def main(argv: Sequence[str]) -> int:
    """The harness's own command line with `apd` among its models; what answers cost is printed below its table."""
    register()
    made: list[APDLM] = []
    token = _MADE.set(made)
    before, sys.argv = sys.argv, ["apd lm-eval", *argv]  # where the harness looks for its arguments
    try:
        cli_evaluate()
    finally:
        sys.argv = before
        _MADE.reset(token)
    for model in made:
        sys.stdout.write(model.summary() + "\n")
    return 0
