"""Canvases: stretches of known text with a few tokens masked, as decoding shows them to a drafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apd.decoding.probability import log_normalise
from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.models.drafter import MaskedDiffusionDrafter
from apd.models.masked_lm import MaskedLMDrafter

#: Drafters whose weights can be tried.
CheckedDrafter = MaskedDiffusionDrafter | MaskedLMDrafter

#: Masks behind a frontier, and where in an answer the frontiers are.
WINDOW, FRONTIERS = 8, (0.1, 0.4, 0.7)
#: Masks of a hole, and where in an answer the holes of one canvas begin.
HOLE, HOLES = 3, (0.25, 0.6)
#: Log-probability, in nats, of tokens that a model excludes, so that means stay finite.
LEAST_LOGPROB = -100.0
#: Canvases of one pass.
_ROWS = 16


@dataclass(frozen=True)
class Stretch:
    """A piece of text as ids: a prompt and its true continuation."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Canvas:
    """A stretch with masks.

    Attributes:
        ids: the true ids, up to the end of the canvas.
        masked: the masked places, ascending.
        is_open: all places behind the first mask are masked, as in decoding from left to right; else text follows.
    """

    ids: tuple[int, ...]
    masked: tuple[int, ...]
    is_open: bool

    @property
    def behind_masks(self) -> list[bool]:
        """For each masked place, whether the one before it is masked, too."""
        return [place - 1 in self.masked for place in self.masked]


def canvases(stretches: Sequence[Stretch], *, with_holes: bool) -> list[Canvas]:
    """Canvases of each stretch: masks behind a few frontiers, and holes in the text if `with_holes`."""
    made = []
    for stretch in stretches:
        first, length = len(stretch.prompt), len(stretch.answer)
        for part in FRONTIERS:
            start = first + int(part * length)
            end = min(start + WINDOW, first + length)
            made.append(Canvas(stretch.ids[:end], tuple(range(start, end)), is_open=True))
        if with_holes and length > 2 * HOLE + 2:
            starts = [first + int(part * length) for part in HOLES]
            places = sorted({place for start in starts for place in range(start, start + HOLE)})
            made.append(Canvas(stretch.ids, tuple(place for place in places if place < first + length), is_open=False))
    return made


@dataclass(frozen=True)
class Scored:
    """What a drafter says of the masked places of canvases.

    Attributes:
        true: `n 8` float32: log-probability of the true token, in nats; NaN where the drafter does not draft the place, and
            behind a canvas's last mask.
        other: `n 8` float32: the same, of true tokens of other places, their mean.
        num_invalid: masked places with a distribution that is no distribution: NaN, +∞, or −∞ everywhere.
    """

    true: Tensor
    other: Tensor
    num_invalid: int


def score(drafter: CheckedDrafter, made: Sequence[Canvas]) -> Scored:
    """The log-probabilities of the true tokens of canvases, in uncached passes of the drafter."""
    true = torch.full((len(made), WINDOW), torch.nan, device="cpu")
    other, num_invalid = true.clone(), 0
    everything = [canvas.ids[place] for canvas in made for place in canvas.masked]
    for first in range(0, len(made), _ROWS):
        part = made[first : first + _ROWS]
        places, drafted, logits = masked_logits(drafter, part)
        found = [[each.ids[place] for place in row] for each, row in zip(part, places, strict=True)]
        of_true, of_others, is_invalid = read(logits, found, everything)
        rows, size = slice(first, first + len(part)), of_true.shape[1]
        num_invalid += int((is_invalid & drafted).sum())
        true[rows, :size] = of_true.where(drafted, torch.nan)
        other[rows, :size] = of_others.where(drafted, torch.nan)
    return Scored(true, other, num_invalid)


