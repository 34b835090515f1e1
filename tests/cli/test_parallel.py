"""`apd generate` over processes: every prompt once, the same bytes whatever was killed when and started again how.

Processes take seconds to start, so the tests that launch some share their launches: what one leaves the next continues.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from paths import ROOT

from apd import EXAMPLE_PROMPTS
from apd.cli.app import main, parser
from apd.cli.results import BadLine, Part, merge, part_path, part_paths, read_results, take_over

SETTINGS = ["--max-new-tokens", "24", "-M", "3", "--do-sample", "--temperature", "1.5", "--top-k", "0", "--seed", "5"]
BAD_LINE, TOO_LONG = 4, 10  # indices of a line without a prompt, and of a prompt that the sampler refuses
COUNT = 50

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of POSIX")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [json.dumps({"prompt": EXAMPLE_PROMPTS[i % len(EXAMPLE_PROMPTS)]}) for i in range(COUNT)]
    lines[BAD_LINE] = '{"text": "not a prompt"}'
    lines[TOO_LONG] = json.dumps({"prompt": "Ada " * 600})
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(prompts: Path, output: Path, *more: str) -> list[str]:
    return ["generate", "--input", str(prompts), "--output", str(output), "--on-error", "skip", *SETTINGS, *more]


@pytest.fixture(scope="module")
def whole(prompts: Path) -> bytes:
    """The output of an undisturbed lone process."""
    output = prompts.with_name("whole.jsonl")
    assert main(command(prompts, output, "--batch-size", "16")) == 0
    assert [path.name for path in output.parent.glob("whole*")] == ["whole.jsonl"]
    return output.read_bytes()


class Launch:
    """`torchrun` with some processes, or one process without it; nothing of it survives the `with` block."""

    def __init__(self, processes: int, arguments: list[str]) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher = launcher if processes > 1 else []
        self.agent = psutil.Popen(
            [sys.executable, *launcher, "-m", "apd", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.processes = processes
        self.workers: list[psutil.Process] = []

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.agent.stderr.close()

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not is_so():
            assert self.agent.poll() is None, self.agent.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.01)

    def find_workers(self) -> list[psutil.Process]:
        if self.processes == 1:
            return [self.agent]
        self.wait_until(lambda: len(self.agent.children()) == self.processes)
        self.workers = self.agent.children()
        return self.workers

    def kill(self) -> None:
        """SIGKILL to everything at once. The launcher's children have process groups of their own."""
        everything = self.workers
        with contextlib.suppress(psutil.NoSuchProcess):
            everything = [self.agent, *(self.workers or self.agent.children(recursive=True))]
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everything)

    def finish(self) -> tuple[int, str]:
        err = self.agent.stderr.read()
        return self.agent.wait(), err


def answered(output: Path) -> set[int]:
    """Indices in the output and its parts, also while these come and go."""
    found = set()
    for path in [output, *part_paths(output)]:
        with contextlib.suppress(FileNotFoundError):
            found |= indices(path)
    return found


def launch_and_kill(prompts: Path, output: Path, *, processes: int, more: int) -> None:
    """Kill everything as soon as there are so many more results; at 0, while the processes start."""
    before = len(answered(output))
    with Launch(processes, command(prompts, output, "--batch-size", "1")) as launch:
        launch.find_workers()
        launch.wait_until(lambda: len(answered(output)) >= before + more)
        launch.kill()
    assert before + more <= len(answered(output)) < COUNT - 2  # nothing is lost, and it was not done yet


def indices(path: Path) -> set[int]:
    return set(read_results(path))


def is_clean(output: Path) -> bool:
    return [path.name for path in output.parent.glob(f"{output.name}*")] == [output.name]


# ---------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_continue_what_three_have_left(prompts: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    leave_torn_lines(output, whole.splitlines(keepends=True)[:20])
    with Launch(2, command(prompts, output, "--batch-size", "4")) as launch:
        code, err = launch.finish()
    assert code == 0, err
    assert output.read_bytes() == whole
    assert is_clean(output)
    skipped = [line for line in err.splitlines() if line.startswith("apd: skipped: ")]
    assert sorted(re.findall(r"line (\d+): (expected|Prompt and new)", "\n".join(skipped))) == [
        (str(TOO_LONG + 1), "Prompt and new"),
        (str(BAD_LINE + 1), "expected"),
    ]  # each once


