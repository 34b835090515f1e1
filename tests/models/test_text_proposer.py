"""`TextProposer`: guesses from models that speak another language than the drafter."""

import dataclasses
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import left_padded
from states import state_of
from thinned import thinned
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tongues import CHAT, EXACT, KINDS, OTHER_CHAT, TEXTS, Oracle, as_tokenizer, letters, random_lm, tokenizer_of
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from apd import APDSampler
from apd.decoding.noise import DRAFT, keyed_gumbel
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import FixedWindow
from apd.included.tasks import EXAMPLE_PROMPTS
from apd.models.chat_turns import ChatTurns
from apd.models.loading import as_drafter
from apd.models.retokenized import Language
from apd.models.text_proposer import TextProposer
from apd.strategies import Checked, LeftToRight

GREEDY = Sampling(LogitsProcessorList(), greedy=True)


def rows_of(committed: Sequence[Sequence[int]], room: int = 40, prompts: int = 0) -> DecodeState:
    """Rows with these committed tokens, padded on the left, of which the first `prompts` are given, and masks behind."""
    width = max(map(len, committed))
    tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) + [2] * room for ids in committed], dtype=torch.int64)
    padding = torch.tensor([width - len(ids) for ids in committed])
    decided = torch.arange(width + room) < width
    return state_of(tokens, decided.expand_as(tokens), prompt_end=padding + prompts, padding=padding)


def counting() -> Any:
    """What a proposer uses of a `ModelPair`: the count of forwards."""
    return SimpleNamespace(verifier_forwards=0)


def guess(
    session: Any, state: DecodeState, k: int, sampling: Sampling = GREEDY, *, pair: Any = None
) -> list[list[int]]:
    """The guesses of each row before the first −1; behind it there are only −1s."""
    guesses = session.propose(state, FixedWindow(k).window(state), None, pair or counting(), sampling)
    assert guesses.dtype == torch.int64 and guesses.shape[0] == len(state.rows)
    found = []
    for row in guesses.tolist():
        n = row.index(-1) if -1 in row else len(row)
        assert set(row[n:]) <= {-1}
        found.append(row[:n])
    return found


def shared_text(text: str, *kinds: str) -> str:
    """The beginning of a text that tokenizers of all these kinds write as it is."""
    for _ in range(10):
        before = text
        for language in (Language(tokenizer_of(kind)) for kind in kinds):
            ids = language.encode(text).ids
            known = next((i for i, token in enumerate(ids) if token in language.special_ids), len(ids))
            text = language.text(ids[:known], special=True)
        if text == before:
            return text
    return ""


@pytest.mark.parametrize("proposer_kind", thinned(KINDS))
@pytest.mark.parametrize("drafter_kind", KINDS)
def test_a_model_that_says_the_same_text_guesses_the_drafters_tokens(drafter_kind: str, proposer_kind: str) -> None:
    drafter, right, most = tokenizer_of(drafter_kind), 0, 0
    for text in (TEXTS[0], TEXTS[3], TEXTS[9]):
        text = shared_text(text, drafter_kind, proposer_kind)
        ids = [*drafter(text, add_special_tokens=False)["input_ids"], drafter.eos_token_id]
        proposer = TextProposer(Oracle(tokenizer_of(proposer_kind), text), tokenizer_of(proposer_kind), drafter)
        starts = [n for n in range(1, len(ids)) if n % 7 == 1]
        if not starts:
            continue
        state = rows_of([ids[:n] for n in starts])
        for n, found in zip(starts, guess(proposer.open(state), state, 6), strict=True):
            common = next((i for i, (a, b) in enumerate(zip(found, ids[n:], strict=False)) if a != b), len(found))
            right, most = right + common, most + len(ids[n : n + 6])
            assert common == len(found), (text, n, found)
    # Words that end before a token of the proposer does are unknown to it, or are not what it would write.
    assert right >= (0.9 if {drafter_kind, proposer_kind} <= set(EXACT) else 0.3) * most


