"""Evidence from the weights: is a drafter read as it was trained?

Tokens of known text are masked as decoding would mask them, and the log-probability of the true tokens is measured in the
declared reading and in others: the other logit shift, other mask tokens, other attention. A wrong reading makes the text less
likely.

Other attention is compared on canvases with nothing but masks behind the frontier: there every reading knows the same text,
and a wider one is not better merely because it sees more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apd.inspection.canvases import WINDOW, CheckedDrafter, Scored, Stretch, canvases, score
from apd.inspection.readings import Axis, Reading, describe
from apd.inspection.report import Finding
from apd.inspection.texts import TEXT_OF_THEIRS
from apd.models.masked_lm import MaskedLMDrafter

#: A difference counts if it is above this, in nats per token, and above so many standard errors. With 20 readings that are
#: exactly as good as the declared one, 20 · P(z > 3) = 2.7 % of checks would find one that is not better, were it not for
#: the first condition.
LEAST_NATS, LEAST_ERRORS = 0.1, 3.0

_AXES: tuple[Axis, ...] = ("shift", "mask", "attention")
_NAMES = {"shift": "logit shift", "mask": "mask token", "attention": "attention"}


@dataclass(frozen=True)
class Margin:
    """A mean over canvases, in nats per token, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Margin:
        """From `n k` float; NaN entries do not count. The places of one canvas count as one value."""
        by_canvas = values.nanmean(1)
        by_canvas = by_canvas[~by_canvas.isnan()].double()
        if len(by_canvas) < 2:
            return cls(0.0, math.inf)
        return cls(float(by_canvas.mean()), float(by_canvas.std() / len(by_canvas) ** 0.5))

    @property
    def is_clear(self) -> bool:
        """Above 0, clearly."""
        return self.mean > LEAST_NATS and self.mean > LEAST_ERRORS * self.error

    def __neg__(self) -> Margin:
        return Margin(-self.mean, self.error)

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f} nats"


@dataclass(frozen=True)
class Trial:
    """Another reading, and how much better it is than the one that it was compared with."""

    reading: Reading
    margin: Margin
    is_informed: bool

    @property
    def is_better(self) -> bool:
        return self.margin.is_clear and self.is_informed


class Weigher:
    """Measures readings of one model on canvases, each of them once.

    Args:
        drafter: the drafter as it is declared.
        stretches: known text.
        masks: ids that may be its mask token.
    """

    def __init__(self, drafter: CheckedDrafter, stretches: Sequence[Stretch], masks: Sequence[int]) -> None:
        self.drafter, self.declared, self.masks = drafter, Reading.of(drafter), masks
        # A masked LM's class reads a mask at its own row and attends both ways: there is nothing else to try.
        self.axes: tuple[Axis, ...] = ("mask",) if isinstance(drafter, MaskedLMDrafter) else _AXES
        self.chance = -math.log(drafter.vocab_size)
        with_holes = drafter.attention.kind in ("full", "block")  # the others decode from left to right
        self.canvases = canvases(stretches, with_holes=with_holes)
        self.is_open = torch.tensor([canvas.is_open for canvas in self.canvases], device="cpu")[:, None]
        behind = [[*canvas.behind_masks, *[False] * (WINDOW - len(canvas.masked))] for canvas in self.canvases]
        self.behind_masks = torch.tensor(behind, device="cpu")
        self.scores: dict[Reading, Scored] = {}

    def score(self, reading: Reading) -> Scored:
        if reading not in self.scores:
            made = self.canvases
            if reading.attention != self.declared.attention:
                made = [canvas for canvas in made if canvas.is_open]
            found = score(reading.drafter(self.drafter), made)
            if len(made) < len(self.canvases):
                found = _spread(found, self.is_open[:, 0])
            self.scores[reading] = found
        return self.scores[reading]

    def above_chance(self, reading: Reading) -> Margin:
        """How much more likely the true tokens are than if all tokens were equally likely."""
        return Margin.of(self.score(reading).true - self.chance)

    def information(self, reading: Reading) -> Margin:
        """How much more likely the true tokens are than true tokens of other places."""
        found = self.score(reading)
        return Margin.of(found.true - found.other)

    def is_informed(self, reading: Reading) -> bool:
        """True if the model in this reading has learned the text's language and reads what is around a mask."""
        return self.above_chance(reading).is_clear and self.information(reading).is_clear

    def trials(self, reading: Reading, axis: Axis) -> Iterator[Trial]:
        """Readings that differ from this one in one part."""
        for other in reading.others(axis, self.masks):
            difference = self.score(other).true - self.score(reading).true
            if axis == "attention":
                difference = difference.where(self.is_open, torch.nan)
            elif axis == "shift":
                # The row before the first mask is that of a real token: in models that also predict the next token it knows
                # the first mask's token in either reading.
                difference = difference.where(self.behind_masks, torch.nan)
            yield Trial(other, Margin.of(difference), self.is_informed(other))

    def best_pair(self, reading: Reading) -> Trial | None:
        """The best reading with another shift and another mask token, if it is better."""
        if "shift" not in self.axes:
            return None
        trials = []
        for other in reading.pairs(self.masks):
            difference = self.score(other).true - self.score(reading).true
            trials.append(Trial(other, Margin.of(difference), self.is_informed(other)))
        return max((trial for trial in trials if trial.is_better), key=lambda trial: trial.margin.mean, default=None)


