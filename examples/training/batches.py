"""What a network of the pair reads in one training step: rows, masks, and which columns see which."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TAIL_WEIGHT = 0.15  # loss weight of the <eos>s behind the first one


@dataclass(frozen=True)
class Shape:
    """Sizes of training rows, in tokens.

    Args:
        row: prompt and canvas.
        canvas: positions that are decoded: answer and the <eos> tail.
        longest_row: the longest prompt and answer, <eos> included.
        longest_answer: the longest answer, <eos> included.
    """

    row: int
    canvas: int
    longest_row: int
    longest_answer: int


@dataclass(frozen=True)
class Example:
    """A solved prompt, in tokens.

    Args:
        prompt: the question.
        answer: one right answer, without <eos>.
        newcomer: the token of a new name in the answer, -1 if there is none.
        is_story: whether it is arithmetic.
    """

    prompt: list[int]
    answer: list[int]
    newcomer: int = -1
    is_story: bool = False


@dataclass(frozen=True)
class Rows:
    """A batch of solved instances, right-padded.

    Args:
        ids: `b n`, prompt, answer, <eos>s, padding.
        starts: `b 1`, where the canvas starts, that is the length of the prompt.
        tails: `b 1`, where the tail starts, that is behind the first <eos>.
        ends: `b 1`, where the canvas ends; the same as `tails` in a row that ends inside the answer.
        newcomers: `b 1`, token of the new name, -1 if there is none.
        is_story: `b 1` bool, whether the row is arithmetic.
    """

    ids: Tensor
    starts: Tensor
    tails: Tensor
    ends: Tensor
    newcomers: Tensor
    is_story: Tensor


@dataclass(frozen=True)
class RowSource:
    """Draws training rows; a function of (seed, step) only, so that a resumed run sees the same data.

    Args:
        examples: yields examples, from (source of randomness, how many, half of the training).
        shape: sizes of the rows.
        pad: id of the padding.
        eos: id of the stop token.
        seed: any integer.
    """

    examples: Callable[[random.Random, int, int], Iterator[Example]]
    shape: Shape
    pad: int
    eos: int
    seed: int

    def draw(self, step: int, count: int, half: int, cut: float = 0.0, block_size: int | None = None) -> Rows:
        """`count` rows; `half` (0 or 1) of the training chooses the examples.

        A share `cut` ends inside the answer. With a `block_size` all rows end with the block of the first <eos> instead.
        """
        rng, shape = random.Random(f"rows {self.seed} {step}"), self.shape
        length = shape.longest_row + -shape.longest_row % block_size if block_size else shape.row
        ids, bounds, stories = [], [], []
        for example in self.examples(rng, count, half):
            prompt, answer = example.prompt, [*example.answer, self.eos]
            room = min(shape.canvas, shape.row - len(prompt))
            if block_size:
                canvas = len(answer) + -(len(prompt) + len(answer)) % block_size
            elif rng.random() < cut:
                canvas = rng.randint(1, len(answer) - 1)
            else:
                canvas = room if rng.random() < 0.6 else rng.randint(len(answer), room)
            row = prompt + (answer + [self.eos] * canvas)[:canvas]
            bounds.append((len(prompt), min(len(prompt) + len(answer), len(row)), len(row), example.newcomer))
            ids.append(row + [self.pad] * (length - len(row)))
            stories.append([example.is_story])
        return Rows(torch.tensor(ids), *torch.tensor(bounds).split(1, dim=1), torch.tensor(stories))


def mask_rows(rows: Rows, is_content: Tensor, generator: torch.Generator, half: int) -> tuple[Tensor, Tensor]:
    """Choose what to mask; returns the mask and the loss weights, both `b n`.

    The second half of the training emphasises the weak points of the first half. Stories are masked from a frontier on,
    because otherwise a sum is visible in the next equation. A new name without a fixed place that is still missing, with
    one or two masks left, weighs four times as much: the model must notice there that the name is missing. (The weight
    depends on visible tokens only, so the learned probabilities stay right.)

    Args:
        rows: the solved rows.
        is_content: `v` bool, the tokens that carry the answer (names and numbers); the others are punctuation, which
            confidence order uncovers first.
        generator: source of randomness.
        half: 0 or 1, of the training.
    """
    b, n = rows.ids.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    position = torch.arange(n).expand(b, n)
    canvas = (position >= rows.starts) & (position < rows.ends)
    answer = canvas & (position < rows.tails)
    tail = canvas & ~answer
    content = answer & is_content[rows.ids]

    # Left to right: everything from a uniform frontier on, the nearest tokens weighing most.
    frontier = rows.starts + (uniform(b, 1) * (rows.tails - rows.starts)).long()
    behind_frontier = canvas & (position >= frontier)
    frontier_weight = 1 / (1 + (position - frontier).clamp(min=0) / 4)

    # Any order: k of the content tokens, k uniform; punctuation and tail all visible, all masked, or at the same rate.
    num_content = content.sum(1, keepdim=True)
    k = 1 + (uniform(b, 1) * num_content).long()
    rate = k / num_content.clamp(min=1)
    order = uniform(b, n)
    # In confidence order a name with a random place stays masked to the last: such states are drawn often.
    hide_newcomer = content & (rows.ids == rows.newcomers) & (uniform(b, 1) < 0.4)
    order = torch.where(content, order - hide_newcomer.float(), 2.0)
    masked_content = content & (order.argsort(1).argsort(1) < k)
    punctuation_rate = torch.where(uniform(b, 1) < 0.5, 0.0, rate)
    masked_punctuation = answer & ~content & (uniform(b, n) < punctuation_rate)
    tail_kind = uniform(b, 1)
    tail_rate = torch.where(tail_kind < 0.5, 0.0, torch.where(tail_kind < 0.75, 1.0, rate))
    masked_tail = tail & (uniform(b, n) < tail_rate)
    any_order = masked_content | masked_punctuation | masked_tail

    is_cut = rows.ends == rows.tails
    share = torch.where(is_cut, 0.7, 0.4)
    if half == 1:
        share = torch.where(rows.is_story, 0.8, share)
    left_to_right = (uniform(b, 1) < share) | (num_content == 0)
    masked = torch.where(left_to_right, behind_frontier, any_order)
    weight = torch.where(left_to_right, frontier_weight, 1.0) * torch.where(tail, TAIL_WEIGHT, 1.0)
    weight = normalise(weight * masked)
    if half == 1:
        is_missing = (masked & (rows.ids == rows.newcomers)).any(1, keepdim=True)
        is_late = (masked & content).sum(1, keepdim=True) <= 2
        weight = weight * torch.where(is_missing & is_late & ~is_cut, 4.0, 1.0)
    return masked, weight


@dataclass(frozen=True)
class Batch:
    """What a network reads in one step, and what it should say.

    Args:
        inputs: `b n`, token ids.
        targets: `b m`, the token that each of the first m columns should predict.
        weights: `b m`, loss weights of the targets.
        visible: `b 1 n n` bool, which columns (last) a column sees.
        positions: `b n` or `1 n`, position of each column in its row.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    visible: Tensor
    positions: Tensor


