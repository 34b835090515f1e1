"""Chats from one template to another: `ChatTurns` finds a conversation in the text of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apd.models.retokenized import Language

__all__ = ["ChatTurns", "Translate", "without_special_tokens"]

Translate = Callable[[str], str]


def without_special_tokens(tokenizer: Any) -> Translate:
    """A translation that leaves out the special tokens of this tokenizer, and those alone."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    named = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    special = sorted(named - {""}, key=lambda token: (-len(token), token))

    def translate(text: str) -> str:
        for token in special:
            text = text.replace(token, "")
        return text

    return translate


@dataclass(frozen=True)
class ChatTurns:
    """How a chat template writes turns: what is before, between and behind the texts of user and assistant.

    Attributes:
        start: before the first user's text, if there is no system message.
        user_end: from a user's text to the assistant's.
        assistant_end: from an assistant's text to the next user's.
        system: before a system message and between it and the first user's text; `None` if the template takes none.
    """

    start: str
    user_end: str
    assistant_end: str
    system: tuple[str, str] | None

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTurns | None:
        """The turns of a tokenizer's chat template; `None` if it has none, or one whose turns cannot be told from texts."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        texts = ["first text", "second text", "third text"]
        roles = ["user", "assistant", "user"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        parts = _rendered(tokenizer, messages)
        if parts is None or not all(parts[:3]):
            return None
        with_system = _rendered(tokenizer, [{"role": "system", "content": "zeroth text"}, *messages])
        system = None if with_system is None or not all(with_system[:2]) else (with_system[0], with_system[1])
        return cls(parts[0], parts[1], parts[2], system)

    def read(self, text: str) -> tuple[list[dict[str, str]], str] | None:
        """The messages of a text and the beginning of the assistant's answer; `None` if it is no chat."""
        messages = []
        before, found, rest = text.partition(self.start)
        if self.system is not None and self.system[0] in (before if found else text):
            # A default system message is part of `start`, so a system message is one that comes before.
            said, found, rest = text.partition(self.system[0])[2].partition(self.system[1])
            messages.append({"role": "system", "content": said})
        if not found:
            return None
        while self.user_end in rest:
            said, rest = rest.split(self.user_end, 1)
            messages.append({"role": "user", "content": said})
            if self.assistant_end not in rest:
                return messages, rest
            said, rest = rest.split(self.assistant_end, 1)
            messages.append({"role": "assistant", "content": said})
        return None

    def translator(self, tokenizer: Any, otherwise: Translate) -> Translate:
        """A translation of chats into another tokenizer's template; text that is no chat, or that the template refuses, is
        translated by `otherwise`."""

        def translate(text: str) -> str:
            if (chat := self.read(text)) is None:
                return otherwise(text)
            messages, answer = chat
            clean = [message | {"content": otherwise(message["content"])} for message in messages]
            try:
                prompt = tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=True)
            except Exception:  # templates raise what they like, e.g. where they take no system message
                return otherwise(text)
            return str(prompt) + otherwise(answer)

        return translate

    def stop_token_id(self, language: Language) -> int | None:
        """The special token with which an assistant's text ends, if it does."""
        first = language.encode(self.assistant_end).ids[:1]
        return first[0] if first and first[0] in language.special_ids else None


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> list[str] | None:
    """What a chat template writes before, between and behind the texts of messages."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise what they like, e.g. where they take no system message
        return None
    parts = []
    for message in messages:
        part, found, text = text.partition(message["content"])
        if not found:
            return None
        parts.append(part)
    return [*parts, text]
