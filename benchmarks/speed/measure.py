"""Measures settings in turn (A B C A B C), each once without and once with instruments, after a warm-up."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from apd.included import tasks
from benchmarks.speed.floor import Rates, Size, floor_seconds
from benchmarks.speed.instruments import Clock, Forward, Meter
from benchmarks.speed.pairs import Inputs, Pair, Rows
from benchmarks.speed.schedule import Schedule
from benchmarks.speed.settings import ONE_PER_STEP, Answers, Autoregressive, Decoder, Setting, decoder

__all__ = ["Plan", "Result", "Sample", "measure", "sizes_of", "spread"]

QUALITY_BATCH = 64


@dataclass(frozen=True)
class Plan:
    """The amount of measurement.

    Attributes:
        count: prompts.
        batch: rows of a call.
        repetitions: of every setting, at least 1.
        quality_count: prompts whose answers are scored, if the pair has a scorer.
    """

    count: int
    batch: int = 1
    repetitions: int = 5
    quality_count: int = 220

    def __post_init__(self) -> None:
        for name in ("count", "batch", "repetitions", "quality_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Sample:
    """One repetition, in seconds over all its calls.

    Attributes:
        plain: wall time without instruments.
        cpu: processor time of these calls. Less than `plain` with one thread: other processes used the core.
        metered: wall time with instruments.
        setup: until the first step of each call; `None` where no strategy runs.
        drafter, verifier: forwards.
        propose: the strategy, forwards included; `None` where none runs.
        later: the steps behind each call's first, which reads the prompt; `None` where no strategy runs.
        followed, followed_forwards: the steps with a successor, without a call's setup and output, and the
            forwards in them; `None` where no strategy runs.
    """

    plain: float
    cpu: float
    metered: float
    setup: float | None
    drafter: float
    verifier: float
    propose: float | None
    later: float | None
    followed: float | None
    followed_forwards: float | None


@dataclass
class Result:
    """A setting on a pair.

    Attributes:
        setting: the setting.
        tokens: new tokens of all rows, to the first stop token.
        row_forwards: drafter forwards of all rows while they were not done.
        steps: rounds of the loop, over all calls.
        calls: `generate` calls.
        samples: repetitions.
        forwards: shapes of one metered repetition.
        floor: least seconds of these.
        peak_memory: bytes of the whole process (of the GPU, if it is one) at its highest in one repetition.
        accuracy: share of right answers among `judged`; `None` without a scorer.
        judged: number of scored answers.
        missed: steps whose drafter forward was not recorded.
    """

    setting: Setting
    tokens: int
    row_forwards: int
    steps: int
    calls: int
    samples: list[Sample] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    floor: float = 0.0
    peak_memory: int = 0
    accuracy: float | None = None
    judged: int = 0
    missed: int = 0

    def median(self, of: Callable[[Sample], float | None]) -> float | None:
        """The median over the repetitions; `None` if a sample has no value."""
        values = [of(sample) for sample in self.samples]
        return None if None in values else statistics.median(value for value in values if value is not None)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(sample.plain for sample in self.samples)

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(sample.plain for sample in self.samples) / self.steps


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles, as a share of the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def measure(
    pair: Pair,
    settings: Sequence[Setting],
    plan: Plan,
    rates: Rates,
    *,
    schedule: Schedule | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Measure all settings on one pair in one run. The first call of each decoder is a warm-up."""
    schedule = schedule or Schedule()
    clock, rows = Clock(device), pair.rows(plan.count, plan.batch)
    lengths = _lengths(pair, rows, schedule)
    decoders = [decoder(setting, pair, schedule, lengths) for setting in settings]

    results = []
    for setting, each in zip(settings, decoders, strict=True):
        progress(f"{pair.name}: warm-up, {setting.label}")
        result = _counted(setting, [each.answers(inputs) for inputs in rows.calls])
        _judge(result, pair, each, plan)
        with _PeakMemory(device) as memory:
            _decode_all(each, rows)
        result.peak_memory = memory.bytes
        results.append(result)

    for repetition in range(plan.repetitions):
        for each, result in zip(decoders, results, strict=True):
            progress(f"{pair.name}: repetition {repetition + 1} of {plan.repetitions}, {result.setting.label}")
            start, cpu = clock.wall(), time.process_time()
            _decode_all(each, rows)
            plain, cpu = clock.wall() - start, time.process_time() - cpu
            models = _models(each, pair)
            meter = Meter(models, clock, pair.compiled)
            with meter.attached():
                start = clock.wall()
                for inputs in rows.calls:
                    with meter.call():
                        each.decode(inputs, meter)
                metered = clock.wall() - start
            strategic = meter.count("propose") > 0
            result.samples.append(
                Sample(
                    plain=plain,
                    cpu=cpu,
                    metered=metered,
                    setup=meter.seconds("setup") if strategic else None,
                    drafter=meter.seconds("drafter"),
                    verifier=meter.seconds("verifier"),
                    propose=meter.seconds("propose") if strategic else None,
                    later=meter.seconds("later") if strategic else None,
                    followed=meter.seconds("followed") if strategic else None,
                    followed_forwards=meter.seconds("followed forwards") if strategic else None,
                )
            )
            result.forwards = meter.forwards
            result.floor = floor_seconds(sizes_of(models), meter.forwards, rates)
            drafted = sum(forward.role == "drafter" for forward in meter.forwards)
            # A step computes rows of different widths in several forwards, so their number is no check.
            result.missed = meter.unseen if strategic else result.steps - drafted
    return results


