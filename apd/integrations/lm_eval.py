"""APD as a model of EleutherAI's evaluation harness (the extra `eval`): its tasks, with tokens per forward beside accuracy.

    python -m apd lm-eval --model apd --model_args pair=included --tasks ... --include_path ...

or `lm_eval.simple_evaluate(model=APDLM(sampler), tasks=[...])`. `docs/evaluation.md` says what the numbers mean.

`APDSampler.generate_many` writes answers. The drafter alone scores given texts, see `apd.integrations.scoring`.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from apd.config import KNOBS, APDConfig
from apd.decoding.noise import SEED_MASK
from apd.decoding.strategy import Strategy
from apd.extras import install
from apd.generation import processes
from apd.generation.arguments import WARPERS, whole_seed
from apd.generation.elsewhere import LOADING, refuse_unknown
from apd.generation.many import check_chat
from apd.generation.stop_strings import StopStrings
from apd.integrations.scoring import sequential_logprobs
from apd.kinds import FLAG, REAL, TEXTS, misfit
from apd.models.loading import HUB_ARGUMENTS
from apd.sampler import APDSampler
from apd.strategies import Checked, LeftToRight
from apd.strategies.registry import apd_of, settle
from apd.text import check_text

try:
    import lm_eval.models  # noqa: F401 (fills the registry, which fills itself only while it is empty)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM, TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import (
        get_rolling_token_windows,
        handle_arg_string,
        make_disjoint_window,
        simple_parse_args_string,
    )
    from pytablewriter import MarkdownTableWriter  # type: ignore[import-not-found, unused-ignore]
except ImportError as error:
    raise ImportError(f"{error}. The evaluation harness is an extra: {install('eval')}.") from error

__all__ = ["APDLM", "Counts", "main", "register"]

_log = logging.getLogger(__name__)

_LOADING = (
    *("dtype", "device_map", "attn_implementation", "revision", "verifier_revision"),
    *("spec", "mask_token_id", "block_size"),
)
_OWN = "pair drafter verifier batch_size max_new_tokens max_length seed tokens_per_step strategy device".split()
_NUMBERS = (
    *(*KNOBS, "batch_size", "max_new_tokens", "max_length", "seed", "tokens_per_step"),
    *("mask_token_id", "block_size"),
)
_SAMPLING = tuple(name for name, _, _ in WARPERS)
_KINDS = {"do_sample": FLAG, "until": TEXTS, **dict.fromkeys(_SAMPLING, REAL)}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness's aliases
_TOO_LONG = (
    "A context with holes must fit {} tokens, got {}: it loses no end, since a hole might be there. Shorten it."
)
# The models that the harness's command line makes while `main` runs: it returns neither a model nor its results.
_MADE: ContextVar[list[APDLM]] = ContextVar("made")


@dataclass
class Counts:
    """The cost of some requests. A forward is one pass of one row.

    Attributes:
        requests: number of answered requests.
        tokens: generated up to and including the stop token, or scored.
        drafter_forwards: drafter passes of unfinished rows.
        verifier_forwards: verifier passes of unfinished rows; 0 for scored texts.
        canvases: what the drafter computed in its passes: one canvas of a row, or several with `Checked`.
    """

    requests: int = 0
    tokens: int = 0
    drafter_forwards: int = 0
    verifier_forwards: int = 0
    canvases: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per *drafter* forward; per verifier forward where the verifier decoded alone."""
        forwards = self.drafter_forwards or self.verifier_forwards
        return self.tokens / forwards if forwards else math.nan

    def add(
        self,
        requests: int,
        tokens: int,
        drafter_forwards: int,
        verifier_forwards: int = 0,
        canvases: int | None = None,
    ) -> None:
        self.requests += requests
        self.tokens += tokens
        self.drafter_forwards += drafter_forwards
        self.verifier_forwards += verifier_forwards
        self.canvases += drafter_forwards if canvases is None else canvases