@pytest.mark.slow
def test_killed_runs_continue_with_any_number_of_processes(prompts: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    launch_and_kill(prompts, output, processes=3, more=4)
    known = answered(output)

    with Launch(3, command(prompts, output, "--batch-size", "1")) as launch:
        workers = launch.find_workers()
        launch.wait_until(lambda: len(answered(output)) >= len(known) + 4)
        workers[1].kill()
        code, err = launch.finish()  # one death ends them all
    assert code != 0 and not any(worker.is_running() for worker in workers)
    assert indices(output) == known < answered(output)
    assert len(answered(output)) < COUNT - 2

    with Launch(2, command(prompts, output, "--batch-size", "4")) as launch:
        code, err = launch.finish()
    assert code == 0, err
    assert output.read_bytes() == whole
    assert is_clean(output)


@pytest.fixture
def fatal(prompts: Path, tmp_path: Path) -> Path:
    """Prompts of which the last one is refused, and no other."""
    lines = prompts.read_text().splitlines(keepends=True)
    lines[BAD_LINE] = "\n"
    lines[TOO_LONG], lines[-1] = "\n", lines[TOO_LONG]  # the last one is in the second half
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(lines))
    return path


def test_a_fatal_prompt_keeps_what_is_done(
    fatal: Path, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out.jsonl"
    assert main(command(fatal, output, "--on-error", "stop", "--batch-size", "4")) == 1
    assert f"line {COUNT}: Prompt and new tokens must fit" in capsys.readouterr().err
    assert not output.exists() and len(indices(part_path(output, 0))) > COUNT // 2
    assert main(command(fatal, output)) == 0
    assert output.read_bytes().splitlines() == whole.splitlines()[:-1]


@pytest.mark.slow
def test_a_fatal_prompt_ends_all_processes_and_keeps_what_is_done(
    fatal: Path, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out.jsonl"
    stop = ["--on-error", "stop", "--batch-size", "1"]
    with Launch(2, command(fatal, output, *stop)) as launch:
        code, err = launch.finish()
    assert code != 0 and not output.exists()
    complaints = [line for line in err.splitlines() if line.startswith("apd: error: ")]
    # On a busy machine the other process may be the first to say that one has ended.
    assert any(f"prompts.jsonl, line {COUNT}: Prompt and new tokens must fit" in line for line in complaints)
    done = set().union(*(indices(path) for path in part_paths(output)))
    assert len(done) >= (COUNT - 3) // 2 - 1  # the share of the process that met it, at least

    assert main(command(fatal, output, *stop)) == 1  # a lone process says the same
    assert f"line {COUNT}: Prompt and new tokens must fit" in capsys.readouterr().err
    assert main(command(fatal, output)) == 0
    assert output.read_bytes().splitlines() == whole.splitlines()[:-1]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "moments"), [(3, 1, [0, 12]), (1, 2, [8])])
def test_kills_at_many_moments(
    prompts: Path, whole: bytes, tmp_path: Path, before: int, after: int, moments: list[int]
) -> None:
    output = tmp_path / "out.jsonl"
    for moment in moments:
        launch_and_kill(prompts, output, processes=before, more=moment)
    with Launch(after, command(prompts, output)) as launch:
        code, err = launch.finish()
    assert code == 0, err
    assert output.read_bytes() == whole
    assert is_clean(output)


