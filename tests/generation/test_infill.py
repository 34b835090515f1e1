"""`infill`: what is given comes back as it was given, with every kind of tokenizer and script."""

import copy
import functools
import math
import random

import pytest
import torch
from tongues import EXACT, KINDS, TEXTS, random_lm, tokenizer_of
from toy import tiny_pair

from apd import APDSampler
from apd.generation.infilling import encode_parts, padded
from apd.models.loading import as_drafter
from apd.text import REPLACEMENT


@functools.cache
def sampler_of(kind: str) -> APDSampler:
    tokenizer, model = tokenizer_of(kind), copy.deepcopy(random_lm(kind))
    model.config.is_causal = False
    return APDSampler(as_drafter(model, "dream", tokenizer.mask_token_id), None, tokenizer, mixture_weight=1.0)


def cut(text: str, rng: random.Random) -> list[str | int]:
    """The text with one or two holes at any characters, also inside words."""
    edges = sorted(rng.sample(range(1, len(text) + 1), k=rng.choice((2, 4))))  # the first token is given
    parts: list[str | int] = [text[: edges[0]]]
    for start, end in zip(edges[1::2], [*edges[2::2], len(text)], strict=True):
        parts += [rng.randint(1, 4), text[start:end]]
    return parts if any(isinstance(part, str) and part for part in parts) else [text, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_comes_back(kind) -> None:
    rng, sampler = random.Random(kind), sampler_of(kind)
    for text in TEXTS:
        parts = cut(text, rng)
        found = sampler.infill(parts, do_sample=True, seed=rng.randrange(100))
        given = [part for part in parts if isinstance(part, str) and part]
        assert [part for part, was in zip(found.parts, filled(parts), strict=True) if isinstance(was, str)] == given
        assert found.text == "".join(found.parts)
        lengths = [part for part in filled(parts) if isinstance(part, int)]
        assert [len(hole.ids) for hole in found.holes] == lengths
        assert all(found.ids[hole.start :][: len(hole.ids)] == hole.ids for hole in found.holes)


def filled(parts: list[str | int]) -> list[str | int]:
    """The parts as one sees them: without empty strings, adjacent holes as one."""
    found: list[str | int] = []
    for part in parts:
        if isinstance(part, int) and found and isinstance(found[-1], int):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found


@pytest.mark.parametrize("kind", EXACT)
def test_the_decoded_row_has_every_given_part_in_order(kind) -> None:
    """Where the tokenizer gives the part alone back, and no hole is filled with half a character."""
    rng, sampler = random.Random(kind), sampler_of(kind)
    tokenizer, checked = sampler.tokenizer, 0

    def decoded(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    halves = [i for i in range(len(tokenizer)) if REPLACEMENT in decoded([i]) or i < 4]
    bytes_of = [i for token, i in tokenizer.get_vocab().items() if token.startswith("<0x")]
    for text in TEXTS * 3:
        parts = cut(text, rng)
        found = sampler.infill(parts, seed=1, suppress_tokens=[*halves, *bytes_of])
        row, place = decoded(found.ids), 0
        for part in parts:
            if (
                isinstance(part, str)
                and part
                and decoded(tokenizer(part, add_special_tokens=False)["input_ids"]) == part
            ):
                assert part in row[place:], (part, row)
                place = row.index(part, place) + len(part)
                checked += 1
    assert checked > 20


def test_a_list_of_texts_is_a_batch_of_the_same_rows() -> None:
    sampler = sampler_of("byte_bpe")
    texts = [["The quick ", 3, " fox"], ["def f(x):\n    return ", 2, " + 1\n"], ["a b ", 4]]
    together = sampler.infill(texts, seed=[1, 2, 3], do_sample=True)
    for text, seed, found in zip(texts, (1, 2, 3), together, strict=True):
        assert sampler.infill(text, seed=[seed], do_sample=True) == found


def test_a_hole_of_unknown_length_is_every_length_and_the_best_comes_first() -> None:
    sampler = sampler_of("byte_bpe")
    found = sampler.infill(["The quick ", range(1, 5), " fox"])
    every = [found, *found.others]
    assert sorted(len(each.holes[0].ids) for each in every) == [1, 2, 3, 4]
    assert [each.score for each in every] == sorted((each.score for each in every), reverse=True)
    for each in every:
        length = len(each.holes[0].ids)
        alone = sampler.infill(["The quick ", length, " fox"], strategy="left-to-right:1")
        assert alone.text == each.text and alone.score == pytest.approx(each.score, abs=1e-4)


@pytest.mark.parametrize(
    ("parts", "error", "told"),
    [
        ("text", TypeError, "`parts` must be a list of strings and numbers of masks"),
        ([], TypeError, "`parts` must be a list"),
        ([3], ValueError, "`parts` must have a string"),
        (["a", 0], ValueError, "A hole must have at least 1 mask, got 0"),
        (["a", range(0)], ValueError, r"A range of lengths must hold whole numbers of at least 1, got range\(0, 0\)"),
        (["a", range(1, 100)], ValueError, "may have 64 combinations of lengths, got 99"),
        (["a", 2.5], TypeError, "A part must be a string, a number of masks or a range of numbers, got float 2.5"),
        (
            ["a", "3"],
            ValueError,
            r"A text must have a hole, a number of masks such as 8, got \['a', '3'\]. Write 3 for '3'.",
        ),
        (["a"], ValueError, r"A text must have a hole, .* got \['a'\]. Use `generate` to continue a text."),
        ([["a", 2], ["b"]], ValueError, r"A text must have a hole, .* got \['b'\]."),
        (["a <mask>", 2], ValueError, "A part must not hold the tokenizer's mask token '<mask>'"),
        (["a", 600, "b"], ValueError, "Prompt and new tokens must fit the drafter's 512 positions"),
        (["\ud800", 2], ValueError, "half a surrogate pair"),
    ],
)
def test_wrong_parts_are_refused(parts, error, told) -> None:
    with pytest.raises(error, match=told):
        sampler_of("byte_bpe").infill(parts)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"`infill\(\)` must have a tokenizer"):
        APDSampler(*tiny_pair()).infill(["a", 2])


def test_a_mask_in_a_message_of_a_chat_is_refused() -> None:
    sampler = copy.copy(sampler_of("byte_bpe"))
    sampler.tokenizer = copy.deepcopy(sampler.tokenizer)
    sampler.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="A message must not hold the tokenizer's mask token"):
        list(sampler.generate_many([[{"role": "user", "content": "a <mask> b"}]], max_new_tokens=2))


