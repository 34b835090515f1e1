"""Declarations: is what is used what config.json, generation_config.json, the tokenizer and the family's table say?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from apd.config import APDConfig
from apd.generation.arguments import Resolver
from apd.inspection.canvases import CheckedDrafter
from apd.inspection.evidence import described_token
from apd.inspection.readings import describe
from apd.inspection.report import Finding
from apd.inspection.stored import Stored
from apd.models.chat_turns import ChatTurns
from apd.models.checks import check_vocabularies
from apd.models.masked_lm import MaskedLMDrafter
from apd.models.retokenized import Language
from apd.models.verifier import CausalVerifier
from apd.sampler import APDSampler
from apd.strategies import LeftToRight

_INSTRUCT = re.compile(r"instruct|chat|(?<![a-z])it(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Ends:
    """How answers end and rows are padded.

    Attributes:
        stop_token_ids: the stop tokens that are used.
        pad_token_id: the pad token that is used, if any.
        refusal: the error where the stored ids cannot be used at all.
        of_chat: the token that ends an assistant's text in the tokenizer's chat template, if it is known.
    """

    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    refusal: str = ""
    of_chat: int | None = None

    @classmethod
    def of(cls, sampler: APDSampler) -> Ends:
        tokenizer = sampler.tokenizer
        turns = None if tokenizer is None else ChatTurns.of(tokenizer)
        of_chat = None if turns is None else turns.stop_token_id(Language(tokenizer))
        try:
            used = Resolver(sampler, LeftToRight(1), APDConfig())
        except (ValueError, TypeError) as error:
            return cls(refusal=str(error), of_chat=of_chat)
        return cls(tuple(used.stop_token_ids), used.generation.pad_token_id, of_chat=of_chat)


def declarations(sampler: APDSampler, drafter: CheckedDrafter, stored: Stored) -> list[Finding]:
    """What is declared of a drafter and its tokenizer."""
    ends = Ends.of(sampler)
    found = [
        _family(drafter, stored),
        _shift(drafter, stored),
        *_attention(drafter, stored),
        mask_token(drafter, stored, sampler.tokenizer),
        _stops(ends, stored, sampler.tokenizer, are_usual=not isinstance(drafter, MaskedLMDrafter)),
        _pad(ends, drafter.mask_token_id, sampler.tokenizer),
        _chat(ends, stored, sampler.tokenizer),
        _vocabulary("vocabulary", drafter.vocab_size, sampler.tokenizer),
        _dtype("dtype", drafter.model, stored),
        _length("max length", drafter.max_length, stored),
    ]
    return [each for each in found if each is not None]


def verifier_declarations(
    sampler: APDSampler, verifier: CausalVerifier, stored: Stored, tokenizer: Any
) -> Iterator[Finding]:
    """What is declared of a verifier.

    Args:
        tokenizer: the verifier's own; `None` if it is not known.
    """
    drafter: Any = sampler.drafter
    is_own = verifier.model is drafter.model
    slow = verifier.way == "no cache"
    yield Finding(
        "verifier: way", f'"{verifier.way}"', "a way with a cache", "not known" if slow else "ok",
        "Its passes compute whole rows, which grows with the row's length. A Qwen or Llama verifies faster." if slow else "",
    )  # fmt: skip
    if is_own:
        yield Finding("verifier: ids", "the drafter's own", "the drafter's", "ok")
        return
    yield _ids(sampler, drafter, verifier, tokenizer)
    yield _dtype("verifier: dtype", verifier.model, stored)
    yield _length("verifier: length", verifier.max_length, stored)


def _ids(sampler: APDSampler, drafter: Any, verifier: CausalVerifier, tokenizer: Any) -> Finding:
    name, known = "verifier: ids", sampler.tokenizer is not None and tokenizer is not None
    try:
        shared = check_vocabularies(
            drafter.vocab_size,
            verifier.vocab_size,
            sampler.tokenizer if known else None,
            tokenizer if known else None,
            mask_token_id=drafter.mask_token_id,
        )
    except ValueError as error:
        return differing_ids(str(error))
    advice = "" if known else "Without both tokenizers only the sizes of the vocabularies are compared."
    return Finding(name, f"{shared} shared", "the drafter's", "ok" if known else "not known", advice)


def differing_ids(error: str) -> Finding:
    """The finding for a verifier that does not have the drafter's ids."""
    advice = error if "strategy=" in error else f'{error} strategy="checked" takes a verifier of any vocabulary.'
    return Finding("verifier: ids", "differ", "the drafter's", "problem", advice)


