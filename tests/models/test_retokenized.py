"""`Language.continuation`: tokens of text behind tokens that are committed, for every kind of tokenizer."""

import random

import pytest
from tongues import EXACT, KINDS, SPECIAL, TEXTS, tokenizer_of

from apd.models.retokenized import Language, retokenize


def is_prefix(part: list[int], whole: list[int]) -> bool:
    return part == whole[: len(part)]


def readable(language: Language, text: str) -> tuple[str, list[int]]:
    """A text as the tokenizer writes it, and its ids, up to the first unknown one."""
    ids = language.encode(text).ids
    unknown = next((i for i, token in enumerate(ids) if token in language.special_ids), len(ids))
    written = language.text(ids[:unknown], special=True)
    return (text, ids) if written == text else readable(language, written)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_cut_anywhere_goes_on_with_its_own_tokens(kind: str) -> None:
    language = Language(tokenizer_of(kind))
    for text in TEXTS:
        text, ids = readable(language, text)
        for n in range(len(ids) + 1):
            rest = text.removeprefix(language.text(ids[:n], special=True))
            found = language.continuation(ids[:n], rest, is_complete=True)
            assert found.ids == ids[n:], (text, n)
            assert found.is_whole


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_changes_no_token(kind: str) -> None:
    language = Language(tokenizer_of(kind))
    for text in TEXTS:
        text, ids = readable(language, text)
        for n in range(0, len(ids), 5):
            rest = text.removeprefix(language.text(ids[:n], special=True))
            for end in range(0, len(rest), 7):
                assert is_prefix(language.continuation(ids[:n], rest[:end]).ids, ids[n:]), (text, n, end)


@pytest.mark.parametrize("kind", EXACT)
def test_tokens_spell_the_text_behind_any_tokenization(kind: str) -> None:
    language, rng = Language(tokenizer_of(kind)), random.Random(kind)
    num_found = 0
    for text in TEXTS:
        for _ in range(12):
            start, middle = sorted(rng.sample(range(1, len(text)), 2))
            # Tokens of the characters one by one, and of pieces: seldom what the tokenizer would write.
            cuts = sorted(rng.sample(range(start), min(start, 5)))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, start], strict=True)]
            ids = [token for piece in pieces for token in language.encode(piece).ids]
            before = language.text(ids, special=True)
            found = language.continuation(ids, text[start:middle], is_complete=True)
            num_found += found.is_whole
            if found.is_whole:
                assert language.text([*ids, *found.ids], special=True) == before + text[start:middle]
            else:
                assert not found.ids
    assert num_found > 60


@pytest.mark.parametrize("kind", KINDS)
def test_no_ids_and_no_text_fail(kind: str) -> None:
    language, rng = Language(tokenizer_of(kind)), random.Random(kind)
    odd = ["", "\ufffd", "\ud83d", "a\udc80", "\x00", "\u0301", "<eos>", " <mask> x", "\u200d", "\r\n", "字" * 50]
    for _ in range(60):
        ids = [rng.randrange(-1, language.size + 3) for _ in range(rng.randrange(40))]
        for is_complete in (True, False):
            found = language.continuation(ids, rng.choice(odd) + rng.choice(TEXTS)[:9], is_complete=is_complete)
            assert all(0 <= token < language.size and token not in language.special_ids for token in found.ids)


def test_half_a_character_is_finished_byte_by_byte() -> None:
    for kind in EXACT:
        tokenizer = tokenizer_of(kind)
        language = Language(tokenizer)
        ids = language.encode("up 😀").ids
        for n in (1, 2, 3):
            assert language.continuation(ids[:-n], "😀", is_complete=True).ids == ids[-n:]
            assert language.continuation(ids[:-n], "😎👍", is_complete=True).ids[:n] != ids[-n:]
            assert language.continuation(ids[:-n], "x", is_complete=True).ids == []


def test_a_special_token_ends_a_guess() -> None:
    for kind in KINDS:
        language = Language(tokenizer_of(kind))
        ids = language.encode("the fox").ids
        for special in SPECIAL:
            found = language.continuation(ids, f" dog{special} the", is_complete=True)
            assert found.ids == language.encode("the fox dog").ids[len(ids) :]
            assert not found.is_whole


def test_where_the_tokenizer_would_write_one_token_the_text_is_spelled_all_the_same() -> None:
    language = Language(tokenizer_of("byte_bpe"))
    halves = [language.encode("the f").ids, language.encode("ox").ids]
    assert language.encode("the fox").ids != [*halves[0], *halves[1]]
    assert language.continuation(halves[0], "ox", is_complete=True).ids == halves[1]


def test_retokenize_is_the_continuation() -> None:
    tokenizer = tokenizer_of("byte_bpe")
    ids = tokenizer("the quick")["input_ids"]
    assert tokenizer.decode(retokenize(ids, " brown fo", tokenizer)) == " brown"
    assert tokenizer.decode(retokenize(ids, " brown fo", tokenizer, is_complete=True)) == " brown fo"
