"""The included pair says which prompts it was trained on."""

import warnings

import pytest

from apd import EXAMPLE_PROMPTS, APDSampler
from apd.included import tasks
from apd.included.known import ABOUT, unknown_words, why_unknown


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_prompt_of_the_tasks_is_known(task: str, split: str) -> None:
    for instance in tasks.instances(task, 60, seed=3, split=split):
        assert why_unknown(instance.prompt) is None, instance.prompt
        assert why_unknown(instance.prompt + instance.answer) is None


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ('Reverse this list: ["Mia", "Leo"].', "2 names"),
        ('Shuffle this list: ["Ada", "Ben", "Carl", "Zoe", "Mia", "Leo", "Uma"].', "7 names"),
        ('Reverse this list: ["Mia", "Leo", "Tom"].', "Tom is none of Ada, "),
        ('Reverse this list: ["Mia", "<unk>", "Leo"].', "name 2 of its list is none of Ada, "),
        ('Insert<unk> anywhere: ["Mia", "Leo", "Ada"].', "its new name is none of Ada, "),
        ('Reverse this list: ["Mia", "Leo", "Leo"].', "Leo twice"),
        ('Insert Mia anywhere: ["Mia", "Leo", "Ada"].', "Mia twice"),
        ('Remove name 4: ["Mia", "Leo", "Ada"].', "no place 4"),
        ('Reverse this: ["Mia", "Leo", "Uma"].', 'such as Reverse this list: ["Ada", "Ben", "Carl"].'),
        ('Reverse this list: ["Mia", "Leo", "Uma"]. Then copy it.', "goes on behind the task"),
        ("In a bus sit 21 people. Then 3 get off. How many people are in the bus?", "start at 1 to 20"),
        ("In a bus sit 2 people. Then 3 get off. How many people are in the bus?", "below zero"),
        ("In a bus sit 2 people. How many people are in the bus?", "0 events"),
        ("A box holds 2 books. Mia takes 1. Leo takes 1. How many books are in the box?", "several people"),
        (
            "What is the capital of<unk>?",
            "words that the tokenizer does not know, the first behind 'What is the capital of'",
        ),
    ],
)
def test_another_prompt_is_unknown_for_a_reason(prompt: str, reason: str) -> None:
    assert reason in str(why_unknown(prompt))


def test_a_place_behind_the_last_name_is_known_where_a_name_is_inserted() -> None:
    assert why_unknown('Insert Uma as name 4: ["Mia", "Leo", "Ada"].') is None


def test_an_unknown_prompt_is_warned_of_and_a_known_one_is_not() -> None:
    sampler = APDSampler.from_included()
    with pytest.warns(UserWarning, match=r"its list has 2 names.*to anything else its answer is noise"):
        sampler.generate(
            **sampler.tokenizer('Reverse this list: ["Mia", "Leo"].', return_tensors="pt"), max_new_tokens=1
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = sampler.tokenizer(EXAMPLE_PROMPTS, return_tensors="pt", padding=True)
        sampler.generate(**inputs, max_new_tokens=1)


def test_unknown_words_are_named() -> None:
    tokenizer = APDSampler.from_included().tokenizer
    assert unknown_words('Reverse this list: ["Mia", "Xerxes", "Leo", "Xerxes"]. Please.', tokenizer) == [
        "Xerxes",
        "Please",
    ]
    assert unknown_words(EXAMPLE_PROMPTS[0], tokenizer) == []


def test_what_is_said_of_the_pair_is_true() -> None:
    assert f"{len(tasks.LIST_TASKS)} list tasks" in ABOUT and f"{len(tasks.NAMES)} first names" in ABOUT