@pytest.mark.parametrize("drafter_kind", thinned(KINDS))
def test_guesses_of_random_models_are_tokens_and_come_from_the_cache_unchanged(drafter_kind: str) -> None:
    drafter, rng = tokenizer_of(drafter_kind), random.Random(drafter_kind)
    usable = set(range(len(drafter))) - Language(drafter).special_ids | {drafter.eos_token_id}
    num_found = 0
    for kind in KINDS:
        proposer = TextProposer(random_lm(kind), tokenizer_of(kind), drafter)
        assert proposer.is_cached
        texts = rng.sample(TEXTS, 2)
        rows = [drafter(text, add_special_tokens=False)["input_ids"][: rng.randrange(1, 20)] for text in texts]
        kept = proposer.open(rows_of(rows))
        for _ in range(2):
            state = rows_of(rows)
            found = guess(kept, state, 3)
            assert found == guess(proposer.open(state), state, 3)
            assert {token for tokens in found for token in tokens} <= usable
            num_found += sum(map(len, found))
            # What is committed agrees with some of the guess, takes another turn, or is taken back.
            for row, tokens in zip(rows, found, strict=True):
                del row[max(1, len(row) - rng.choice([0, 0, 3])) :]
                row += [token for token in tokens[: rng.randrange(6)] if token != drafter.eos_token_id]
                row += [rng.choice(sorted(usable - {drafter.eos_token_id})) for _ in range(rng.randrange(2))]
    assert num_found or drafter_kind == "word_level"  # random text has no known words


def test_a_row_is_guessed_alike_in_any_batch() -> None:
    drafter = tokenizer_of("byte_bpe")
    proposer = TextProposer(random_lm("unigram"), tokenizer_of("unigram"), drafter)
    rows = [drafter(text)["input_ids"][:length] for text, length in zip(TEXTS, (7, 30, 12, 21), strict=False)]
    alone = [guess(proposer.open(rows_of([row])), rows_of([row]), 6)[0] for row in rows]
    session = proposer.open(rows_of(rows[:3]))
    assert guess(session, rows_of(rows[:3]), 6) == alone[:3]
    session.select(torch.tensor([2, 0]))
    assert guess(session, rows_of([rows[2], rows[0]]), 6) == [alone[2], alone[0]]
    state = rows_of([rows[2], rows[0], rows[3], rows[1]])
    session.join(state)
    assert guess(session, state, 6) == [alone[2], alone[0], alone[3], alone[1]]


def test_rows_that_are_done_and_columns_behind_an_end_get_no_guess() -> None:
    drafter = tokenizer_of("byte_bpe")
    proposer = TextProposer(random_lm("byte_bpe"), drafter, drafter)
    ids = drafter(TEXTS[0])["input_ids"][:9]
    state = rows_of([ids, ids])
    state = dataclasses.replace(state, end=state.end - torch.tensor([0, 37]))
    first, second = guess(proposer.open(state), state, 5)
    assert len(first) == 5 and second == first[:3]
    state = dataclasses.replace(state, done=torch.tensor([True, False]))
    assert guess(proposer.open(state), state, 5) == [[], first[:3]]


@pytest.mark.parametrize("kind", KINDS)
def test_any_prompt_is_continued_without_an_error(kind: str) -> None:
    rng = random.Random(kind)
    proposer = TextProposer(random_lm(kind), tokenizer_of(kind), tokenizer_of("sentencepiece_bpe"))
    size = proposer.drafter_language.size
    rows = [
        [],
        [0],
        [3, 3],
        [1] * 5,
        *([rng.randrange(size + 2) for _ in range(rng.randrange(1, 30))] for _ in range(12)),
    ]
    state = rows_of(rows)
    guess(proposer.open(state), state, 4)


def test_half_a_character_is_left_to_the_drafters_tokens() -> None:
    drafter = tokenizer_of("byte_bpe")
    text = "fox 😀 dog"
    ids = drafter(text)["input_ids"]
    for kind in EXACT:
        proposer = TextProposer(Oracle(tokenizer_of(kind), text), tokenizer_of(kind), drafter)
        for n in range(2, len(ids)):
            state = rows_of([ids[:n]])
            assert guess(proposer.open(state), state, 5) == [[*ids, 1][n : n + 5]], (kind, n)


