"""What the server answers: OpenAI's fields, in OpenAI's shape, with the tokens of `generate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`: pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`: pip install -e '.[serve]'")

import torch
from serving import ANSWER, PROMPT, Served
from tongues import EXACT, TEXTS, tokenizer_of

from apd import APDSampler
from apd.decoding.noise import mix_seed
from apd.integrations.scoring import sequential_logprobs
from apd.serve.chunks import Answer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": PROMPT}


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


@pytest.fixture(scope="module")
def served(sampler: APDSampler) -> Iterator[Served]:
    with Served(sampler, max_body=20_000) as server:
        yield server


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def finishes(chunks: list[dict[str, Any]], index: int = 0) -> list[str]:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def test_both_routes_answer_as_generate_does(served: Served, sampler: APDSampler) -> None:
    inputs = sampler.tokenizer([PROMPT], return_tensors="pt")
    direct = sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
    whole, chat = served.complete(), served.chat()
    assert whole["choices"][0]["text"] == chat["choices"][0]["message"]["content"] == ANSWER
    assert (whole["object"], chat["object"]) == ("text_completion", "chat.completion")
    for answer in (whole, chat):
        usage = answer["usage"]
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert usage["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert usage["completion_tokens"] == int(direct.new_tokens)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["apd"]["drafter_forwards"] == int(direct.drafter_forwards)
        assert usage["apd"]["verifier_forwards"] == int(direct.verifier_forwards)
        assert usage["apd"]["tokens_per_forward"] == pytest.approx(float(direct.tokens_per_forward), abs=1e-3)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_joins_to_the_whole_answer_and_says_why_it_ended(served: Served, path: str) -> None:
    asked: dict[str, Any] = {"messages": [USER]} if path == CHAT else {"prompt": PROMPT}
    for max_tokens, finish in ((32, "stop"), (3, "length")):
        body = {**asked, "max_tokens": max_tokens, "strategy": "left-to-right:1"}
        whole = served.post(path, body).json()["choices"][0]
        chunks = served.stream(path, {**body, "stream_options": {"include_usage": True}})
        *parts, usage = chunks
        assert text_of(parts) == (whole["text"] if path == TEXT else whole["message"]["content"])
        assert whole["finish_reason"] == finish and finishes(parts) == [finish]
        assert parts[-1]["choices"][0]["finish_reason"] == finish
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
        assert all(part["usage"] is None and part["id"] == chunks[0]["id"] for part in parts)
        assert len(parts) >= 3  # it was a stream


def test_no_part_of_a_stop_string_is_ever_shown(served: Served) -> None:
    body = {"prompt": PROMPT, "strategy": "left-to-right:1"}
    for stop in ('", "Mia', ['", "Mia', "Zebra"]):
        whole = served.complete(**body, stop=stop)["choices"][0]
        assert (whole["text"], whole["finish_reason"]) == (ANSWER[: ANSWER.index('", "Mia')], "stop")
        chunks = served.stream(TEXT, {**body, "stop": stop})
        assert text_of(chunks) == whole["text"] and finishes(chunks) == ["stop"]
    tokens = served.complete(**body, stop="Zoe")["usage"]["completion_tokens"]
    assert tokens == 2  # ` ["` and `Zoe`, which completes it
    assert served.complete(stop=[])["choices"][0]["text"] == ANSWER


def test_several_choices_and_prompts_have_their_own_index_and_end(served: Served, sampler: APDSampler) -> None:
    ids = sampler.tokenizer(PROMPT)["input_ids"]
    for prompt in (ids, [ids, ids], [PROMPT, PROMPT]):
        answer = served.complete(prompt=prompt, n=2)
        count = 2 if isinstance(prompt[0], int) else 4
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        assert {choice["text"] for choice in answer["choices"]} == {ANSWER}
        assert answer["usage"]["prompt_tokens"] == len(ids) * count // 2
    chunks = served.stream(CHAT, {"messages": [USER], "n": 3, "temperature": 1, "seed": 7})
    whole = served.chat(n=3, temperature=1, seed=7)["choices"]
    for i in range(3):
        assert finishes(chunks, i) == [whole[i]["finish_reason"]]
        assert text_of(chunks, i) == whole[i]["message"]["content"]


def test_null_is_the_default_of_every_optional_field(served: Served) -> None:
    fields = {
        name: None
        for name in "model stream stream_options n max_tokens temperature top_p stop seed frequency_penalty presence_penalty "
        "logit_bias user strategy mixture_weight window_size top_k logprobs".split()
    }
    chat = {name: None for name in "tools tool_choice response_format top_logprobs max_completion_tokens".split()}
    assert served.complete(**fields, suffix=None, echo=None, best_of=None)["choices"][0]["text"] == ANSWER
    assert served.chat(**fields, **chat)["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    ("path", "given", "meant"),
    [
        (TEXT, "R", "mixture_weight"),
        (TEXT, "tau", "acceptance_threshold"),
        (CHAT, "mixture_weigth", "mixture_weight"),
        (CHAT, "maxtokens", "max_tokens"),
        (TEXT, "surprise", None),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest(
    served: Served, path: str, given: str, meant: str | None
) -> None:
    message = served.refusal(path, **{given: 1})["message"]
    hint = f". Did you mean {meant}?" if meant else ""
    assert message == f"Unrecognized request argument supplied: {given}{hint}"


def test_messages_may_be_parts_null_or_begun(served: Served) -> None:
    begun = ANSWER[:10]
    parts = {"role": "user", "content": [{"type": "text", "text": PROMPT[:10]}, {"type": "text", "text": PROMPT[10:]}]}
    for messages in (
        [parts],
        [USER, {"role": "assistant", "content": None}],
        [USER, {"role": "assistant", "content": ""}],
    ):
        assert served.chat(*messages)["choices"][0]["message"]["content"] == ANSWER
    answer = served.chat(USER, {"role": "assistant", "content": begun})
    assert begun + answer["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (TEXT, {"surprise": 1}, 400, "surprise"),
        (TEXT, {"model": "gpt-5"}, 404, "model"),
        (TEXT, {"max_tokens": "5"}, 400, "max_tokens"),
        (TEXT, {"max_tokens": 0}, 400, "max_tokens"),
        (TEXT, {"max_tokens": 9999}, 400, "max_tokens"),
        (TEXT, {"n": 0}, 400, "n"),
        (TEXT, {"n": 128}, 400, "n"),
        (TEXT, {"temperature": 3}, 400, "temperature"),
        (TEXT, {"best_of": 2}, 400, "best_of"),
        (TEXT, {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        (TEXT, {"stop": ""}, 400, "stop"),
        (TEXT, {"prompt": ""}, 400, "prompt"),
        (TEXT, {"prompt": []}, 400, "prompt"),
        (TEXT, {"prompt": [[]]}, 400, "prompt"),
        (TEXT, {"prompt": [99999]}, 400, "prompt"),
        (TEXT, {"prompt": "<mask>"}, 400, "prompt"),
        (TEXT, {"logit_bias": {"x": 1}}, 400, "logit_bias"),
        (TEXT, {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        (TEXT, {"echo": True, "logprobs": 1, "stream": True}, 400, "stream"),
        (TEXT, {"suffix": "x", "n": 2}, 400, "n"),
        (TEXT, {"suffix": "x", "stop": "y"}, 400, "stop"),
        (TEXT, {"window_size": 4}, 400, "window_size"),
        (TEXT, {"kv_window": 4}, 400, "kv_window"),
        (TEXT, {"strategy": "apd:M=4"}, 400, "window_size"),
        (TEXT, {"strategy": "guess"}, 400, "strategy"),
        (TEXT, {"strategy": "blocks:8/" * 500 + "threshold:0.9"}, 400, "strategy"),
        (TEXT, {"mixture_weight": 2.0}, 400, "mixture_weight"),
        (TEXT, {"mixture_weight": 2.0, "stream": True}, 400, "mixture_weight"),
        (TEXT, {"mixture_weight": 2.0, "echo": True, "max_tokens": 0}, 400, "mixture_weight"),
        (TEXT, {"first": "judge"}, 400, "correction"),
        (TEXT, {"strategy": "confidence:1", "frequency_penalty": 1}, 400, "frequency_penalty"),
        (TEXT, {"strategy": "confidence:1", "presence_penalty": 1}, 400, "presence_penalty"),
        (TEXT, {"strategy": "confidence:1", "repetition_penalty": 2}, 400, "repetition_penalty"),
        (TEXT, {"strategy": "autoregressive", "suffix": "x"}, 400, "suffix"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        (CHAT, {"messages": [USER, USER]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0"),
        (CHAT, {"tools": [{"type": "function"}]}, 400, "tools"),
        (CHAT, {"top_logprobs": 2}, 400, "top_logprobs"),
        (CHAT, {"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    served: Served, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    error = served.refusal(path, **body)
    assert (error["status"], error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error" and len(error["message"]) > 10
    assert "logits_processor" not in error["message"]  # no field of a request


def test_bias_and_penalties_are_those_of_generate(served: Served, sampler: APDSampler) -> None:
    inputs = sampler.tokenizer([PROMPT], return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    zoe, ada = sampler.tokenizer("Zoe")["input_ids"][0], sampler.tokenizer("Ada")["input_ids"][0]

    class Biased:
        history_free = True

        def __call__(self, ids: Any, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[..., zoe] -= 100
            scores[..., ada] += 2.5
            return scores

    direct = sampler.generate(**inputs, max_new_tokens=32, logits_processor=[Biased()])
    expected = sampler.tokenizer.decode(direct[0, width:], skip_special_tokens=True)
    answer = served.complete(logit_bias={str(zoe): -100, str(ada): 2.5})["choices"][0]["text"]
    assert answer == expected != ANSWER

    class Punished:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            counts = torch.bincount(ids[0, width:], minlength=scores.shape[-1])
            return Biased()(None, scores) - 1.5 * counts - 2.0 * (counts > 0)

    direct = sampler.generate(**inputs, max_new_tokens=12, logits_processor=[Punished()])
    expected = sampler.tokenizer.decode(direct[0, width:], skip_special_tokens=True)
    body = {"logit_bias": {str(zoe): -100, str(ada): 2.5}, "frequency_penalty": 1.5, "max_tokens": 12}
    assert served.complete(**body, presence_penalty=2.0)["choices"][0]["text"] == expected


def test_logprobs_are_of_what_decided_each_token(served: Served, sampler: APDSampler) -> None:
    inputs = sampler.tokenizer([PROMPT], return_tensors="pt")
    direct = sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True, output_logits=True)
    ids = direct.sequences[0, inputs["input_ids"].shape[1] :].tolist()[:-1]  # without the stop token
    expected = [float(logits[0].log_softmax(-1)[token]) for logits, token in zip(direct.logits, ids, strict=False)]
    content = served.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx(expected, abs=1e-5)
    assert "".join(entry["token"] for entry in content) == ANSWER
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == ANSWER
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    legacy = served.complete(logprobs=1)["choices"][0]["logprobs"]
    assert legacy["token_logprobs"][:-1] == pytest.approx(expected, abs=1e-5)  # and one of the stop token
    assert legacy["text_offset"][:3] == [0, 3, 6] and legacy["text_offset"][-1] == len(ANSWER)
    chunks = served.stream(CHAT, {"messages": [USER], "logprobs": True})
    streamed = [
        e for c in chunks for choice in c["choices"] for e in (choice.get("logprobs") or {}).get("content", ())
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


def test_an_echoed_prompt_is_scored_as_lm_eval_scores_it(served: Served, sampler: APDSampler) -> None:
    context, continuation = PROMPT, ' ["Zoe", "Mia"]'
    ids, rest = (sampler.tokenizer(text)["input_ids"] for text in (context, continuation))
    [(_, expected, _, _)] = sequential_logprobs(
        sampler.drafter, [(ids, rest)], vocab_size=sampler.vocab_size, batch_size=8
    )
    for max_tokens in (0, 1):
        choice = served.complete(prompt=[*ids, *rest], echo=True, logprobs=1, max_tokens=max_tokens)["choices"][0]
        logprobs = choice["logprobs"]
        values = logprobs["token_logprobs"]
        assert values[0] is None and len(values) == len(ids) + len(rest) + max_tokens
        assert sum(values[len(ids) : len(ids) + len(rest)]) == pytest.approx(expected, abs=1e-4)
        assert choice["text"].startswith(context + continuation)
        assert logprobs["text_offset"][len(ids)] == len(context)
        assert all(
            value == max(top.values()) or value < 0
            for value, top in zip(values[1:], logprobs["top_logprobs"][1:], strict=True)
        )


def test_a_suffix_is_filled_as_infill_does(served: Served, sampler: APDSampler) -> None:
    prompt, suffix = PROMPT + ' ["Zoe", "', '"]'
    answer = served.complete(prompt=prompt, suffix=suffix, max_tokens=4, seed=5)
    best = sampler.infill([prompt, range(1, 5), suffix], seed=5)
    assert answer["choices"][0]["text"] == best.holes[0].text == 'Leo", "Mia'
    assert answer["usage"]["completion_tokens"] == best.new_tokens
    assert answer["usage"]["apd"]["drafter_forwards"] == best.drafter_forwards + sum(
        other.drafter_forwards for other in best.others
    )


def test_a_schema_is_obeyed(served: Served) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `grammar`: pip install -e '.[grammar]'")
    schema = {"type": "array", "items": {"enum": ["Ada", "Ben", "Mia"]}, "minItems": 2, "maxItems": 3}
    wanted = {"type": "json_schema", "json_schema": {"name": "names", "schema": schema, "strict": True}}
    for more in ({}, {"temperature": 1.5, "seed": 3}):
        names = json.loads(served.chat(response_format=wanted, **more)["choices"][0]["message"]["content"])
        assert 2 <= len(names) <= 3 and set(names) <= {"Ada", "Ben", "Mia"}
    chunks = served.stream(CHAT, {"messages": [USER], "response_format": wanted})
    assert json.loads(text_of(chunks)) and finishes(chunks) == ["stop"]
    for bad, code in (({"type": "wrong"}, "invalid_json_schema"), ({"type": "object"}, "grammar_dead_end")):
        refused = {"type": "json_schema", "json_schema": {"name": "x", "schema": bad}}
        error = served.refusal(CHAT, response_format=refused)
        assert (error["status"], error["param"], error["code"]) == (400, "response_format", code)


@pytest.mark.parametrize("number", [-1e308, -1e19, -(2**63), 10**40, 1e-40])
def test_a_number_of_a_schema_that_could_end_the_process_is_refused(served: Served, number: float) -> None:
    """llguidance recurses without end on integers of -2^63 and less: the server would be gone, and every request with it."""
    pytest.importorskip("llguidance", reason="needs the extra `grammar`: pip install -e '.[grammar]'")
    schema = {"type": "object", "properties": {"a": {"type": "integer", "exclusiveMaximum": 0, "enum": [3, number]}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = served.refusal(CHAT, response_format=wanted)
    assert (error["status"], error["code"]) == (400, "invalid_json_schema") and "2^62" in error["message"]


def test_a_schema_that_is_too_deep_is_refused(served: Served) -> None:
    schema: dict[str, Any] = {}
    for _ in range(480):  # which JSON may be, and what is sent between processes may not
        schema = {"a": schema}
    error = served.refusal(
        CHAT, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    assert (error["status"], error["code"]) == (400, "invalid_json_schema") and "deep" in error["message"]


@pytest.mark.parametrize("kind", EXACT)
def test_a_character_of_several_tokens_arrives_whole(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = Answer(tokenizer)
        pieces = [answer.add([token], last=i == len(ids) - 1).text for i, token in enumerate(ids)]
        assert "".join(pieces) == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)


def test_a_row_seed_follows_from_the_requests_seed(served: Served, sampler: APDSampler) -> None:
    inputs = sampler.tokenizer([PROMPT], return_tensors="pt")
    asked = {"temperature": 1.5, "n": 3, "seed": 11}
    choices = served.complete(**asked)["choices"]
    for i, choice in enumerate(choices):
        ids = sampler.generate(
            **inputs, max_new_tokens=32, do_sample=True, temperature=1.5, top_k=0, seed=[mix_seed(11, i)]
        )
        expected = sampler.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert choice["text"] == expected
    assert choices == served.complete(**asked)["choices"]
