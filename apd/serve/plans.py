"""From the body of a request to rows of the engine: everything is checked here, before anything is decoded."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from apd.decoding.noise import mix_seed
from apd.generation.many import encode
from apd.serve.chats import prompt_of
from apd.serve.engine.errors import APIError, refused
from apd.serve.engine.facts import Facts
from apd.serve.engine.jobs import Decoding, Job, Row
from apd.serve.engine.works import Filling, Scoring
from apd.serve.formats import schema_of
from apd.serve.holes import holes_of, strategy_for_holes
from apd.serve.sampling import arguments_of, processors_of
from apd.serve.schemas import ChatBody, Common, CompletionBody, ResponseFormat
from apd.serve.settings import ServeSettings

_NO_TOOLS = "this server calls no tools, and a model that was not trained for them would only pretend. Leave it out"
#: Fields that are refused if they mean anything: the values that mean nothing, and the reason.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "modalities": ((["text"],), "only text is written. Leave it out"),
    "audio": ((), "only text is written. Leave it out"),
    "prediction": ((), "the drafter drafts the answer itself. Leave it out"),
    "web_search_options": ((), "there is no search here. Leave it out"),
    "reasoning_effort": (("none",), "there is no such setting here. Leave it out"),
    "verbosity": (("medium",), "there is no such setting here. Leave it out"),
    "best_of": ((1,), "every choice is returned; use `n`"),
}


@dataclass(frozen=True)
class Choice:
    """One choice of a response.

    Attributes:
        prompt: its prompt's ids.
        echo: text before the answer.
    """

    prompt: list[int]
    echo: str = ""


@dataclass(frozen=True)
class Plan:
    """A checked request.

    Attributes:
        choices: what is answered, in the order of their indices.
        job: what the engine is asked for: a row for each choice, or, where a hole is filled, for each length of it.
        num_prompt_tokens: of all prompts, each counted once.
        stops: strings that end an answer.
        continues: the answer's first space depends on the prompt.
        shows_special: see `Answer`; lm-eval counts on one entry for each token of a completion.
    """

    choices: list[Choice]
    job: Job
    num_prompt_tokens: int
    stops: Sequence[str] = ()
    continues: bool = False
    shows_special: bool = False

    @property
    def fills(self) -> bool:
        """True if rows are lengths of one hole, and there is one choice."""
        return isinstance(self.job.work, Filling)


class Planner:
    """Checks requests and makes plans; called from several threads.

    Args:
        facts: what is known of the sampler.
        settings: of the server.
    """

    def __init__(self, facts: Facts, settings: ServeSettings) -> None:
        self.facts, self.settings = facts, settings
        self.lock = Lock()
        limits = [limit for limit in (settings.max_length, facts.max_length) if limit is not None]
        self.max_length: int | None = min(limits, default=None)

    def chat(self, body: ChatBody) -> Plan:
        """The plan of a chat completion.

        Raises:
            APIError: what is wrong with the request.
        """
        self._check(body)
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise refused("`max_tokens` and `max_completion_tokens` name one number. Leave one out.", "max_tokens")
        if body.max_tokens == 0:
            raise refused("`max_tokens` must be at least 1, got 0.", "max_tokens", "invalid_value")
        if body.top_logprobs and not body.logprobs:
            raise refused("`top_logprobs` needs `logprobs`: true.", "top_logprobs")
        ids = self._encode(prompt_of(body.messages, self.facts.tokenizer), "messages")
        return self._plan(
            body,
            [(ids, "")],
            body.max_completion_tokens or body.max_tokens,
            top=(body.top_logprobs or 0) if body.logprobs else None,
            continues=body.messages[-1].role == "assistant" or not self.facts.tokenizer.chat_template,
            wanted=body.response_format,
        )

    def completion(self, body: CompletionBody) -> Plan:
        """The plan of a text completion.

        Raises:
            APIError: what is wrong with the request.
        """
        self._check(body)
        given = _many(body.prompt)
        if not given:
            raise refused("`prompt` must hold a prompt, got an empty list.", "prompt")
        self._check_number(len(given) * (body.n or 1))
        prompts = []
        for prompt in given:
            ids = self._encode(prompt, "prompt")
            prompts.append((ids, self._text(prompt) if body.echo else ""))
        if body.suffix:
            return self._infilling(body)
        if body.max_tokens == 0 and not body.echo:
            raise refused("`max_tokens` must be at least 1 without `echo`, got 0.", "max_tokens", "invalid_value")
        plan = self._plan(body, prompts, body.max_tokens, top=body.logprobs, continues=True)
        plan = dataclasses.replace(plan, shows_special=True)
        if body.echo and body.logprobs is not None:
            if body.stream:
                raise refused("`echo` with `logprobs` cannot be streamed: the prompt is scored last.", "stream")
            scoring = Scoring([choice.prompt for choice in plan.choices], self.settings.max_batch_size, body.logprobs)
            plan = dataclasses.replace(plan, job=dataclasses.replace(plan.job, work=scoring))
        return plan

    def _infilling(self, body: CompletionBody) -> Plan:
        """Prompt, hole and suffix: a row for every length that is tried."""
        for name in ("echo", "logprobs", "stop", "frequency_penalty", "presence_penalty"):
            if getattr(body, name):
                raise refused(f"`{name}` cannot be meant with `suffix`, where the text goes on.", name)
        if body.n not in (None, 1) or not isinstance(body.prompt, str):
            raise refused(
                "`suffix` needs one `prompt`, a text, and one choice.", "n" if body.n not in (None, 1) else "prompt"
            )
        if body.max_tokens == 0:
            raise refused("`max_tokens` must be at least 1 with `suffix`, got 0.", "max_tokens", "invalid_value")
        most = self.settings.max_new_tokens if body.max_tokens is None else body.max_tokens
        self._new_tokens(len(self._encode(body.prompt, "prompt")) + len(self._encode(body.suffix, "suffix")), most)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        arguments = arguments_of(body, self.settings)
        arguments |= strategy_for_holes(self.facts, arguments)
        processors = processors_of(body, 0, self.facts.vocab_size)
        try:
            with self.lock:
                texts = holes_of(body.prompt, body.suffix or "", most, self.facts)
        except ValueError as error:
            raise refused(str(error), "suffix", "invalid_value") from None
        self._new_tokens(max(len(text.ids) for text in texts), 0)
        job = Job(
            Decoding(tuple(sorted(arguments.items())), processors, has_holes=True),
            [Row(text.ids, 0, mix_seed(seed, i)) for i, text in enumerate(texts)],
            work=Filling(texts),
            timeout=self.settings.request_timeout,
        )
        hole = texts[0].holes[0]
        return Plan([Choice([])], job, len(texts[0].ids) - (hole[1] - hole[0]))

    def _check_number(self, choices: int) -> None:
        """Before rows are made of them: a body of 1 MiB can name 30 million."""
        most = self.settings.max_batch_size + self.settings.max_queue
        if choices > most:
            raise refused(f"A request may have {most} choices here, got {choices}.", "n")

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self.facts.tokenizer.decode(prompt))

    def _check(self, body: Common) -> None:
        name = self.settings.model_name
        if body.model is not None and body.model != name:
            raise APIError(
                404,
                f"The model {body.model!r} does not exist, this server has {name!r}.",
                param="model",
                code="model_not_found",
            )
        for field_name, (neutral, reason) in REFUSED.items():
            value = vars(body).get(field_name)
            if value is not None and value not in neutral:
                raise refused(f"`{field_name}` is not supported: {reason}.", field_name, "unsupported_parameter")
        if body.stream_options is not None and not body.stream:
            raise refused("`stream_options` needs `stream`: true.", "stream_options")
        stops = _stops(body.stop)
        if len(stops) > 4:
            raise refused(f"`stop` may have 4 strings at most, got {len(stops)}.", "stop", "array_above_max_length")
        if not all(stops):
            raise refused(
                "`stop` must not have an empty string: every answer would be empty.", "stop", "invalid_value"
            )

    def _encode(self, prompt: Any, param: str) -> list[int]:
        if isinstance(prompt, (str, list)) and not prompt:
            raise refused("A prompt must hold a token, got an empty one. Start with a word.", param, "invalid_value")
        try:
            with self.lock:  # tokenizers refuse to be used by two threads while one sets them up
                ids: list[int] = encode(prompt, self.facts.tokenizer, self.max_length)[0].tolist()
        except (ValueError, TypeError) as error:
            code = "context_length_exceeded" if "positions" in str(error) else "invalid_value"
            raise refused(str(error), param, code) from None
        if not ids:
            raise refused("A prompt must hold a token, got an empty one. Start with a word.", param, "invalid_value")
        mask = self.facts.mask_token_id
        if mask in ids:
            raise refused(
                f"A prompt must not hold the mask token (id {mask}). To fill a hole, give what is behind it as `suffix`.",
                param,
            )
        size = self.facts.vocab_size
        if min(ids) < 0 or max(ids) >= size:
            raise refused(f"Ids of a prompt must be at least 0 and below {size}.", param, "invalid_value")
        return ids

    def _plan(
        self,
        body: Common,
        prompts: Sequence[tuple[list[int], str]],
        max_tokens: int | None,
        *,
        top: int | None,
        continues: bool,
        wanted: ResponseFormat | None = None,
    ) -> Plan:
        seed = secrets.randbits(63) if body.seed is None else body.seed
        arguments, schema = tuple(sorted(arguments_of(body, self.settings).items())), schema_of(wanted)
        choices: list[Choice] = []
        rows: list[Row] = []
        decodings: set[Decoding] = set()
        for ids, echo in prompts:
            new_tokens = self._new_tokens(len(ids), max_tokens)
            processors = processors_of(body, len(ids), self.facts.vocab_size)
            decodings.add(Decoding(arguments, processors, has_logits=top is not None, has_grammar=schema is not None))
            for _ in range(body.n or 1):
                if new_tokens:
                    rows.append(Row(ids, new_tokens, mix_seed(seed, len(choices))))
                choices.append(Choice(ids, echo))
        if len(decodings) > 1:
            raise refused("Penalties need prompts of equal length in one request. Send them one by one.", "prompt")
        stops = _stops(body.stop)
        job = Job(
            decodings.pop(),
            rows,
            follow=bool(body.stream) or bool(stops) or top is not None,
            top=top,
            schema=schema,
            timeout=self.settings.request_timeout,
        )
        return Plan(choices, job, sum(len(ids) for ids, _ in prompts), stops=stops, continues=continues)

    def _new_tokens(self, prompt_tokens: int, max_tokens: int | None) -> int:
        limit = self.max_length
        new = self.settings.max_new_tokens if max_tokens is None else max_tokens
        if limit is not None and max_tokens is None:
            new = max(1, min(new, limit - prompt_tokens))
        if limit is not None and prompt_tokens + new > limit:
            raise refused(
                f"This model's maximum context length is {limit} tokens. However, you requested {prompt_tokens + new} tokens "
                f"({prompt_tokens} in the prompt, {new} in the completion). Shorten the prompt or lower `max_tokens`.",
                "max_tokens" if prompt_tokens < limit else None,
                "context_length_exceeded",
            )
        return new


def _stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or ())


def _many(prompt: Any) -> list[Any]:
    """The prompts, each text or ids."""
    is_one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
    return [prompt] if is_one else prompt