def _spread(found: Scored, where: Tensor) -> Scored:
    """Scores of some canvases as those of all, NaN where a canvas was left out."""
    true, other = (torch.full((len(where), WINDOW), torch.nan, device="cpu") for _ in range(2))
    true[where], other[where] = found.true, found.other
    return Scored(true, other, found.num_invalid)


def weigh(weigher: Weigher, tokenizer: Any) -> list[Finding]:
    """What the weights say of the declared reading.

    The best of all readings that are clearly better takes the place of the declared one, until none is better: a wrong shift
    makes other parts look wrong, too.
    """
    reading = weigher.declared
    wrong: dict[Axis, list[Trial]] = {}
    while True:
        trials = {axis: list(weigher.trials(reading, axis)) for axis in weigher.axes if axis not in wrong}
        better = {axis: [trial for trial in tried if trial.is_better] for axis, tried in trials.items()}
        if any(better.values()):
            axis = max(better, key=lambda axis: max((trial.margin.mean for trial in better[axis]), default=-math.inf))
            wrong[axis] = sorted(better[axis], key=lambda trial: -trial.margin.mean)
            reading = wrong[axis][0].reading
        elif not wrong and not weigher.is_informed(reading) and (pair := weigher.best_pair(reading)):
            wrong = {"shift": [pair], "mask": [pair]}  # neither helps alone
            reading = pair.reading
        else:
            break
    findings = [_prediction(weigher, reading)]
    if not weigher.is_informed(reading):
        return findings
    for axis in weigher.axes:
        name, used = f"weights: {axis}", _part(weigher.declared, axis, tokenizer)
        if axis in wrong:
            findings.append(_wrong(name, axis, used, wrong[axis], tokenizer))
        else:
            findings.append(_right(name, axis, used, trials[axis], tokenizer))
    return findings


def _prediction(weigher: Weigher, best: Reading) -> Finding:
    declared = weigher.declared
    mean = float(weigher.score(declared).true.nanmean())
    found, expected = f"{mean:.2f} nats a token", f"above chance, {weigher.chance:.2f}"
    name = "weights: text"
    if weigher.is_informed(declared):
        return Finding(name, found, expected, "ok")
    if best != declared:
        return Finding(
            name, found, expected, "not known", "The text is unlikely in the declared reading; see the problems."
        )
    if weigher.above_chance(declared).is_clear:
        return Finding(
            name, found, expected, "problem",
            f"True tokens are no likelier than tokens of other places ({weigher.information(declared)}): the model does not read "
            "its context. Check `spec=`, and whether the text is of a kind that the model was trained on (--text).",
        )  # fmt: skip
    return Finding(
        name, found, expected, "not known",
        f"In no reading is the text likelier than by chance. These weights look untrained: evidence not usable. {TEXT_OF_THEIRS}",
    )  # fmt: skip


def _wrong(name: str, axis: Axis, used: str, better: Sequence[Trial], tokenizer: Any) -> Finding:
    """A part of the reading that others are clearly better than, the best one first."""
    best, others = better[0], [_part(trial.reading, axis, tokenizer) for trial in better[1:]]
    said = _part(best.reading, axis, tokenizer)
    remedy = {
        "shift": f"use a `spec=` with logit_shift={best.reading.shift}",
        "mask": f"give mask_token_id={best.reading.mask} (--mask-token-id {best.reading.mask})",
        "attention": _remedy_of_attention(best.reading),
    }[axis]
    also = f" Better than {used} are {', '.join(others)}, too." if others else ""
    return Finding(
        name, used, f"{said}: {best.margin}", "problem",
        f"The text is likelier if the {_NAMES[axis]} is {said}, not {used}: by {best.margin} per token, where more than "
        f"{LEAST_NATS} nats and {LEAST_ERRORS:.0f} standard errors count.{also} If the text is ordinary for this model, {remedy}.",
    )  # fmt: skip


def _remedy_of_attention(reading: Reading) -> str:
    attention = reading.attention
    if attention.kind == "block":
        return f"give block_size={attention.block_size} (--block-size {attention.block_size}), or a `spec=` with it"
    return f"use a `spec=` with attention={attention.kind!r}"


def _right(name: str, axis: Axis, used: str, trials: Sequence[Trial], tokenizer: Any) -> Finding:
    """A part of the reading that nothing is clearly better than."""
    if not trials:
        return Finding(name, used, "no other to compare", "not known", "There is no other reading to compare with.")
    worse = [trial for trial in trials if (-trial.margin).is_clear]
    alike = [_part(trial.reading, axis, tokenizer) for trial in trials if trial not in worse]
    best = max(trials, key=lambda trial: trial.margin.mean)
    expected = f"{_part(best.reading, axis, tokenizer)}: {best.margin}"
    if not worse:
        return Finding(
            name, used, expected, "not known",
            f"No other reading is clearly better or worse ({', '.join(alike)}): the weights do not tell. Rely on what the files "
            "say.",
        )  # fmt: skip
    advice = f"The weights do not tell it from {', '.join(alike)}." if alike else ""
    return Finding(name, used, expected, "ok", advice)


def _part(reading: Reading, axis: Axis, tokenizer: Any) -> str:
    if axis == "shift":
        return str(reading.shift)
    return described_token(reading.mask, tokenizer) if axis == "mask" else describe(reading.attention)


def described_token(token: int, tokenizer: Any) -> str:
    """An id with the word that it is to the tokenizer."""
    word = None
    if tokenizer is not None and 0 <= token < len(tokenizer):
        word = tokenizer.convert_ids_to_tokens(token)
    return str(token) if word is None else f"{token} ({word})"
