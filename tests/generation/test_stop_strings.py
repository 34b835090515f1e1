"""Text of tokens: stop strings, streamed pieces and answers, whatever spells the characters.

The tokenizers are built here. In each, many characters are spelled by several tokens or spaces belong to a token's place.
"""

import functools
import random
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from apd import APDSampler
from apd.generation.stop_strings import StopStrings
from apd.models.ideal import IdealListModel
from apd.text import TextPieces, whole_text

TEXTS = [
    "Der Bär läuft.\nEr läuft weg.\n\nEnde über alles",
    "你好。今天天气很好。\n下一行：你好吗？",
    "สวัสดีครับ ยินดีต้อนรับ\nครับ",
    "🎉 done 👩‍👩‍👧 ok 🇩🇪\n🎉🎉 x",
    "नमस्ते दुनिया\nअच्छा  ठीक",
    "def f():\n    return 1\n\n  é — “ok”",
    "mixed 你 a 🎉b\nc",
]
STOPS = ["\n", "。", "好吗", "🎉", "ครับ", " x", "läuft weg", "é", "ठीक", " o", "  ", "👧", "🎉🎉", "b\nc", "한"]


def _bytes_and_words(*end: decoders.Decoder) -> Tokenizer:
    """As of Llama 2: pieces with a visible space, and a token per byte for what they cannot spell."""
    known = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = ["▁", *"abcdefinorst.:()1好", "▁x", "▁done", "re", "turn", "▁▁"]
    merges = [("▁", "x"), ("r", "e"), ("t", "u"), ("▁", "▁")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*known, *pieces, "u", "tu", "x"]))}
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return made


def _trained(model: models.Model, trainer: trainers.Trainer, split: object, decoder: decoders.Decoder) -> Tokenizer:
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = split, decoder
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


@functools.cache
def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name == "byte fallback":  # Gemma
        made = _bytes_and_words()
    elif name == "byte fallback, stripped":  # Llama 2, Mistral
        made = _bytes_and_words(decoders.Strip(" ", 1, 0))
    elif name == "byte level":  # GPT-2, Qwen, Llama 3
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made = _trained(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    elif name == "metaspace":  # T5, ALBERT
        made = _trained(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", show_progress=False),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        )
    else:  # BERT
        made = _trained(
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False),
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(cleanup=False),
        )
    is_cleaned = name == "word pieces, cleaned"
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=is_cleaned)


NAMES = ["byte fallback", "byte fallback, stripped", "byte level", "metaspace", "word pieces", "word pieces, cleaned"]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name):
    return _tokenizer(name)