def test_the_mask_string_in_a_text_is_a_hole() -> None:
    sampler = sampler_of("byte_bpe")
    (answer,) = sampler.generate_many(["The quick <mask><mask> fox"])
    assert len(answer.tokens) == 2
    ids = sampler.tokenizer("The quick<mask> fox", return_tensors="pt")
    found = sampler.generate(**ids)
    is_given = ids["input_ids"] != sampler.drafter.mask_token_id
    assert torch.equal(found[is_given], ids["input_ids"][is_given]) and found.shape == is_given.shape


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_the_output_has_the_holes_of_each_row(has_tokenizer) -> None:
    sampler = copy.copy(sampler_of("byte_bpe"))
    mask, texts = sampler.drafter.mask_token_id, [["The quick ", 3, " fox ", 2, "!"], ["a b ", 2], ["no hole"]]
    rows = [encode_parts(text, sampler.tokenizer, mask) for text in texts]
    ids, real = padded(rows, 0)
    settings = {"attention_mask": real, "max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 0}
    if not has_tokenizer:
        sampler.tokenizer = None
    output = sampler.generate(ids, return_dict_in_generate=True, strategy="left-to-right:1", **settings)
    assert output.holes[2] == []
    for row, sequence, found, trace in zip(rows, output.sequences.tolist(), output.holes, output.trace, strict=True):
        whole = sequence[ids.shape[1] - len(row.ids) :]
        assert [(hole.start, hole.start + len(hole.ids)) for hole in found] == row.holes
        assert all(whole[hole.start :][: len(hole.ids)] == hole.ids for hole in found)
        filled = sum(len(hole.ids) for hole in found)
        expected = sum(math.log(p) for p in trace.drafter_probs[:filled])
        assert sum(hole.logprob for hole in found) == pytest.approx(expected, abs=1e-5)
    assert any(hole.text for found in output.holes for hole in found) == has_tokenizer
    assert sampler.generate(ids[2:], return_dict_in_generate=True, max_new_tokens=1).holes == [[]]


def test_a_last_hole_that_a_stop_token_ends_has_the_tokens_up_to_it() -> None:
    sampler = sampler_of("byte_bpe")
    mask = sampler.drafter.mask_token_id
    ids = torch.tensor([[5, mask, 6, *[mask] * 50]])
    stops = [i for i in range(sampler.vocab_size) if i % 2 and i != mask]
    output = sampler.generate(ids, eos_token_id=stops, do_sample=True, seed=1, return_dict_in_generate=True)
    first, last = output.holes[0]
    assert first.ids[0] not in stops and last.ids[-1] in stops and len(last.ids) < 50
    assert [*first.ids, *last.ids] == output.trace[0].tokens


@pytest.mark.parametrize("name", ["num_return_sequences", "input_ids", "return_dict_in_generate"])
def test_arguments_that_cannot_be_meant_are_refused(name) -> None:
    """Several answers to a text failed when all were decoded, in a zip."""
    with pytest.raises(ValueError, match=rf"`{name}` cannot be meant in infill\(\), got 2"):
        APDSampler.from_included().infill(["a ", 2], do_sample=True, **{name: 2})


def test_chunks_say_where_their_tokens_stand() -> None:
    sampler = sampler_of("byte_bpe")
    rows = [
        encode_parts(text, sampler.tokenizer, sampler.drafter.mask_token_id)
        for text in (["ab", 3, "c", 2, "d"], ["a", 2])
    ]
    ids, real = padded(rows, 0)
    settings = {"attention_mask": real, "max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 0}
    whole = sampler.generate(ids, **settings).tolist()
    found: list[dict[int, int]] = [{}, {}]
    for chunk in sampler.stream(ids, **settings):
        assert chunk.columns == sorted(chunk.columns)
        found[chunk.row] |= dict(zip(chunk.columns, chunk.tokens, strict=True))
    for row, sequence, tokens in zip(rows, whole, found, strict=True):
        start = ids.shape[1] - len(row.ids)
        holes = [column for a, b in row.holes for column in range(a, b)]
        assert [*tokens] == [*holes, len(row.ids), len(row.ids) + 1]
        assert all(sequence[start + column] == token for column, token in tokens.items())


@pytest.mark.parametrize("has_verifier", [True, False])
def test_with_a_verifier_the_likeliest_text_comes_first(has_verifier) -> None:
    sampler = APDSampler.from_included()
    given = ['Copy this list: ["Mia", "Leo", "Zoe", "Ada"]. ["Mia', range(1, 7), 'Zoe", "Ada"]']
    if not has_verifier:
        sampler.verifier = None
        found = sampler.infill(given)
        assert found.likelihood is None and all(found.score >= other.score for other in found.others)
        return
    found = sampler.infill(given)
    assert found.text == 'Copy this list: ["Mia", "Leo", "Zoe", "Ada"]. ["Mia", "Leo", "Zoe", "Ada"]'
    every = [found, *found.others]
    for each in every:
        logits = sampler.verifier.model(input_ids=torch.tensor([each.ids])).logits[0].log_softmax(-1).detach()
        start = each.holes[0].start
        expected = sum(float(logits[i - 1, each.ids[i]]) for i in range(start, len(each.ids)))
        assert each.likelihood == pytest.approx(expected, rel=1e-4)
    assert [each.likelihood for each in every] == sorted((each.likelihood for each in every), reverse=True)
    best = sampler.infill(given, strategy="left-to-right:1")
    assert [each.verifier_forwards for each in (best, *best.others)] == [1] * 6  # each length is judged in one pass
    assert sampler.infill([given[0], 3, given[2]], strategy="left-to-right:1").verifier_forwards == 0
