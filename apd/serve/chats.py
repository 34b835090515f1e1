"""From the messages of a chat to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apd.generation.many import Prompt
from apd.serve.engine.errors import refused
from apd.serve.schemas import Message

_ROLES = ("system", "developer", "user", "assistant")


def prompt_of(messages: Sequence[Message], tokenizer: Any) -> Prompt:
    """The messages as a prompt: a chat where the tokenizer has a template, else the text of the only user message.

    An assistant's message at the end is continued; an empty one is as none.

    Raises:
        APIError: a message that is not text, or more messages than a model without a template can read.
    """
    chat = [_plain(message, f"messages.{i}") for i, message in enumerate(messages)]
    if chat[-1]["role"] == "assistant" and not chat[-1]["content"]:
        chat.pop()
    if not chat:
        raise refused("`messages` must have a message with text.", "messages")
    if getattr(tokenizer, "chat_template", None):
        return chat
    begun = chat.pop()["content"] if chat[-1]["role"] == "assistant" else ""
    if [message["role"] for message in chat] != ["user"]:
        raise refused(
            "This model has no chat template, so a chat must be one message of role 'user', got roles "
            f"{[message.role for message in messages]}. Use /v1/completions, or start the server with --chat-template.",
            "messages",
            "no_chat_template",
        )
    return str(chat[0]["content"] + begun)


def _plain(message: Message, where: str) -> dict[str, Any]:
    """A message as templates expect it: role and text."""
    if message.role not in _ROLES:
        raise refused(
            f"`role` must be one of {', '.join(_ROLES)}, got {message.role!r}: there are no tools here.",
            f"{where}.role",
        )
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if getattr(message, name):
            raise refused(f"`{name}` is not supported: there are no tools here.", f"{where}.{name}")
    if message.content is None and message.role != "assistant":
        raise refused(f"A message of role {message.role!r} must have `content`, got null.", f"{where}.content")
    text = message.content if isinstance(message.content, str) else _joined(message.content or [], f"{where}.content")
    role = "system" if message.role == "developer" else message.role
    named = {"name": message.name} if message.name else {}
    return {"role": role, "content": text, **named}


def _joined(parts: Sequence[dict[str, Any]], where: str) -> str:
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type")
        text = part.get("text" if kind == "text" else "refusal" if kind == "refusal" else "")
        if not isinstance(text, str):
            raise refused(
                f"Parts of `content` must be {{'type': 'text', 'text': ...}}, got type {kind!r}: this model reads text alone.",
                f"{where}.{i}",
            )
        texts.append(text)
    return "".join(texts)