class APDLM(TemplateLM):
    """A drafter and its verifier as a model of the harness.

    Where a launcher (`torchrun`, `accelerate launch`) has started several processes, each answers its share of the
    documents on its own device, and the first one has the results and the sum of the costs. A drafter that is split
    over the processes (`tp_plan`) is the exception: all of them answer everything together.

    Args:
        sampler: models and knobs. Without it, `pair` or `drafter` names the models.
        pair: `"included"` for the included pair (`"embedded"`, its name in release 0.1.0, means the same).
        drafter: directory or hub id of a diffusion LM.
        verifier: directory or hub id of a causal LM, or `"self"`, as in `APDSampler.from_pretrained`; not needed with
            `mixture_weight=1`.
        batch_size: rows decoded or scored together.
        max_new_tokens: masks behind the prompt of a task that names no `max_gen_toks`; 256, or 32 with the included
            pair, which was trained for that.
        max_length: most tokens of a row, if below the models' limit; longer contexts lose their left end.
        seed: of the run, an integer. A request's own seed follows from it and from the request's task, document and
            draw: its answer does not depend on the batch, the number of processes, `--limit` or other tasks.
        tokens_per_step: decode with `LeftToRight(tokens_per_step)` instead of APD; 1 is sequential decoding.
        strategy: decode with this instead of APD: an object, or a short name as in `strategy=confidence:2`. In
            `--model_args`, which are separated by commas, write `;` for the commas of a name: `strategy=wino:0.6;length=8`.
        device: device of the models, the harness's `--device`; the CPU if it names a missing CUDA device. Among
            several processes `"cuda"`, with or without a number, is each process's own GPU; this is also the default
            except for the included pair.
        **arguments: the knobs of `APDConfig` and the arguments of `APDSampler.from_pretrained`.

    Attributes:
        generated: by task, the cost of its answers. Adds up over runs until `reset_counts()`. With several processes
            the first one has the sum after an evaluation, the others nothing.
        scored: the cost of scoring given texts, summed over tasks and processes as in `generated`.

    Raises:
        ValueError: models are given twice or not at all, or an argument is out of its range.
        TypeError: an argument is unknown (the message names the nearest) or of a wrong type.
        RuntimeError: several processes, and a release of the harness that cannot gather their results.
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
        strategy: Strategy | str | None = None,
        device: str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(arguments, [*_OWN, *KNOBS, *_LOADING, *HUB_ARGUMENTS], "APDLM()", LOADING)
        if sum(source is not None for source in (sampler, pair, drafter)) != 1:
            raise ValueError("Exactly one of `sampler`, `pair` and `drafter` must be given. Try pair=included.")
        if pair not in (None, "included", "embedded"):
            raise ValueError(f"`pair` must be 'included', got {pair!r}. Name models as drafter=..., verifier=....")
        if verifier is not None and drafter is None:
            raise ValueError(f"`verifier` goes with `drafter`, got verifier={verifier!r} alone.")
        if sampler is not None and (arguments or device is not None):
            given = ", ".join([*arguments, *(["device"] if device is not None else [])])
            raise ValueError(f"`sampler` holds models and knobs already, got {given} too. Set them there.")
        if device is not None and not isinstance(device, str):
            raise TypeError(f"`device` must be a name such as 'cuda:0' or 'cpu', got {device!r}.")
        if tokens_per_step is not None:
            if strategy is not None:
                raise ValueError("`tokens_per_step` names a strategy, got `strategy` too. Give one of them.")
            strategy = LeftToRight(_count("tokens_per_step", tokens_per_step))
        # Refuses an unknown strategy and a missing verifier before models are loaded.
        settled, config = settle(
            strategy, APDConfig(), {name: arguments[name] for name in KNOBS if name in arguments and strategy is None}
        )
        if drafter is not None and verifier is None and (settled or apd_of(config)).needs_verifier:
            raise ValueError(
                f"`verifier` must be given with drafter={drafter!r}, got None. Name a causal LM of the same tokenizer, or pass "
                "mixture_weight=1 or a strategy that runs the drafter alone; tasks that only score given texts do."
            )
        self.strategy = strategy
        self.batch_size = _count("batch_size", batch_size)
        default = 32 if pair else 256
        self.max_new_tokens = _count("max_new_tokens", default if max_new_tokens is None else max_new_tokens)
        self.max_length = None if max_length is None else _count("max_length", max_length)
        self.seed = whole_seed(seed)

        if sampler is not None:
            self._share(sampler)
        else:
            wanted = arguments.get("device_map", None if device is None else _present(device))
            arguments["device_map"] = self._place(wanted, on_cpu=pair is not None and wanted is None)
            if drafter is not None:
                # An exact strategy takes a verifier of another vocabulary.
                arguments |= {"strategy": settled} if isinstance(settled, Checked) else {}
                sampler = APDSampler.from_pretrained(drafter, verifier, **arguments)
        self.sampler: APDSampler = sampler or APDSampler.from_included(**arguments)
        if self.sampler.tokenizer is None:
            raise ValueError("The harness deals in text: `sampler` must have a tokenizer, got None.")
        self.tokenizer = self.sampler.tokenizer
        limits = [self.max_length, self.sampler.drafter.max_length, getattr(self.sampler.verifier, "max_length", None)]
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        self._device = self.sampler.drafter.device
        self.reset_counts()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> APDLM:
        """From `"pair=included,mixture_weight=0.7"`, as the harness does it."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> APDLM:
        """From the harness's `model_args`, which take precedence over its own `--batch_size` and `--device`."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        given |= {name: _from_text(value) if name in _NUMBERS else value for name, value in arg_dict.items()}
        given = {name: None if value == "none" else value for name, value in given.items()}
        model = cls(**given)
        _MADE.get([]).append(model)
        return model

    # ---------------------------------------------------------------- several processes

    def _place(self, wanted: Any, *, on_cpu: bool) -> Any:
        """Join the other processes, and return the device of this one's models."""
        state = self._join(on_cpu=on_cpu or wanted == "cpu")
        if state is None or on_cpu:
            return wanted
        if wanted is None or (isinstance(wanted, str) and wanted.partition(":")[0] == state.device.type):
            return str(state.device)
        return wanted

    def _share(self, sampler: APDSampler) -> None:
        """Join the other processes, unless they hold one model together."""
        if (getattr(getattr(sampler.drafter, "model", None), "tp_size", None) or 1) == 1:
            self._join(on_cpu=sampler.drafter.device.type == "cpu")

    def _join(self, *, on_cpu: bool) -> Any:
        """The state of the processes that a launcher has started, `None` without a launcher."""
        if not processes.are_launched():
            return None
        state = processes.join(on_cpu=on_cpu)
        if state.num_processes > 1 and not hasattr(LM, "gather_object"):
            raise RuntimeError(
                f"This lm-eval cannot gather what {state.num_processes} processes answer. Install lm-eval 0.4.12 or "
                "newer, or start one process."
            )
        self._rank, self._world_size = state.process_index, state.num_processes
        return state

    def all_gather(self, tensor: Tensor) -> Tensor:
        """This process's number of requests, repeated once per process.

        The evaluator pads every process with repeated requests to the largest number gathered here, for models whose
        forwards synchronise. Here none does, and a repeated document would count twice in its score.
        """
        return tensor.reshape(1).expand(self.world_size)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, in process `dst`; `None` in the others."""
        if self.world_size == 1:
            return [obj]
        found = [None] * self.world_size if self.rank == dst else None
        with processes.together():
            torch.distributed.gather_object(obj, found, dst)
        return found

    def barrier(self) -> None:
        """Wait for all processes, and add their counts up in the first one, which reports them.

        The evaluator calls this after the requests of each kind.
        """
        if self.world_size == 1:
            return
        costs = self.gather_object((dict(self.generated), self.scored))
        self.reset_counts()
        for generated, scored in costs or ():
            for task, counts in generated.items():
                self.generated[task].add(**asdict(counts))
            self.scored.add(**asdict(scored))
        processes.meet()

    # ---------------------------------------------------------------- text

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none: the BOS token, else the EOS token."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        check_text(string, "A request")
        if add_special_tokens is None:  # a chat template may have written the BOS token already
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        check_chat(text, self.tokenizer)
        return text

    # ---------------------------------------------------------------- answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, cut before the first of its stop sequences.

        A request's arguments are its context and `until`, `max_gen_toks`, `do_sample`, `temperature` and all other
        arguments of `APDSampler.generate`, knobs included.

        Mask tokens in a context are holes. They are filled, nothing is appended, and the answer is the text of the holes, each
        cut likewise, with a line break between two of them.

        Raises:
            ValueError: a prompt is refused; the message names task and document. Or an argument is out of its range.
            TypeError: an argument is unknown or of a wrong type.
        """
        answers: dict[int, str] = {}
        numbers = _numbers(requests)
        place = {number: i for i, number in enumerate(numbers)}

        def refuse(number: int, error: Exception) -> None:
            request = requests[place[number]]
            raise ValueError(f"Task {request.task_name}, document {request.doc_id}: {error}") from error

        disable = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=disable, desc="Running generate_until requests") as bar:
            for gen_kwargs, indices in _by_setting(requests):
                stops, setting = self._setting(gen_kwargs)
                contexts = {i: self.tok_encode(requests[i].args[0]) for i in indices}
                holed = {i: ids for i, ids in contexts.items() if self.sampler.drafter.mask_token_id in ids}
                for i, ids in holed.items():
                    if self.max_length is not None and len(ids) > self.max_length:
                        refuse(numbers[i], ValueError(_TOO_LONG.format(self.max_length, len(ids))))
                open_ended = {
                    i: self._fit(contexts[i], setting["max_new_tokens"], "`max_gen_toks`")
                    for i in contexts.keys() - holed.keys()
                }
                until = [StopInAnswer(stops, self.tokenizer, open_ended.values())] if stops else None
                for prompts, more in (
                    (open_ended, {"stopping_criteria": until}),
                    (holed, {"max_new_tokens": 0}),
                ):
                    longest_first = sorted(sorted(prompts), key=lambda i: -len(prompts[i]))
                    for answer in self.sampler.generate_many(
                        [prompts[i] for i in longest_first],
                        indices=[numbers[i] for i in longest_first],
                        batch_size=self.batch_size,
                        ordered=False,
                        seed=self.seed,
                        on_error=refuse,
                        strategy=self.strategy,
                        **{**setting, **more},
                    ):
                        i = place[answer.index]
                        texts = [hole.text for hole in answer.holes] if i in holed else [answer.text or ""]
                        answers[i] = "\n".join(postprocess_generated_text(text, stops, None) for text in texts)
                        self.generated[requests[i].task_name or "no task"].add(
                            1, len(answer.tokens), answer.drafter_forwards, answer.verifier_forwards, answer.canvases
                        )
                        self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                        bar.update()
        return [answers[i] for i in range(len(requests))]

    def _setting(self, gen_kwargs: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Stop sequences, and arguments of `APDSampler.generate`."""
        setting: dict[str, Any] = dict(normalize_gen_kwargs(_checked(gen_kwargs), self.max_new_tokens))
        stops = [stop for stop in setting.pop("until") if stop]
        if setting.pop("num_return_sequences", 1) != 1:
            raise ValueError(
                "`num_return_sequences` must be 1: the harness takes one answer. Use the task's `repeats`."
            )
        if not setting["do_sample"]:  # tasks write temperature: 0.0 for greedy decoding
            setting = {name: value for name, value in setting.items() if name not in _SAMPLING}
        return stops, setting | {"max_new_tokens": setting.pop("max_gen_toks")}

    def _fit(self, context: list[int], num_behind: int, what: str) -> list[int]:
        """The context, cut on the left so that `num_behind` tokens fit behind it; the prefix token if it is empty.

        Args:
            what: name of the tokens behind it, for the message.
        """
        context = context or [self.prefix_token_id]
        if self.max_length is None:
            return context
        room = self.max_length - num_behind
        if room < 1:
            raise ValueError(f"{what} must leave room for a context in {self.max_length} tokens, got {num_behind}.")
        if len(context) > room:
            _log.warning("A context of %d tokens loses its left end: %d fit.", len(context), room)
        return context[-room:]

    # ---------------------------------------------------------------- given texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy sequential decoding writes it."""
        pairs = [
            (self._fit(context, len(continuation), "A continuation"), continuation)
            for _, context, continuation in requests
        ]
        scores: dict[int, tuple[float, bool]] = {}
        disable = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=disable, desc="Running loglikelihood requests") as bar:
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
        """log p in nats of each whole text behind a BOS token, in windows if it exceeds the model's length."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [
            (i, make_disjoint_window(window))
            for i, ids in enumerate(texts)
            for window in get_rolling_token_windows(
                ids,
                prefix_token=self.prefix_token_id,
                # A causal model does not read the last token; here it is a mask, which takes a column.
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

    # ---------------------------------------------------------------- costs

    def reset_counts(self) -> None:
        """Set all counts to zero."""
        self.generated: defaultdict[str, Counts] = defaultdict(Counts)
        self.scored = Counts()

    def get_model_info(self) -> dict[str, Any]:
        """Knobs and costs, which the harness writes into `results["config"]`."""
        total = Counts()
        for counts in self.generated.values():
            total.add(**asdict(counts))
        return {
            "apd_config": _as_json(self.sampler.config),
            "apd_strategy": self.strategy if isinstance(self.strategy, str | None) else repr(self.strategy),
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
        """The costs as a Markdown table like the harness's own."""
        lines = []
        if self.generated:
            table = MarkdownTableWriter()
            names = (
                "Task",
                "Answers",
                "Tokens",
                "Drafter forwards",
                "Tokens per forward",
                "Canvases",
                "Verifier forwards",
            )
            table.headers = list(names)
            table.value_matrix = [
                (
                    task,
                    c.requests,
                    c.tokens,
                    c.drafter_forwards,
                    f"{c.tokens_per_forward:.2f}",
                    c.canvases,
                    c.verifier_forwards,
                )
                for task, c in self.generated.items()
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
        prompts: ids of all prompts, since the criterion gets prompt and answer in one row.
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


def _by_setting(requests: Iterable[Any]) -> Iterable[tuple[dict[str, Any], list[int]]]:
    """Groups of requests with equal generation arguments: the arguments, and the indices of the requests."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for i, request in enumerate(requests):
        setting = request.args[1]
        groups.setdefault(json.dumps(setting, sort_keys=True, default=repr), (setting, []))[1].append(i)
    return groups.values()


def _numbers(requests: Sequence[Any]) -> list[int]:
    """A number per request, which determines its seed: a hash of task, document and draw.

    An index into the list would depend on the number of processes and on `--limit`.
    """
    draws: Counter[str] = Counter()
    numbers = []
    for request in requests:
        name = json.dumps([request.task_name, request.doc_id, request.idx], default=str)
        digest = hashlib.sha256(f"{name} {draws[name]}".encode()).digest()
        numbers.append(int.from_bytes(digest[:8], "big") & SEED_MASK)
        draws[name] += 1
    return numbers


def _checked(gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A task's generation arguments, numbers in text form converted.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a length is below 1, or a stop sequence holds half a surrogate pair.
    """
    texts = ("until", "stop_strings")
    given = {name: value if name in texts else _from_text(value) for name, value in gen_kwargs.items()}
    unset = {name for name in ("do_sample", *_SAMPLING, *_LENGTHS) if given.get(name) is None}
    given = {name: value for name, value in given.items() if name not in unset}
    for name in given.keys() & set(_LENGTHS):
        given[name] = _count(name, given[name])
    if complaint := misfit(given, _KINDS):
        raise TypeError(complaint)
    until = given.get("until") or []
    given["until"] = [until] if isinstance(until, str) else list(until)
    for stop in given["until"]:
        check_text(stop, "`until`")
    return given


def _present(device: str) -> str:
    """The device, or the CPU if it names a missing CUDA device: commands are copied between machines."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        _log.warning("There is no %s here: the models are put on the CPU.", device)
        return "cpu"
    return device


def _from_text(value: Any) -> Any:
    """Text as the harness's command line reads it: `"0.7"`, `"true"` and `"none"` as values; other values unchanged."""
    return handle_arg_string(value) if isinstance(value, str) else value


def _as_json(config: APDConfig) -> dict[str, Any]:
    """The knobs; a rule or a policy by its `repr`."""
    values = {name: getattr(config, name) for name in KNOBS}
    return {name: v if isinstance(v, int | float | str | None) else repr(v) for name, v in values.items()}


def _count(name: str, value: Any) -> int:
    text = str(value).removesuffix(".0")  # YAML's 1e2 is a float
    if isinstance(value, bool) or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    return int(text)


def register() -> None:
    """Make `model="apd"` known to the harness, in this process."""
    register_model("apd")(APDLM)


def main(argv: Sequence[str]) -> int:
    """Run the harness's own command line with `apd` among its models; the costs are printed below its table."""
    register()
    made: list[APDLM] = []
    token = _MADE.set(made)
    before, sys.argv = sys.argv, ["apd lm-eval", *argv]  # the harness parses sys.argv
    try:
        cli_evaluate()
    finally:
        processes.leave()
        sys.argv = before
        _MADE.reset(token)
    for model in made:
        if model.rank == 0:
            sys.stdout.write(model.summary() + "\n")
    return 0