def _rows(tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> list[list[int]]:
    """Texts one after another, long enough that tails are cut anywhere."""
    draw = random.Random(seed)
    joined = [" ".join(draw.choices(TEXTS, k=4)) for _ in range(count)]
    return [tokenizer(text)["input_ids"] for text in joined]


def test_a_stop_string_is_found_where_the_whole_text_has_it_first(name, tokenizer):
    draw, found, spelled = random.Random(1), 0, 0
    for row in _rows(tokenizer, 8):
        row = row[draw.randrange(len(row) // 2) :]
        while _text(tokenizer, row).startswith("\ufffd"):  # no prompt begins inside a character
            row = row[1:]
        texts = [_text(tokenizer, row[:length]) for length in range(len(row) + 1)]
        for stop in STOPS:
            first = next((length for length, text in enumerate(texts) if stop in text), len(row) + 1)
            criterion = StopStrings(stop, tokenizer)
            before = {*draw.sample(range(1, first), min(first - 1, 10)), *range(max(first - 5, 1), first)}
            assert not any(criterion(torch.tensor([row[:length]]), None) for length in before)
            if first <= len(row):
                assert criterion(torch.tensor([row[:first]]), None)
                found += 1
                spelled += texts[first - 1].endswith("\ufffd")
    assert found > 20
    assert spelled > 10 or "byte" not in name


def _text(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["byte fallback, stripped", "byte level"])
def test_what_the_prompt_ends_with_is_not_completed_by_the_next_character(name):
    """Until that is whole, a byte-fallback decoder shows none of its run: the prompt's end then comes back."""
    tokenizer = _tokenizer(name)
    criterion = StopStrings(["。", "天"], tokenizer)
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("今天。", "今天。很好"))
    assert len(answer) > len(prompt) + 2
    asked = [
        bool(criterion(torch.tensor([answer[:length]]), None)) for length in range(len(prompt) + 1, len(answer) + 1)
    ]
    assert not any(asked)
    assert criterion(torch.tensor([prompt]), None)


def test_a_token_costs_the_same_in_a_long_row():
    tokenizer, costs = _tokenizer("byte fallback"), []

    class Counting:
        def decode(self, ids, **kwargs):
            costs[-1] += len(ids)
            return tokenizer.decode(ids, **kwargs)

    ids = tokenizer("ครับ" * 60)["input_ids"]
    criterion, pieces = StopStrings("ยินดี", Counting()), TextPieces(Counting())
    for length in range(1, len(ids)):
        costs.append(0)
        criterion(torch.tensor([ids[:length]]), None)
        pieces.add(ids[length - 1 : length], last=False)
    assert max(costs[50:100]) == max(costs[-50:])


def test_streamed_pieces_join_to_the_text(tokenizer):
    draw = random.Random(2)
    for row in _rows(tokenizer, 6):
        row = row[: draw.randrange(len(row))]
        pieces, told, at = TextPieces(tokenizer, skip_special_tokens=True), "", 0
        while at < len(row):
            step = draw.choice([1, 1, 2, 5])
            told += pieces.add(row[at : at + step], last=at + step >= len(row))
            at += step
            assert "\ufffd" not in told
        assert told == whole_text(tokenizer, row, skip_special_tokens=True)


def test_text_streams_without_spaces_too(tokenizer):
    pieces, row = TextPieces(tokenizer), tokenizer("สวัสดีครับ")["input_ids"]
    told = [pieces.add([token], last=False) for token in row]
    assert tokenizer.clean_up_tokenization_spaces or sum(map(bool, told)) >= min(5, len(row))


def test_an_answer_cut_inside_a_character_has_the_characters_before_it(tokenizer):
    for text in TEXTS:
        row = tokenizer(text)["input_ids"]
        shown = [whole_text(tokenizer, row[:length]) for length in range(len(row) + 1)]
        assert shown[-1] == tokenizer.decode(row)
        assert not any("\ufffd" in each for each in shown)
        if not tokenizer.clean_up_tokenization_spaces:
            assert all(after.startswith(before) for before, after in pairwise(shown))
            assert all(len(after) > len(before) for before, after in zip(shown, shown[5:], strict=False))


@pytest.mark.parametrize("window_size", [None, 2])
def test_every_call_ends_behind_spelled_characters_and_shows_whole_ones(window_size):
    """A drafter that knows one answer, and the bytes of it as its vocabulary."""
    spelled = [f"<0x{byte:02X}>" for byte in "你好你\n好".encode()]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(spelled))}
    made = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    answer = [vocab[token] for token in spelled]
    model = IdealListModel(torch.tensor([answer]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    sampler = APDSampler(model.drafter, model.verifier, tokenizer, window_size=window_size)
    ids = [vocab["<0x0A>"]]
    prompt = torch.tensor([ids])
    for stop, until in ((None, 13), ("\n", 10), ("好你", 9), ("好你\n", 10)):
        common = {"stop_strings": stop, "max_new_tokens": 13, "eos_token_id": None}
        assert sampler.generate(prompt, **common)[0, 1:].tolist() == answer[:until]
        chunks = list(sampler.stream(prompt, **common))
        assert [token for chunk in chunks for token in chunk.tokens] == answer[:until]
        (single,) = sampler.generate_many([ids], **common)
        assert single.tokens == answer[:until]
        assert single.text == "".join(chunk.text for chunk in chunks) == tokenizer.decode(answer[:until])
        assert single.finish == ("length" if stop is None else "stop")
    for length in (11, 12):  # within the last character
        model = IdealListModel(torch.tensor([answer[:length]]))
        sampler = APDSampler(model.drafter, model.verifier, tokenizer, window_size=window_size)
        common = {"max_new_tokens": length, "eos_token_id": None}
        (single,) = sampler.generate_many([ids], **common)
        assert single.text == "你好你\n" == "".join(chunk.text for chunk in sampler.stream(prompt, **common))