def causal_batch(rows: Rows) -> Batch:
    """Rows as they are; every token sees those before it."""
    n = rows.ids.shape[1]
    position = torch.arange(n)
    canvas = (position >= rows.starts) & (position < rows.ends)
    weights = normalise(canvas * torch.where(position < rows.tails, 1.0, TAIL_WEIGHT))
    visible = (position < rows.ends)[:, None, None, :] & torch.ones(n, n).tril().bool()
    return Batch(rows.ids, rows.ids[:, 1:], weights[:, 1:], visible, position[None])


def full_batch(rows: Rows, mask: int, noise: Callable[[Rows], tuple[Tensor, Tensor]]) -> Batch:
    """Rows with masks (id `mask`) that `noise` chooses, see `mask_rows`; every token sees all others."""
    n = rows.ids.shape[1]
    position = torch.arange(n)
    masked, weights = noise(rows)
    visible = (position < rows.ends)[:, None, None, :].expand(-1, 1, n, -1)
    inputs = torch.where(masked, mask, rows.ids)
    return Batch(inputs, rows.ids[:, 1:], weights[:, 1:], visible, position[None])


def block_batch(
    rows: Rows, mask: int, noise: Callable[[Rows], tuple[Tensor, Tensor]], block_size: int, shape: Shape
) -> Batch:
    """All blocks of the answers with masks, each behind its finished blocks, in one pass.

    A row is there twice: `clean`, then its answer's blocks once more, `noisy`. Clean columns see the clean columns up to
    their block's end; noisy ones see the clean blocks before theirs, and their own noisy block. This is what decoding
    shows them. The first token of a block is predicted at the last clean column before it.

    Args:
        rows: rows that end with a block.
        mask: id of the mask token.
        noise: as in `full_batch`; it sees every noisy block as a row of its own.
        block_size: tokens per block, counted from the start of the row.
        shape: sizes of the rows.
    """
    b, n = rows.ids.shape
    num_clean = (shape.longest_row - 1) // block_size * block_size
    num_blocks = (shape.longest_answer + 2 * (block_size - 1)) // block_size
    first = rows.starts // block_size * block_size
    clean = torch.arange(num_clean).expand(b, -1)
    noisy = first + torch.arange(num_blocks * block_size)
    positions = torch.cat([clean, noisy], 1)

    ids = F.pad(
        rows.ids, (0, shape.longest_row + num_blocks * block_size - n)
    )  # any value: it is never seen, and weighs 0
    block_starts = noisy[:, ::block_size].reshape(-1, 1)

    def in_block(bounds: Tensor) -> Tensor:
        return (bounds.repeat_interleave(num_blocks, 0) - block_starts).clamp(0, block_size)

    blocks = Rows(
        ids=ids.gather(1, noisy).view(-1, block_size),
        starts=in_block(rows.starts),
        tails=in_block(rows.tails),
        ends=in_block(rows.ends),
        newcomers=rows.newcomers.repeat_interleave(num_blocks, 0),
        is_story=rows.is_story.repeat_interleave(num_blocks, 0),
    )
    masked, weights = noise(blocks)
    weights = torch.where(blocks.ends > 0, weights, 0.0)  # a short answer has fewer blocks
    inputs = torch.cat([ids[:, :num_clean], torch.where(masked, mask, blocks.ids).view(b, -1)], 1)

    # Column r predicts token r + 1; weights of the first tokens of blocks belong to the clean column before.
    weights = weights.view(b, num_blocks, block_size)
    next_weights = torch.zeros(b, positions.shape[1])
    next_weights[:, num_clean:] = F.pad(weights[:, :, 1:], (0, 1)).flatten(1)
    last_before = noisy[:, ::block_size].sub(1).clamp(0, num_clean - 1)
    next_weights.scatter_add_(1, last_before, weights[:, :, 0])
    targets = ids.gather(1, positions + 1)

    block = positions // block_size
    is_noisy = torch.arange(positions.shape[1]) >= num_clean
    same, earlier = block[:, :, None] == block[:, None, :], block[:, :, None] > block[:, None, :]
    visible = torch.where(is_noisy, is_noisy[:, None] & same, earlier | (~is_noisy[:, None] & same))
    visible = visible & (positions < rows.ends)[:, None, :]
    return Batch(inputs, targets, next_weights, visible[:, None], positions)


def normalise(weights: Tensor) -> Tensor:
    """Scale the weights of each row to a sum of 1."""
    return weights / weights.sum(1, keepdim=True)
