"""A conversation of several turns.
Runs on the included pair in seconds: python examples/chat.py

The messages are those of transformers, and `apply_chat_template` turns them
into a prompt. The included pair was trained on single tasks and has no chat
template, so it gets one here that shows it the last message only; a turn
refers to the answer before it by quoting it. An instruction-tuned drafter
brings its template and sees the whole conversation:

    sampler = APDSampler.from_pretrained(
        "Dream-org/Dream-v0-Instruct-7B", "Qwen/Qwen2.5-0.5B"
    )
    say(sampler, messages, "What is 7 + 5?", chat_template=None)
    say(sampler, messages, "And twice that?", chat_template=None)  # no quote
"""

import argparse

from apd import APDSampler

LAST_MESSAGE = "{{ messages[-1]['content'] }}"


def say(sampler: APDSampler, messages: list[dict[str, str]], text: str, chat_template: str | None) -> str:
    """Add a message of the user and the answer to it."""
    messages.append({"role": "user", "content": text})
    inputs = sampler.tokenizer.apply_chat_template(
        messages, chat_template=chat_template, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = sampler.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    answer = sampler.tokenizer.decode(ids, skip_special_tokens=True).strip()
    messages.append({"role": "assistant", "content": answer})
    return answer


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included()
    messages: list[dict[str, str]] = []
    names = say(sampler, messages, 'Copy this list: ["Sam", "Leo", "Bea", "Uma"].', LAST_MESSAGE)
    names = say(sampler, messages, f"Insert Ada as name 2: {names}.", LAST_MESSAGE)
    names = say(sampler, messages, f"Reverse this list: {names}.", LAST_MESSAGE)
    say(sampler, messages, f"Remove any one name: {names}.", LAST_MESSAGE)
    for message in messages:
        print(f"{message['role']:>9}: {message['content']}")


if __name__ == "__main__":
    main()