def test_tokenizers_written_in_python_speak_too() -> None:
    slow, fast, text = letters(), tokenizer_of("byte_bpe"), "the quick fox doesn't jump"
    for drafter, speech in ((slow, fast), (fast, slow), (slow, slow)):
        ids = [*drafter(text, add_special_tokens=False)["input_ids"], drafter.eos_token_id]
        proposer = TextProposer(Oracle(speech, text), speech, drafter)
        state = rows_of([ids[:n] for n in range(1, len(ids))])
        for n, found in enumerate(guess(proposer.open(state), state, 5), 1):
            assert found == ids[n : n + 5]


def test_special_tokens_of_the_drafter_are_not_read() -> None:
    drafter = tokenizer_of("byte_bpe")
    seen = []
    oracle = Oracle(tokenizer_of("unigram"), "the quick fox")

    def model(input_ids: Tensor) -> Any:
        seen.append(input_ids[0].tolist())
        return oracle(input_ids)

    proposer = TextProposer(model, tokenizer_of("unigram"), drafter)
    ids = drafter("the quick")["input_ids"]
    state = rows_of([[1, 0, *ids]])
    assert guess(proposer.open(state), state, 3) == [[*drafter(" fox")["input_ids"], 1][:3]]
    assert seen[0] == tokenizer_of("unigram")("the quick")["input_ids"]


def test_translate_gets_all_the_text_and_says_what_the_proposer_reads() -> None:
    drafter = tokenizer_of("byte_bpe")
    seen = []

    def translate(text: str) -> str:
        seen.append(text)
        return "the quick"

    proposer = TextProposer(
        Oracle(tokenizer_of("unigram"), "the quick fox"), tokenizer_of("unigram"), drafter, translate=translate
    )
    state = rows_of([[1, *drafter("dog")["input_ids"]]])
    found = guess(proposer.open(state), state, 9)
    assert seen == ["<eos>dog"]
    assert found == [[*drafter(" fox")["input_ids"], 1]]