@pytest.mark.slow
def test_processes_whose_launcher_was_killed_are_not_disturbed(
    prompts: Path, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out.jsonl"
    with Launch(2, command(prompts, output, "--batch-size", "1")) as launch:
        workers = launch.find_workers()
        launch.wait_until(lambda: len(answered(output)) >= 2)
        launch.agent.kill()
        launch.agent.wait()
        assert main(command(prompts, output)) == 1
        assert "is being written by a process of another run" in capsys.readouterr().err
        psutil.wait_procs(workers, timeout=60)
    assert output.read_bytes() == whole  # they have finished by themselves
    assert is_clean(output)


def test_a_single_prompt_takes_a_single_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    @contextlib.contextmanager
    def two(arguments: object) -> Iterator[object]:
        yield type("State", (), {"num_processes": 2})

    monkeypatch.setattr("apd.cli.generate.processes_of", two)
    assert main(["generate", "--prompt", "a"]) == 2
    assert "--prompt takes one process, got 2" in capsys.readouterr().err


# ---------------------------------------------------------------- what a kill can leave


def split(lines: list[bytes], processes: int) -> list[bytes]:
    return [b"".join(lines[i::processes]) for i in range(processes)]


def leave_parts(output: Path, lines: list[bytes]) -> None:
    for process, part in enumerate(split(lines[:-2], 3)):
        part_path(output, process).write_bytes(part)


def leave_everything_merged(output: Path, lines: list[bytes]) -> None:
    output.write_bytes(b"".join(lines))
    for process, part in enumerate(split(lines, 2)):
        part_path(output, process).write_bytes(part)


def leave_some_parts_deleted(output: Path, lines: list[bytes]) -> None:
    output.write_bytes(b"".join(lines[:-2]))
    part_path(output, 2).write_bytes(split(lines[:-2], 3)[2])


def leave_torn_lines(output: Path, lines: list[bytes]) -> None:
    parts = split(lines, 3)
    part_path(output, 0).write_bytes(parts[0][:-1])  # only the line's end is missing
    part_path(output, 1).write_bytes(parts[1][:-40])
    part_path(output, 2).write_bytes(parts[2][:3])


def leave_a_torn_merge(output: Path, lines: list[bytes]) -> None:
    leave_parts(output, lines)
    output.with_name(f"{output.name}.merging").write_bytes(b"".join(lines)[:777])


def leave_an_output_and_new_parts(output: Path, lines: list[bytes]) -> None:
    output.write_bytes(b"".join(lines[::2]))
    part_path(output, 0).write_bytes(lines[3] + lines[1])
    part_path(output, 7).write_bytes(lines[5])


def leave_empty_parts(output: Path, lines: list[bytes]) -> None:
    for process in range(3):
        part_path(output, process).touch()


def leave_locks(output: Path, lines: list[bytes]) -> None:
    leave_parts(output, lines)
    for process in (0, 2, 5):  # the last one without its part
        output.with_name(f"{part_path(output, process).name}.lock").touch()


STATES = [
    leave_parts,
    leave_everything_merged,
    leave_some_parts_deleted,
    leave_torn_lines,
    leave_a_torn_merge,
    leave_an_output_and_new_parts,
    leave_empty_parts,
    leave_locks,
]


@pytest.mark.parametrize("leave", STATES)
def test_a_run_continues_from_all_that_a_kill_can_leave(
    prompts: Path, whole: bytes, tmp_path: Path, leave: Callable[[Path, list[bytes]], None]
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:8]))
    lines = whole.splitlines(keepends=True)[:7]
    output = tmp_path / "out.jsonl"
    leave(output, lines)
    assert main(command(few, output)) == 0
    assert output.read_bytes() == b"".join(lines)
    assert is_clean(output)


def result(index: int, text: str = "a") -> bytes:
    return json.dumps({"index": index, "text": text}).encode() + b"\n"


def test_merging_sorts_and_keeps_the_parts(tmp_path: Path) -> None:
    output, parts = tmp_path / "out", [tmp_path / "one", tmp_path / "two"]
    parts[0].write_bytes(result(5) + result(0))
    parts[1].write_bytes(result(12) + result(3))
    merge(output, parts)
    merge(output, parts)
    assert list(read_results(output)) == [0, 3, 5, 12]
    assert all(path.exists() for path in parts)


def test_two_different_results_of_one_prompt_are_refused(tmp_path: Path) -> None:
    output, part = tmp_path / "out", tmp_path / "out.part-00000"
    output.write_bytes(result(0) + result(1))
    part.write_bytes(result(1, "b") + result(2))
    with pytest.raises(BadLine, match="index 1 has another result than"):
        merge(output, [part])
    assert indices(output) == {0, 1} and indices(part) == {1, 2}


def test_results_of_another_run_are_not_taken_over(tmp_path: Path) -> None:
    def check(path: Path, row: dict) -> None:
        if row["text"] != "a":
            raise ValueError(path.name)

    output, other = tmp_path / "out", tmp_path / "out.part-00004"
    (tmp_path / "out.part-4x").write_text("not ours")
    other.write_bytes(result(1) + result(2, "b"))
    with pytest.raises(ValueError, match=r"out\.part-00004"), Part(part_path(output, 0)) as own:
        take_over(own, output, check)
    assert indices(other) == {1, 2} and not output.exists() and not own.path.exists()


def test_a_part_takes_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.part-00000"
    with Part(path) as part:
        part.write({"index": 0})
        with pytest.raises(RuntimeError, match="being written by a process of another run"):
            Part(path)
        with pytest.raises(RuntimeError, match="being written"), Part(part_path(tmp_path / "out", 1)) as own:
            take_over(own, tmp_path / "out", lambda path, row: None)
    with Part(path) as part:
        part.write({"index": 1})
    assert indices(path) == {0, 1}


# ---------------------------------------------------------------- docs/many.md


def test_the_commands_in_the_docs_are_valid() -> None:
    text = (ROOT / "docs" / "many.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    commands = re.findall(r"apd (generate .*)", blocks.replace("\\\n", " "))
    assert len(commands) >= 3
    for line in commands:
        parser().parse_args(shlex.split(line, comments=True))
