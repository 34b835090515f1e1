"""Our own rows, and the reading of a checkout in the official form."""

import itertools
import json
from collections import Counter

import pytest
import yaml
from paths import SHARED

pytest.importorskip("benchmarks.parallelbench", reason="benchmarks are imported from the repository root")

from apd.included.tasks import LIST_TASKS, instances, is_right
from benchmarks.parallelbench import official, score
from benchmarks.parallelbench.score import TASKS, parse_list
from benchmarks.parallelbench.tasks import (
    FIRST_NAMES,
    GENERATED_TASKS,
    Row,
    generate,
    included_rows,
    latin_squares,
    sudoku_grids,
)
from benchmarks.parallelbench.words import LAST_NAMES, THEMES

SAMPLES = SHARED / "data/parallelbench_samples.json"


def full(row: Row, text: str) -> dict[str, float]:
    return score(row.task, text, row.answer, grammar=lambda sentence: True)


@pytest.mark.parametrize("task", GENERATED_TASKS)
def test_the_reference_answer_scores_one_and_another_rows_does_not(task):
    rows = generate(task, 60, seed=1)
    for row, other in itertools.pairwise(rows):
        assert full(row, row.reference)["score"] == full(row, row.reference)["score_strict"] == 1
        assert row.reference == other.reference or full(row, other.reference)["score"] == 0
        assert row.task == task and "{" not in row.question


@pytest.mark.parametrize("task", GENERATED_TASKS)
def test_rows_are_given_by_the_seed(task):
    assert generate(task, 5, seed=3) == generate(task, 5, seed=3) != generate(task, 5, seed=4)
    assert generate(task, 9, seed=3)[:5] == generate(task, 5, seed=3)


def test_every_task_that_needs_no_foreign_data_is_generated():
    assert set(TASKS) - set(GENERATED_TASKS) == {
        "paraphrase_summarize/samsum",
        "paraphrase_summarize/chatgpt-paraphrases",
    }


def test_lengths_take_turns_and_names_do_not_mix():
    rows = generate("waiting_line/insert_random", 40, seed=0)
    assert Counter(row.metadata["length"] for row in rows) == {3: 10, 4: 10, 5: 10, 6: 10}
    assert {row.metadata["length"] for row in generate("waiting_line/copy", 4, seed=0, n=15)} == {15}
    for row in rows:
        people = [*row.answer["input"], row.answer["word"]]
        for part in zip(*(person.split() for person in people), strict=True):
            assert len(set(part)) == len(people)  # first names differ, last names differ


def test_positions_count_from_one():
    for name in ("insert", "replace", "remove"):
        for row in generate(f"waiting_line/{name}_index", 40, seed=0):
            names, answer = parse_list(row.input["context"]), parse_list(row.answer)
            at = row.input["index"] - 1
            if name == "remove":
                assert names[:at] + names[at + 1 :] == answer
            else:
                assert answer[at] == row.input["word"]


def test_sorting_by_first_name_is_sorting():
    for row in generate("waiting_line/sort", 200, seed=0):
        answer = parse_list(row.answer)
        assert answer == sorted(answer, key=lambda person: person.split()[0])


def test_messages_put_solved_examples_first():
    row = generate("waiting_line/shuffle", 1, seed=0, shots=2)[0]
    assert [message["role"] for message in row.messages] == ["user", "assistant"] * 2 + ["user"]
    assert row.messages[1]["content"] == row.examples[0].answer["example"]
    assert row.messages[-1]["content"] == row.question
    assert len(generate("words_to_sentence/hard", 1, seed=0)[0].messages) == 1
    assert row.output_format.count("[MASK]") == row.metadata["length"]


def test_latin_squares_and_sudoku_grids_are_all_there_are():
    assert len(set(latin_squares())) == 576 and len(latin_squares(3)) == 12
    assert len(set(sudoku_grids())) == 288
    drawn = {row.reference for row in generate("puzzle/latin_square_n4", 100, seed=0, shots=0)}
    assert len(drawn) == 100


@pytest.mark.parametrize("empty", [1, 4, 8, 10, 12])
def test_a_sudoku_has_one_solution(empty):
    for row in generate("puzzle/sudoku_n4_12", 10, seed=0, n=empty, shots=0):
        puzzle = row.input["sudoku"].replace("\n", "")
        assert puzzle.count("0") == empty and row.metadata["length"] == 16 - empty
        solutions = [
            grid
            for grid in ("".join(str(cell + 1) for line in grid for cell in line) for grid in sudoku_grids())
            if all(a in ("0", b) for a, b in zip(puzzle, grid, strict=True))
        ]
        assert solutions == [row.reference.replace("\n", "")]


def test_words_get_harder():
    themes = {word: name for name, words in THEMES.items() for word in words}
    assert len(themes) == sum(map(len, THEMES.values()))  # no word twice
    for level, count in (("easy", 1), ("medium", 4)):
        for row in generate(f"words_to_sentence/{level}", 20, seed=0):
            assert len({themes[word] for word in row.answer["words"]}) == count
    for row in generate("words_to_sentence/hard", 20, seed=0):
        assert [themes[word] for word in row.answer["words"]].count("ideas") == 2
    assert [len(row.answer["words"]) for row in generate("words_to_sentence/easy", 3, seed=0, n=(1, 3, 7))] == [
        1,
        3,
        7,
    ]