def sizes_of(models: dict[str, PreTrainedModel]) -> dict[str, Size]:
    """The sizes of each model, by role."""
    return {role: Size.of(model) for role, model in models.items()}


def _decode_all(each: Decoder, rows: Rows) -> None:
    for inputs in rows.calls:
        each.decode(inputs)


def _models(each: Decoder, pair: Pair) -> dict[str, PreTrainedModel]:
    return {"drafter": each.model} if isinstance(each, Autoregressive) else pair.models


def _lengths(pair: Pair, rows: Rows, schedule: Schedule) -> Callable[[Inputs], int]:
    """Tokens for plain `generate()` in each call: the length of the longest row when decoded one token per step."""
    if not pair.trained:
        return lambda inputs: pair.new_tokens
    sequential = decoder(ONE_PER_STEP, pair, schedule, lambda inputs: pair.new_tokens)
    found = {id(inputs): max(map(len, sequential.answers(inputs).tokens)) for inputs in rows.calls}
    return lambda inputs: found[id(inputs)]


def _counted(setting: Setting, answers: Sequence[Answers]) -> Result:
    return Result(
        setting,
        tokens=sum(len(tokens) for answer in answers for tokens in answer.tokens),
        row_forwards=sum(sum(answer.forwards) for answer in answers),
        steps=sum(answer.steps for answer in answers),
        calls=len(answers),
    )


def _judge(result: Result, pair: Pair, each: Decoder, plan: Plan) -> None:
    """Accuracy over more prompts than are timed, in larger batches, since an answer does not depend on its batch."""
    if not pair.scored or isinstance(each, Autoregressive):
        return
    rows = pair.rows(plan.quality_count, QUALITY_BATCH)
    answers = [tokens for inputs in rows.calls for tokens in each.answers(inputs).tokens]
    texts = pair.sampler.tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = [tasks.is_right(instance, text) for instance, text in zip(rows.instances, texts, strict=True)]
    result.accuracy, result.judged = sum(right) / len(right), len(right)


class _PeakMemory:
    """The highest memory of the process, or of the GPU, while the block runs. Weights are part of it."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device != "cpu"
        self.bytes = 0

    def __enter__(self) -> _PeakMemory:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            return self
        with suppress(OSError):  # outside Linux the peak counts from the start of the process
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_cuda:
            self.bytes = torch.cuda.max_memory_allocated()
            return
        try:
            status = Path("/proc/self/status").read_text()
            self.bytes = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        except (OSError, ValueError, IndexError):
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
