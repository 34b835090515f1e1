"""Small tokenizers of every kind, trained on texts in several scripts, and models that speak them."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind. It's 12345 o'clock.",
    "def f(x):\n    return  x + 1\n\n\nprint(f(41))\t# forty-two",
    "Über den Wolken müsse die Freiheit grenzenlos sein; naïve cafe\u0301 e\u0308.",
    "快速的棕色狐狸跳过了懒狗。狐狸很快,狗很懒。我们今天学习语言模型。",
    "الثعلب البني السريع يقفز فوق الكلب الكسول. مرحبا بالعالم",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। नमस्ते दुनिया",
    "Family: 👨‍👩‍👧‍👦 and flags 🇩🇪🇯🇵, thumbs 👍🏽 up! 😀😀",
    "  leading and trailing spaces  ",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "fox dog fox dog the quick the lazy fox",
)
# What the tokenizers learn from: not all of the texts, so that some characters are unknown and fall back to bytes.
CORPUS = [*(text for text in TEXTS for _ in range(4) if "😀" not in text and "नमस्ते" not in text), "a b c d e"]
SPECIAL = ("<pad>", "<eos>", "<mask>", "<unk>")
KINDS = ("byte_bpe", "unigram", "sentencepiece_bpe", "wordpiece", "word_level")
#: Kinds that decode to the very text.
EXACT = ("byte_bpe", "unigram", "sentencepiece_bpe")
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
OTHER_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system') }}{% else %}{{ m['content'] + ';' }}{% endif %}{% endfor %}"
)


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of this kind: about 400 tokens, the special ones first."""
    return as_tokenizer(_TRAINERS[kind]())


def as_tokenizer(backend: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **more,
    )


def _byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    import json

    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    tokenizer.model = models.Unigram(pieces, unk_id=3, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def _sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: no pre-tokenizer, ▁ for spaces, byte fallback, and a first token before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # only for training
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    import json

    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = trained["vocab"] | {f"<0x{byte:02X}>": len(trained["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_level() -> Tokenizer:
    """Words with the space before them, as the included drafter's."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]+|\s+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=list(SPECIAL), show_progress=False))
    return tokenizer


_TRAINERS = {
    "byte_bpe": _byte_bpe,
    "unigram": _unigram,
    "sentencepiece_bpe": _sentencepiece_bpe,
    "wordpiece": _wordpiece,
    "word_level": _word_level,
}


class _Letters(PreTrainedTokenizer):
    """A tokenizer without the library of fast ones: a token for every ASCII character."""

    def __init__(self) -> None:
        self.letters = {chr(i): i - 28 for i in range(32, 127)}
        super().__init__(pad_token="<pad>", eos_token="<eos>", mask_token="<mask>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return len(SPECIAL) + len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(SPECIAL)} | self.letters

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 3)

    def _convert_id_to_token(self, index: int) -> str:
        return [*SPECIAL, *self.letters][index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@functools.cache
def letters() -> _Letters:
    return _Letters()


@functools.cache
def random_lm(kind: str, **config: Any) -> Qwen2ForCausalLM:
    """A causal LM of one layer, in float64, over the tokens of this kind; one entry more than there are tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(len(kind))
        config = {
            "vocab_size": len(tokenizer_of(kind)) + 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "initializer_range": 0.4,
            "eos_token_id": 1,
            "bos_token_id": None,
            "pad_token_id": None,
        } | config
        return Qwen2ForCausalLM(Qwen2Config(**config)).double().eval().requires_grad_(False)


class Oracle:
    """Says one text, token by token, and ends; behind anything else it says the unknown token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        self.tokenizer, self.ids = tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]
        self.text = self.said(self.ids)

    def __call__(self, input_ids: Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for i in range(input_ids.shape[1]):
            logits[0, i, self.next(input_ids[0, : i + 1].tolist())] = 30.0
        return SimpleNamespace(logits=logits)

    def said(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def next(self, ids: list[int]) -> int:
        end, unknown = self.tokenizer.eos_token_id, self.tokenizer.unk_token_id
        ids = ids[1:] if ids[:1] == [end] else ids
        if ids == self.ids[: len(ids)]:
            return [*self.ids, end][len(ids)]
        said = self.said(ids)
        if not self.text.startswith(said):
            return unknown
        if said == self.text:
            return end
        # Behind another tokenization of its text, it goes on with the longest token that is right.
        letter = self.text[len(said)]
        tokens = [
            i for string, i in self.tokenizer.get_vocab().items() if string.lstrip("#▁Ġ ")[:1] in ("", letter, "<")
        ]
        longest = max(tokens, key=lambda token: len(self._right([*ids, token])))
        return longest if len(self._right([*ids, longest])) > len(said) else unknown

    def _right(self, ids: list[int]) -> str:
        said = self.said(ids)
        return said if self.text.startswith(said) else ""