def chatting(kind: str, template: str) -> Any:
    tokenizer = as_tokenizer(Tokenizer.from_str(tokenizer_of(kind).backend_tokenizer.to_str()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_is_translated_into_the_proposers_template() -> None:
    drafter, speech = chatting("byte_bpe", CHAT), chatting("unigram", OTHER_CHAT)
    turns = ChatTurns.of(drafter)
    assert turns is not None
    said = ["the fox", "the dog", "the lazy fox"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    for chat in (messages, messages[:1], [{"role": "system", "content": "a b"}, *messages]):
        text = drafter.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert turns.read(text + "quick <eos>") == (chat, "quick <eos>")
    assert turns.read("no chat") is None

    text = "[the fox]the dog;[the lazy fox]the quick dog"
    proposer = TextProposer(Oracle(speech, text), speech, drafter)
    ids = drafter(drafter.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "the")[
        "input_ids"
    ]
    state = rows_of([ids])
    assert guess(proposer.open(state), state, 9) == [[*drafter(" quick dog")["input_ids"], drafter.eos_token_id]]
    # The proposer's template takes no system message, so it reads the text without special tokens.
    chat = [{"role": "system", "content": "a b"}, *messages]
    text = proposer.translate(drafter.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    assert text == "a bthe foxthe dogthe lazy fox"


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "always this",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_without_turns_leaves_the_text_as_it_is(template: str) -> None:
    drafter, speech = chatting("byte_bpe", template), chatting("unigram", template)
    assert ChatTurns.of(drafter) is None
    proposer = TextProposer(Oracle(speech, "the quick fox"), speech, drafter)
    assert proposer.translate("<|user|>the<eos> quick") == "the quick"
    assert proposer.stop_token_id == drafter.eos_token_id


@pytest.mark.parametrize(
    "warpers", [[TemperatureLogitsWarper(0.7)], [TopKLogitsWarper(20), TemperatureLogitsWarper(1.3)]]
)
def test_with_temperature_a_model_of_the_same_language_guesses_what_is_drawn(warpers: list[Any]) -> None:
    """Guesses are the argmax of the model's scores and the drafter's noise."""
    tokenizer, network = tokenizer_of("byte_bpe"), random_lm("byte_bpe")
    words = torch.tensor(
        [i for string, i in tokenizer.get_vocab().items() if string[0] == "Ġ" and string[1:].isascii()]
    )

    def model(input_ids: Tensor) -> Any:
        """A model that writes words only, of which each is a token wherever it stands."""
        logits = network(input_ids=input_ids).logits[..., : len(tokenizer)]
        return SimpleNamespace(logits=torch.full_like(logits, -1e9).index_copy(-1, words, logits[..., words]))

    sampling = Sampling(LogitsProcessorList(warpers), greedy=False)
    ids = tokenizer(TEXTS[0])["input_ids"][:9]
    state = dataclasses.replace(rows_of([ids] * 6), seeds=torch.arange(6))
    found = guess(TextProposer(model, tokenizer, tokenizer).open(state), state, 4, sampling)
    assert len(set(map(tuple, found))) == 6
    for seed, guessed in enumerate(found):
        row = list(ids)
        for _ in range(4):
            scores = sampling.warp(model(torch.tensor([row])).logits[:, -1:].float())
            tokens = torch.arange(len(tokenizer)) if scores.ids is None else scores.ids
            noise = keyed_gumbel(torch.tensor([seed]), torch.tensor([[len(row)]]), DRAFT, tokens)
            row.append(int(scores.tokens((scores.values + noise).argmax(-1))))
        assert guessed == row[len(ids) :]


def test_healing_lets_a_first_token_begin_before_the_frontier() -> None:
    backend = Tokenizer(BPE({byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevelDecoder()
    drafter, speech = as_tokenizer(backend), tokenizer_of("unigram")  # a drafter that writes bytes
    whole = speech("the fox dog", add_special_tokens=False)["input_ids"]
    part = drafter("the fox d")["input_ids"]
    assert speech("the fox d", add_special_tokens=False)["input_ids"] != whole[: len(whole) - 1]

    class Strict(Oracle):
        """Knows its text in one tokenization only."""

        def next(self, ids: list[int]) -> int:
            return [*self.ids, 1][len(ids)] if ids == self.ids[: len(ids)] else self.tokenizer.unk_token_id

    state = rows_of([part])
    found = {
        heal: guess(TextProposer(Strict(speech, "the fox dog"), speech, drafter, heal=heal).open(state), state, 4)[0]
        for heal in (True, False)
    }
    assert drafter.decode([*part, *found[True]]) == "the fox dog<eos>"
    assert found[False] == []


def test_rows_longer_than_the_model_reads_are_read_from_their_end() -> None:
    drafter = tokenizer_of("byte_bpe")
    longest = []
    model = random_lm("byte_bpe")

    def counting(input_ids: Tensor) -> Any:
        longest.append(input_ids.shape[1])
        return model(input_ids=input_ids)

    proposer = TextProposer(counting, drafter, drafter, max_length=40)
    ids = drafter(" ".join(TEXTS[:3]))["input_ids"]
    for n in range(25, 60, 5):
        state = rows_of([ids[:n]])
        assert guess(proposer.open(state), state, 4)[0]
    assert 30 <= max(longest) <= 40
    assert len(random_lm("byte_bpe", max_position_embeddings=24).config.to_dict())
    short = TextProposer(random_lm("byte_bpe", max_position_embeddings=24), drafter, drafter)
    assert short.max_length == 24
    state = rows_of([ids])
    guess(short.open(state), state, 60)


def sliding_lm(window: int | None) -> MistralForCausalLM:
    """A random model in float64 that attends to the last `window` tokens in each of its two layers."""
    config = MistralConfig(
        vocab_size=len(tokenizer_of("unigram")),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        initializer_range=0.4,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MistralForCausalLM(config).double().eval().requires_grad_(False)


def test_behind_a_sliding_window_a_cached_model_guesses_what_it_does_without_a_cache() -> None:
    drafter, speech, rng = tokenizer_of("byte_bpe"), tokenizer_of("unigram"), random.Random(1)
    models = {window: sliding_lm(window) for window in (4, None)}
    cached = TextProposer(models[4], speech, drafter)
    assert cached.is_cached
    # A bare callable is run over whole rows.
    whole, wide = (
        TextProposer(lambda input_ids, each=each: each(input_ids=input_ids), speech, drafter)
        for each in models.values()
    )
    assert not whole.is_cached
    ids = [drafter(text)["input_ids"] for text in TEXTS[:2]]
    rows = [ids[0][:9], ids[1][:20]]
    session, are_wider_alike = cached.open(rows_of(rows)), []
    for _ in range(6):
        state = rows_of(rows)
        found = guess(session, state, 5)
        assert found == guess(whole.open(state), state, 5)
        are_wider_alike.append(found == guess(wide.open(state), state, 5))
        # The guess is taken, or the row goes back behind where the window began, and on in another way.
        for row, tokens in zip(rows, found, strict=True):
            row += [token for token in tokens if token != drafter.eos_token_id]
            del row[max(1, len(row) - rng.choice([0, 1, 8])) :]
            row += rng.choice(ids)[: rng.randrange(3)]
    assert not all(are_wider_alike)  # the window matters


def test_every_pass_over_the_rows_is_a_verifier_forward() -> None:
    drafter, speech = tokenizer_of("byte_bpe"), tokenizer_of("unigram")
    ids = [drafter(text)["input_ids"] for text in TEXTS[:2]]
    state, widths = rows_of([ids[0][:9], ids[1][:20]]), []
    network = random_lm("unigram")

    def model(input_ids: Tensor) -> Any:
        widths.append(input_ids.shape[1])
        return network(input_ids=input_ids)

    one_by_one, together = TextProposer(model, speech, drafter), TextProposer(network, speech, drafter)
    assert together.is_cached and not one_by_one.is_cached
    counts = []
    for proposer in (one_by_one, together):
        pair, session = counting(), proposer.open(state)
        guess(session, state, 5, pair=pair)
        counts.append(pair.verifier_forwards)
        done = dataclasses.replace(state, done=torch.tensor([True, True]))
        guess(session, done, 5, pair=pair)
        assert pair.verifier_forwards == counts[-1]  # nothing to guess, no pass
    # Row by row, a pass is one forward of each row that still goes on: as many passes as the longest row has.
    assert counts[0] == counts[1]
    assert counts[0] < len(widths) <= 2 * counts[0]


def test_what_is_missing_is_named() -> None:
    tokenizer = tokenizer_of("byte_bpe")
    with pytest.raises(TypeError, match="`drafter_tokenizer` must be a tokenizer"):
        TextProposer(random_lm("byte_bpe"), tokenizer, None)
    proposer = TextProposer(random_lm("byte_bpe"), tokenizer, tokenizer, translate=lambda text: None)  # type: ignore[arg-type, return-value]
    state = rows_of([[5, 6]])
    with pytest.raises(TypeError, match="`translate` must give text, got NoneType"):
        guess(proposer.open(state), state, 2)


@pytest.mark.parametrize("drafter_kind", thinned(KINDS))
def test_checked_guesses_of_any_language_leave_the_sequential_tokens(drafter_kind: str) -> None:
    """Whatever is guessed; random networks in float64, where a tie within rounding has a probability below 1e-9 per token."""
    tokenizer = tokenizer_of(drafter_kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = type(random_lm(drafter_kind))(random_lm(drafter_kind).config).double().eval().requires_grad_(False)
    network.config.is_causal = False
    sampler = APDSampler(as_drafter(network, spec="dream", mask_token_id=2), None, tokenizer, mixture_weight=1)
    prompts = [
        tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        for text, length in zip(TEXTS, (3, 9), strict=False)
    ]
    for kind in KINDS:
        proposer = TextProposer(random_lm(kind), tokenizer_of(kind), tokenizer)
        drawing = {"do_sample": True, "temperature": 0.8} if kind in EXACT else {}
        call = {**left_padded(prompts), "max_new_tokens": 5, "seed": 5, **drawing}
        sought = sampler.generate(**call, strategy=LeftToRight(1))
        assert torch.equal(sampler.generate(**call, strategy=Checked(LeftToRight(1), proposer, 2)), sought)


def test_the_included_pair_takes_fewer_passes_with_checked_text() -> None:
    sampler = APDSampler.from_included()
    proposer = TextProposer(sampler.verifier, sampler.tokenizer, sampler.tokenizer)
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:4], return_tensors="pt", padding=True)
    call = {**inputs, "max_new_tokens": 32, "return_dict_in_generate": True}
    sought = sampler.generate(**call, strategy=LeftToRight(1))
    found = sampler.generate(**call, strategy=Checked(LeftToRight(1), proposer, 8))
    assert torch.equal(found.sequences, sought.sequences)
    assert 3 * found.drafter_forwards.sum() < sought.drafter_forwards.sum()