def _family(drafter: CheckedDrafter, stored: Stored) -> Finding:
    name, used = "family", type(drafter.model).__name__
    if not stored.is_known:
        return Finding(
            name, used, "?", "not known",
            "The model's config.json is not at hand, so nothing can be compared with it. Load the drafter by its path.",
        )  # fmt: skip
    if stored.spec is None:
        return Finding(
            name, used, f"model_type {stored.config.get('model_type')!r}", "not known",
            "config.json names no family that is known here, so all that was declared by `spec=` rests on it alone.",
        )  # fmt: skip
    spec = stored.spec
    fits = isinstance(drafter.model, spec.model_class)
    return Finding(
        name, used, f"{spec.model_class.__name__} ({spec.name})", "ok" if fits else "problem",
        "" if fits else f"config.json names the family {spec.name!r}. Leave out `spec=`, or give that of the checkpoint.",
    )  # fmt: skip


def _shift(drafter: CheckedDrafter, stored: Stored) -> Finding:
    name, used = "logit shift", str(drafter.logit_shift)
    if stored.spec is None:
        return Finding(name, used, "?", "not known", "Only `spec=` says at which row a token is predicted.")
    fits = drafter.logit_shift == stored.spec.logit_shift
    return Finding(
        name, used, f"{stored.spec.logit_shift} ({stored.spec.name})", "ok" if fits else "problem",
        "" if fits else f"The family {stored.spec.name!r} that config.json names predicts token i at row i"
        f"{'-1' if stored.spec.logit_shift else ''}. Leave out `spec=`, or give logit_shift={stored.spec.logit_shift}.",
    )  # fmt: skip


def _attention(drafter: CheckedDrafter, stored: Stored) -> Iterator[Finding]:
    used, spec = drafter.attention, stored.spec
    if spec is None:
        yield Finding("attention", describe(used), "?", "not known", "Only `spec=` says which columns see each other.")
        return
    same = (used.kind, used.anchored) == (spec.attention, spec.anchored)
    kind = f"{spec.attention}{' (anchored)' if spec.anchored else ''} ({spec.name})"
    yield Finding(
        "attention", f"{used.kind}{' (anchored)' if used.anchored else ''}", kind, "ok" if same else "problem",
        "" if same else f"Columns of the family {spec.name!r} see each other in another way. Leave out `spec=`.",
    )  # fmt: skip
    if spec.attention == "full" and used.block_size is None:
        return
    try:
        size, remedy = spec.attention_of(stored.config, None).block_size, ""
    except (ValueError, TypeError) as error:
        size, remedy = None, str(error)
    source = f"`{spec.block_field}` in config.json" if spec.block_field in stored.config else f"family {spec.name!r}"
    if size is None:
        yield Finding("block size", str(used.block_size), "?", "not known", remedy or "No file says it.")
        return
    fits = used.block_size == size
    yield Finding(
        "block size", str(used.block_size), f"{size} ({source})".replace("`", ""), "ok" if fits else "problem",
        "" if fits else f"It must be the one that the model was trained with, {size} according to {source}. Leave out "
        f"`block_size`, or give {size}.",
    )  # fmt: skip