def read(logits: Tensor, true: Sequence[Sequence[int]], others: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of true tokens, the mean of those of other tokens, and where logits are no distribution, on the host.

    Args:
        logits: `n k v`.
        true: `n` rows of k ids.
        others: ids.
    Returns:
        `n k` float32 in nats, twice, and `n k` bool.
    """
    logprobs, device = log_normalise(logits), logits.device
    is_invalid, logprobs = logprobs.isnan().any(-1), logprobs.clamp(min=LEAST_LOGPROB)
    of_true = logprobs.gather(-1, to_device(true, device)[..., None]).squeeze(-1)
    of_others = logprobs[..., to_device(others, device)].mean(-1)
    return of_true.cpu(), of_others.cpu(), is_invalid.cpu()


def masked_logits(
    drafter: CheckedDrafter, made: Sequence[Canvas], more_padding: int = 1
) -> tuple[list[list[int]], Tensor, Tensor]:
    """The drafter's logits at the masked places of a few canvases, from one pass.

    Returns:
        The masked places of each canvas, the last one repeated where there are fewer than k; which of them the drafter drafts
        in this pass, `n k` bool; and the logits, `n k v`.
    """
    state = state_of(drafter, made, more_padding)
    ends = window_ends(drafter, state)
    window = Window.of_rows(state, ends)
    size = max(len(canvas.masked) for canvas in made)
    places = [[*canvas.masked, *[canvas.masked[-1]] * (size - len(canvas.masked))] for canvas in made]
    positions, drafted = [], []
    for canvas, row, t, end, padding in zip(
        made, places, state.layout.frontier, ends, state.layout.padding, strict=True
    ):
        columns = [place + padding for place in row]
        real = [j < len(canvas.masked) and column < end for j, column in enumerate(columns)]
        drafted.append(real)
        positions.append([column - t if inside else 0 for column, inside in zip(columns, real, strict=True)])
    index = torch.arange(len(made), device=drafter.device)[:, None]
    logits = drafter.open(state).logits(state, window)[index, to_device(positions, drafter.device)]
    return places, torch.tensor(drafted, device="cpu"), logits


def window_ends(drafter: CheckedDrafter, state: DecodeState) -> list[int]:
    """Per row, the end of what the drafter drafts in a pass."""
    if isinstance(drafter, MaskedLMDrafter):
        return list(state.layout.end)
    return [min(pair) for pair in zip(state.layout.end, drafter.window_ends(state), strict=True)]


def state_of(drafter: CheckedDrafter, made: Sequence[Canvas], more_padding: int = 1) -> DecodeState:
    """The rows of a batch that shows these canvases.

    Args:
        more_padding: columns of padding in front of the longest row. One makes every pass get a mask; without, a model whose
            config says that it is causal could not be read in another way.
    """
    before = max(canvas.masked[0] for canvas in made) + more_padding
    behind = max(len(canvas.ids) - canvas.masked[0] for canvas in made)
    paddings = [before - canvas.masked[0] for canvas in made]
    prompt = [
        [0] * padding + list(canvas.ids[: canvas.masked[0]]) for canvas, padding in zip(made, paddings, strict=True)
    ]
    device, mask = drafter.device, drafter.mask_token_id
    state = DecodeState.start(
        to_device(prompt, device),
        max_new_tokens=behind,
        mask_token_id=mask,
        padding=to_device(paddings, device),
    )
    tokens, decided, ends = [], [], []
    for canvas, padding in zip(made, paddings, strict=True):
        missing = state.width - padding - len(canvas.ids)
        hidden = set(canvas.masked)
        shown = [mask if place in hidden else token for place, token in enumerate(canvas.ids)]
        tokens.append([0] * padding + shown + [mask] * missing)
        decided.append([True] * padding + [place not in hidden for place in range(len(canvas.ids))] + [True] * missing)
        ends.append(padding + len(canvas.ids))
    state = dataclasses.replace(state, end=to_device(ends, device))
    return state.with_decided(to_device(tokens, device), torch.tensor(decided, device="cpu").to(device))
