"""Models that decode without `APDSampler`: any causal LM of transformers, any OpenAI-compatible endpoint.

Both decode greedily. A causal LM makes one forward per token, which is recorded; the forwards of an endpoint are unknown.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from apd.extras import install
from apd.generation.many import Prompt, encode
from apd.models.checkpoint import Checkpoint
from apd.text import whole_text

__all__ = ["Alone", "Answer", "CausalLM", "Endpoint"]


@dataclass(frozen=True)
class Answer:
    """The part of an answer that a record stores.

    Attributes:
        index: number of the prompt.
        text: special tokens left out.
        new_tokens: up to and including the stop token; `None`: the endpoint did not report it.
        drafter_forwards: passes; `None`: unknown.
        verifier_forwards: passes of a causal LM; `None`: unknown.
        canvases: that the drafter computed; `None`: unknown.
        finish: `"stop"`, `"length"`, or the endpoint's own word.
    """

    index: int
    text: str
    new_tokens: int | None
    drafter_forwards: int | None
    verifier_forwards: int | None
    canvases: int | None
    finish: str


class Alone(Protocol):
    """A model without a drafter that can be compared with the pairs."""

    def answers(
        self, numbered: Sequence[tuple[int, Prompt]], *, batch_size: int, max_new_tokens: int
    ) -> Iterator[Answer]:
        """Yield one answer per pair of number and prompt, in any order."""
        ...


class CausalLM:
    """A causal LM of transformers: greedy, in batches padded on the left.

    Args:
        model: with `generate`.
        tokenizer: its chat template formats the messages; without one, they are joined by line breaks.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stops = _stop_ids(model, tokenizer)

    @classmethod
    def from_pretrained(cls, name: str, *, dtype: str | None = None, device_map: str | None = None) -> CausalLM:
        """Load from safetensors, without code from the checkpoint.

        Raises:
            ValueError: there is no such model, it needs code of its own, or a file is damaged.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        checkpoint = Checkpoint(name, {})
        try:
            checkpoint.refuse_adapter()
            with checkpoint.reading_tokenizer():
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            with checkpoint.reading_weights():
                model = AutoModelForCausalLM.from_pretrained(
                    name, dtype=dtype or "auto", device_map=device_map, use_safetensors=True, trust_remote_code=False
                )
        except OSError as error:
            raise ValueError(
                f"`causal_lm` must be a directory or hub id of a causal LM in safetensors, got {name!r}: {error}"
            ) from error
        return cls(model, tokenizer)

    def answers(
        self, numbered: Sequence[tuple[int, Prompt]], *, batch_size: int, max_new_tokens: int
    ) -> Iterator[Answer]:
        """Yield one answer per prompt, in order; the rows of a batch are yielded together."""
        for first in range(0, len(numbered), batch_size):
            batch = numbered[first : first + batch_size]
            rows = self._generate([self._ids(prompt) for _, prompt in batch], max_new_tokens)
            for (number, _), row in zip(batch, rows, strict=True):
                yield self._answer(number, row)

    def _ids(self, prompt: Prompt) -> list[int]:
        is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
        if is_chat and not getattr(self.tokenizer, "chat_template", None):
            prompt = "\n\n".join(message["content"] for message in prompt) + "\n"  # type: ignore[index]
        return encode(prompt, self.tokenizer)[0].tolist()

    @torch.no_grad()
    def _generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """New tokens of each row, including those after the stop token."""
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        pad = self.stops[0] if self.stops else 0  # masked in the prompt, cut behind the stop token
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # Set explicitly: omitted fields would come from the checkpoint, whose penalties would change the argmax.
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stops or None,
            pad_token_id=pad,
        )
        device = self.model.device
        out: Tensor = self.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
        return out[:, width:].tolist()

    def _answer(self, number: int, tokens: list[int]) -> Answer:
        length = next((i + 1 for i, token in enumerate(tokens) if token in self.stops), None)
        tokens = tokens[:length]
        return Answer(
            index=number,
            text=whole_text(self.tokenizer, tokens, skip_special_tokens=True),
            new_tokens=len(tokens),
            drafter_forwards=0,
            verifier_forwards=len(tokens),
            canvases=0,
            finish="length" if length is None else "stop",
        )


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Stop tokens of the checkpoint and of its tokenizer: they often differ, since a chat ends with its own token."""
    found = []
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found += [ids] if isinstance(ids, int) else list(ids or ())
    return list(dict.fromkeys(found))


class Endpoint:
    """A model behind an OpenAI-compatible `/chat/completions`, called with one prompt at a time by the official client.

    The client retries if the server is busy or fails. A key is sent only if its variable is named, so that a local
    server never sees the one in OPENAI_API_KEY; it is neither printed nor stored.

    Args:
        url: up to and including the version, such as `https://host/v1`.
        model: the name that the endpoint knows.
        api_key_env: environment variable with the key; `None`: no key is sent.
    Raises:
        ValueError: the URL holds a password or a query, or the variable, which is not shown, is not set.
        ImportError: `openai` is missing.
    """

    def __init__(self, url: str, model: str, api_key_env: str | None = None) -> None:
        check_url(url)
        self.model = model
        self._key = _key(api_key_env)
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ImportError(f"`endpoint` needs openai: {error}. Install it with: {install('bench')}.") from error
        self._client = OpenAI(base_url=url, api_key=self._key or "none")

    def answers(
        self, numbered: Sequence[tuple[int, Prompt]], *, batch_size: int, max_new_tokens: int
    ) -> Iterator[Answer]:
        """Yield one answer per prompt, in order; `batch_size` is ignored.

        Raises:
            RuntimeError: the endpoint refused a prompt or its reply cannot be read; the message names the prompt.
        """
        for number, prompt in numbered:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            yield self._ask(number, messages, max_new_tokens)

    def _ask(self, number: int, messages: Any, max_new_tokens: int) -> Answer:
        from openai import OpenAIError

        try:
            reply = self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=max_new_tokens
            )
        except OpenAIError as error:
            raise self._failed(messages, f"failed: {error}") from None
        except json.JSONDecodeError as error:
            raise self._failed(messages, f"got a reply that is no JSON: {error}") from None
        try:
            choice = reply.choices[0]
            text, finish = choice.message.content or "", choice.finish_reason
        except (AttributeError, IndexError, TypeError):
            shown = reply if isinstance(reply, str) else getattr(reply, "model_dump_json", lambda: repr(reply))()
            raise self._failed(messages, f"got a reply without choices[0].message: {shown[:200]}") from None
        usage = getattr(reply, "usage", None)
        tokens = getattr(usage, "completion_tokens", None)
        return Answer(number, text, tokens, None, None, None, finish or "unknown")

    def _failed(self, messages: Any, what: str) -> RuntimeError:
        """The error with the prompt; the key is removed in case the server repeats it."""
        if self._key:
            what = what.replace(self._key, "[key]")
        prompt = messages[-1]["content"]
        shown = prompt if len(prompt) <= 160 else f"{prompt[:80]} … {prompt[-80:]}"
        return RuntimeError(
            f"The prompt {shown!r} to {self.model} {what}. What is done is kept; the same command goes on from here."
        )


def check_url(url: str) -> None:
    """Refuse a URL with credentials or a query, because it is stored with the records.

    Raises:
        ValueError: it is not http(s), or holds a password or a query.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("`endpoint` must be a URL such as https://host/v1; what was given is none.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"`endpoint` must not hold a name, password or query, since it is stored; got one for {parts.hostname}. Put "
            "the key into an environment variable and name that with `api_key_env`."
        )


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ValueError("`api_key_env` must name an environment variable that holds the key; this one is not set.")
    return key