def mask_token(drafter: CheckedDrafter, stored: Stored, tokenizer: Any) -> Finding:
    """Whether the mask token is the one that the files name."""
    name, used = "mask token", drafter.mask_token_id
    spec, of_tokenizer = stored.spec, getattr(tokenizer, "mask_token_id", None)
    sources = {
        "config.json": stored.config.get(spec.mask_field if spec else "mask_token_id"),
        "the tokenizer": of_tokenizer,
        "the family": spec.mask_token_id if spec else None,
    }
    if spec and (spec.mask_token_id or 0) >= drafter.vocab_size:  # a checkpoint of another size, such as a small copy
        del sources["the family"]
    said = {source: token for source, token in sources.items() if token is not None}
    shown = described_token(used, tokenizer)
    if said:
        source, expected = next(iter(said.items()))
        if used != expected:
            return Finding(
                name, shown, f"{described_token(expected, tokenizer)}, {source}", "problem",
                f"The mask token is {expected} according to {source}. Leave out `mask_token_id`, or give "
                f"{expected}.",
            )  # fmt: skip
    near = [f"{token} ({source})" for source, token in said.items() if source != "the family" or len(said) == 1]
    expected_text = ", ".join(near) or "?"
    is_word = is_ordinary(used, tokenizer)
    if is_word and of_tokenizer not in (None, used):
        return Finding(
            name, shown, expected_text, "problem",
            f"Id {used} is an ordinary word of the tokenizer, whose mask token is {of_tokenizer}. Correct config.json, or give "
            f"mask_token_id={of_tokenizer}.",
        )  # fmt: skip
    if is_word and not said:
        return Finding(
            name, shown, expected_text, "problem",
            f"Id {used} is an ordinary word of the tokenizer. Give the id with which the model was trained as `mask_token_id`.",
        )  # fmt: skip
    if not said:
        return Finding(name, shown, "?", "not known", "No file names the mask token.")
    if of_tokenizer not in (None, used):
        return Finding(
            name, shown, expected_text, "not known",
            f"config.json and the tokenizer name different mask tokens; {used} is used. See what the weights say.",
        )  # fmt: skip
    if is_word:
        return Finding(
            name, shown, expected_text, "not known", f"Id {used} is an ordinary word of the tokenizer. See what the weights say."
        )  # fmt: skip
    return Finding(name, shown, expected_text, "ok")


def is_ordinary(token: int, tokenizer: Any) -> bool:
    """True if the id is a word of the tokenizer that is neither special nor added."""
    if tokenizer is None or not 0 <= token < len(tokenizer) or tokenizer.convert_ids_to_tokens(token) is None:
        return False
    return token not in tokenizer.all_special_ids and token not in getattr(tokenizer, "added_tokens_decoder", {})


def _stops(ends: Ends, stored: Stored, tokenizer: Any, *, are_usual: bool) -> Finding:
    """Whether the stop tokens are those that the files name. Files of a masked LM often name none (`are_usual=False`)."""
    name, used = "stop tokens", ends.stop_token_ids
    shown = ", ".join(described_token(token, tokenizer) for token in used) or "none"
    others = (getattr(tokenizer, "eos_token_id", None), ends.of_chat)
    named = {*stored.stop_token_ids, *(token for token in others if token is not None)}
    expected = ", ".join(described_token(token, tokenizer) for token in sorted(named)) or "?"
    if ends.refusal:
        return Finding(name, "refused", expected, "problem", ends.refusal)
    if not used:
        is_unknown = not named and (tokenizer is None or not are_usual)
        separator = None if are_usual else getattr(tokenizer, "sep_token_id", None)
        text_end = "" if separator is None else f"; {described_token(separator, tokenizer)} ends a text"
        return Finding(
            name, shown, expected, "not known" if is_unknown else "problem",
            "No answer ends before its limit. Set `eos_token_id` in generation_config.json, or give it to "
            f"generate(){text_end}.",
        )  # fmt: skip
    together = sorted({*used, *named})
    if ends.of_chat is not None and ends.of_chat not in used:
        return Finding(
            name, shown, expected, "problem",
            f"The chat template ends an answer with {described_token(ends.of_chat, tokenizer)}, which is no stop token: chats "
            f"go on behind their end. Give eos_token_id={together}.",
        )  # fmt: skip
    if missing := sorted(named - set(used)):
        words = ", ".join(described_token(token, tokenizer) for token in missing)
        return Finding(
            name, shown, expected, "not known",
            f"Some file names {words}, too, which ends no answer here. Give eos_token_id={together} if it should.",
        )  # fmt: skip
    return Finding(name, shown, expected, "ok")


