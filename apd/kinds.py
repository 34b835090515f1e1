"""Kinds of values (a whole number, text, a list of ids, …), and a check of many fields against their kinds."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        name: the kind in words, behind "must be".
        fits: whether a value is of the kind.
        remedy: a sentence that ends the error message.
    """

    name: str
    fits: Callable[[Any], bool]
    remedy: str = ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple, set)) and all(map(fits, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_NUMBER = "Give the number itself; text is not converted."
_IDS = "`tokenizer.convert_tokens_to_ids` gives the ids of tokens."

WHOLE = Kind("a whole number", _is_whole, _NUMBER)
REAL = Kind("a number", _is_real, _NUMBER)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("text", _is_text)
TEXTS = Kind("a text or a list of texts", lambda value: _is_text(value) or _is_list(value, _is_text))
ID = Kind("a token id", _is_whole, _IDS)
IDS = Kind("a token id or a list of them", lambda value: _is_whole(value) or _is_list(value, _is_whole), _IDS)
ID_LIST = Kind("a list of token ids", lambda value: _is_list(value, _is_whole), _IDS)
OBJECT = Kind("an object with named fields", lambda value: isinstance(value, Mapping))

#: Fields of a generation configuration that work here. `bad_words_ids` and `sequence_bias` are checked by transformers.
GENERATION: dict[str, Kind] = {
    "max_new_tokens": WHOLE,
    "max_length": WHOLE,
    "min_new_tokens": WHOLE,
    "min_length": WHOLE,
    "max_time": REAL,
    "stop_strings": TEXTS,
    "eos_token_id": IDS,
    "pad_token_id": ID,
    "bos_token_id": ID,
    "do_sample": FLAG,
    "temperature": REAL,
    "top_k": WHOLE,
    "top_p": REAL,
    "min_p": REAL,
    "typical_p": REAL,
    "epsilon_cutoff": REAL,
    "eta_cutoff": REAL,
    "repetition_penalty": REAL,
    "no_repeat_ngram_size": WHOLE,
    "suppress_tokens": ID_LIST,
    "begin_suppress_tokens": ID_LIST,
    "renormalize_logits": FLAG,
    "num_return_sequences": WHOLE,
    "return_dict_in_generate": FLAG,
    "output_scores": FLAG,
    "output_logits": FLAG,
}


def misfit(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "") -> str | None:
    """An error message about the first value that is not of its kind; `None` if all are. Fields may be missing or `None`.

    Args:
        values: by field. Tensors and arrays count as the numbers or lists that they hold.
        kinds: by field; other fields are not checked.
        where: follows the field's name in the message, such as " in config.json".
    """
    for name, kind in kinds.items():
        value: Any = values.get(name)
        plain: Any = value.tolist() if hasattr(value, "tolist") else value
        if plain is not None and not kind.fits(plain):
            return f"`{name}`{where} must be {kind.name}, got {value!r:.100}. {kind.remedy}".rstrip()
    return None