@pytest.mark.parametrize(
    ("task", "n"),
    [
        ("waiting_line/copy", 1),
        ("puzzle/latin_square_n4", 5),
        ("puzzle/sudoku_n4_12", 13),
        ("words_to_sentence/easy", 9),
    ],
)
def test_difficulties_that_cannot_be_are_refused(task, n):
    with pytest.raises(ValueError, match="`n` must be"):
        generate(task, 1, seed=0, n=n)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="waiting_line/copie"):
        generate("waiting_line/copie", 1, seed=0)


@pytest.mark.parametrize("name", LIST_TASKS)
def test_tasks_of_the_included_pair_have_the_same_scorer(name):
    for instance, row in zip(instances(name, 20, seed=5), included_rows(name, 20, seed=5), strict=True):
        assert row.question == instance.prompt
        for other in [*included_rows(name, 5, seed=6), row]:
            assert score(row.task, other.reference, row.answer)["score_strict"] == is_right(instance, other.reference)


@pytest.mark.skipif(not SAMPLES.exists(), reason="the published rows carry no licence and lie outside the repository")
def test_nothing_of_the_published_rows_is_in_ours():
    """People and prompts are our own, and the published rows go through our reader and scorers."""
    samples = json.loads(SAMPLES.read_text())["samples"]
    people = {f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES}
    for sample in samples:
        names = parse_list(sample["raw"]["input"].get("context", "")) or []
        assert not people & set(names)
        assert sample["prompt_template"].replace("\\n", "\n") not in {row.prompt for row in generate_one_of_each()}
        row = official._first_generation(sample["task"], sample["prompt_template"].replace("\\n", "\n"), sample["raw"])
        assert row.messages == sample["rendered_messages"]
        assert row.answer == sample["label"] and full(row, row.reference)["score"] == 1


def generate_one_of_each() -> list[Row]:
    return [generate(task, 1, seed=0)[0] for task in GENERATED_TASKS]


# --- A checkout


def foreign_rows() -> dict[str, list[Row]]:
    """Rows of all seventeen tasks; those with foreign data are made up."""
    rows = {task: generate(task, 6, seed=7) for task in GENERATED_TASKS}
    for name, label in (
        ("samsum", {"text": "A: Hi.", "summary": "A greets."}),
        ("chatgpt-paraphrases", {"text": "Hi."}),
    ):
        task = f"paraphrase_summarize/{name}"
        rows[task] = [Row(task, "Shorten: {text}\n", {"text": label["text"]}, label)]
    return rows


@pytest.mark.parametrize("within", ["dataset/parallel_bench/data/output/test", "."])
def test_a_checkout_of_the_first_generation_is_read_as_it_is(tmp_path, within):
    rows = foreign_rows()
    for task, lines in rows.items():
        folder = tmp_path / within / task.split("/")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{task.split('/')[1]}.jsonl").write_text(
            "\n".join(json.dumps(row.to_json()) for row in lines) + "\n"
        )
        config = folder / "task_config.yaml"
        known = yaml.safe_load(config.read_text()) if config.exists() else {}
        # The official puzzles spell line breaks out.
        known[task] = {"prompt": lines[0].prompt.replace("\n", "\\n"), "metric": "m", "icl_example_count": 1}
        config.write_text(yaml.safe_dump(known))
    assert official.available(tmp_path) == list(TASKS)
    for task, lines in rows.items():
        assert official.load(tmp_path, task) == lines


def test_runs_of_the_second_generation_are_read(tmp_path):
    rows = foreign_rows()
    for task, lines in rows.items():
        stem = official._samples_stem(task)
        documents = [
            {"doc": {"messages": row.messages, "label": row.answer, "metadata": row.metadata, "index": i}}
            for i, row in enumerate(lines)
        ]
        for run, found in (("20260101_all", documents[:1]), ("20260320_all", documents[::2] + documents[1::2])):
            folder = tmp_path / "results/model/method" / run
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, found)))
    assert official.available(tmp_path) == list(TASKS)
    for task, lines in rows.items():
        loaded = official.load(tmp_path, task)
        assert [row.messages for row in loaded] == [row.messages for row in lines]
        assert [row.answer for row in loaded] == [row.answer for row in lines]


def test_rows_of_the_second_generation_may_be_plain_messages(tmp_path):
    row = generate("puzzle/sudoku_n4_12", 1, seed=0)[0]
    (tmp_path / "puzzles").mkdir()
    line = {"messages": [{"role": "system", "content": "Be brief."}, *row.messages], "label": row.answer}
    (tmp_path / "puzzles/sudoku_n4.jsonl").write_text(json.dumps(line))
    (loaded,) = official.load(tmp_path, "puzzles/sudoku_n4")
    assert loaded.messages == row.messages and full(loaded, row.reference)["score"] == 1
    assert official.load(tmp_path, "puzzle/sudoku_n4_12")[0].messages == row.messages


def test_the_missing_file_of_a_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no rows of waiting_line/copy.*checkout"):
        official.load(tmp_path, "waiting_line/copy")
    (tmp_path / "waiting_line").mkdir()
    file = tmp_path / "waiting_line/copy.jsonl"
    file.write_text('{"input": {}, "answer": "[]"}')
    with pytest.raises(FileNotFoundError, match=r"task_config\.yaml"):
        official.load(tmp_path, "waiting_line/copy")
    file.with_name("task_config.yaml").write_text("waiting_line/sort: {prompt: x}")
    with pytest.raises(ValueError, match="waiting_line/sort"):
        official.load(tmp_path, "waiting_line/copy")
    file.write_text('{"question": "?"}')
    with pytest.raises(ValueError, match="official file"):
        official.load(tmp_path, "waiting_line/copy")