def _pad(ends: Ends, mask: int, tokenizer: Any) -> Finding | None:
    name, used, expected = "pad token", ends.pad_token_id, "not the mask token"
    if ends.refusal:
        return None
    if used is None:
        return Finding(name, "none", "a stop token pads", "ok")
    shown = described_token(used, tokenizer)
    if used == mask:
        return Finding(
            name, shown, expected, "problem",
            "The mask token pads rows, too: a prompt that is padded is refused without `attention_mask`. Set another "
            "`pad_token_id`.",
        )  # fmt: skip
    advice = ""
    if used in ends.stop_token_ids:
        advice = "It is a stop token, too: give `attention_mask` with padded prompts."
    return Finding(name, shown, expected, "ok", advice)


def _chat(ends: Ends, stored: Stored, tokenizer: Any) -> Finding:
    name = "chat template"
    if tokenizer is None:
        return Finding(name, "no tokenizer", "?", "not known", "Without a tokenizer there is no text.")
    if not getattr(tokenizer, "chat_template", None):
        named = _INSTRUCT.search(stored.path.rstrip("/").rsplit("/", 1)[-1])
        if named:
            return Finding(
                name, "none", f"one ({named[0]!r} in the name)", "problem",
                "An instruct model answers chats, and its tokenizer files have no template. Fetch chat_template.jinja or "
                "tokenizer_config.json again, or set `tokenizer.chat_template`.",
            )  # fmt: skip
        return Finding(name, "none", "none for a base model", "ok")
    if ChatTurns.of(tokenizer) is None:
        return Finding(
            name, "there", "turns of a chat", "not known",
            "The template refuses a plain chat of three turns, or changes its texts. Look at what "
            "`tokenizer.apply_chat_template` gives.",
        )  # fmt: skip
    end = "no special token" if ends.of_chat is None else described_token(ends.of_chat, tokenizer)
    return Finding(name, f"there, ends with {end}", "turns of a chat", "ok")


def _vocabulary(name: str, rows: int, tokenizer: Any) -> Finding:
    if tokenizer is None:
        return Finding(name, f"{rows} rows", "?", "not known", "There is no tokenizer to compare with.")
    size = Language(tokenizer).size
    fits = size <= rows
    return Finding(
        name, f"{rows} rows", f"at least {size} ids", "ok" if fits else "problem",
        "" if fits else f"The tokenizer has ids up to {size - 1} that the model has no rows for: it is another model's.",
    )  # fmt: skip


def _dtype(name: str, model: PreTrainedModel, stored: Stored) -> Finding:
    used = str(model.dtype).removeprefix("torch.")
    named = stored.config.get("dtype") or stored.config.get("torch_dtype")
    if not isinstance(named, str):
        return Finding(name, used, "?", "ok")
    if model.dtype == torch.float16 and named != "float16":
        return Finding(
            name, used, f"{named} is stored", "not known",
            f"float16 may overflow in a model that was trained in {named}. Give dtype={named!r} if answers look wrong.",
        )  # fmt: skip
    return Finding(name, used, f"{named} is stored", "ok")


def _length(name: str, used: int | None, stored: Stored) -> Finding:
    named = stored.config.get("max_position_embeddings") or stored.config.get("max_sequence_length")
    expected = "?" if named is None else f"{named} positions"
    return Finding(name, "no limit" if used is None else f"{used} tokens", expected, "ok")


def mask_candidates(drafter: CheckedDrafter, stored: Stored, tokenizer: Any) -> list[int]:
    """Ids that may be the mask token: those that a file names, words with "mask" in them, and a few unused ids."""
    spec = stored.spec
    named = [stored.config.get(spec.mask_field if spec else "mask_token_id"), spec.mask_token_id if spec else None]
    size = drafter.vocab_size
    if tokenizer is not None:
        named.append(tokenizer.mask_token_id)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        named += [token for token, word in added.items() if "mask" in str(word).lower()]
        named += _few(sorted(set(tokenizer.all_special_ids)))
        named += _few(range(Language(tokenizer).size, size))
    known = [token for token in named if isinstance(token, int) and 0 <= token < size]
    return list(dict.fromkeys(known))


def _few(ids: Sequence[int]) -> list[int]:
    """The first two and the last."""
    return [*ids[:2], *ids[2:][-1:]]
