r"""Texts with holes, decoded slowly and by definition, against `generate` in thousands of random settings.

    python tests/holes_by_definition.py --settings 2000

`Definition` decodes one row at a time and keeps nothing between steps. What a model must not see is not in its input at all:
columns are left out, and the others keep their true positions. Of the library it takes the models' weights only. A setting is
drafter, verifier, strategy, rows with holes, window, kv_window, sampling and seeds. Where the library refuses a setting, the
definition must say so, too. A tie is a setting in which two candidates were closer than float32 tells apart.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from toy import tiny_pair

from apd import APDSampler, MaskedDiffusionDrafter, MaskedLMDrafter
from benchmarks.masked_lms import MASK as BERT_MASK
from benchmarks.masked_lms import VOCABULARY, tiny

STOP, TIE = 7, 1e-4
SHIFTED, ALIGNED, BLOCKS, BERT = "shifted", "aligned", "in blocks", "bert"


@dataclass(frozen=True)
class Models:
    """A drafter and a verifier. `block`: columns of a block, 0 without."""

    sampler: APDSampler
    kind: str
    block: int = 0

    @property
    def mask(self) -> int:
        return self.sampler.drafter.mask_token_id


@functools.cache
def models_of(kind: str, seed: int) -> Models:
    if kind == BERT:
        drafter: Any = MaskedLMDrafter(tiny("bert", seed=seed), mask_token_id=BERT_MASK)
        return Models(APDSampler(drafter, tiny_pair(seed, VOCABULARY)[1]), kind)
    drafter, verifier = tiny_pair(seed)
    if kind == ALIGNED:
        drafter = MaskedDiffusionDrafter(drafter.model, mask_token_id=31, logit_shift=0)
    if kind == BLOCKS:
        drafter = MaskedDiffusionDrafter(
            drafter.model, mask_token_id=31, logit_shift=0, attention="block", block_size=8
        )
    return Models(APDSampler(drafter, verifier), kind, 8 * (kind == BLOCKS))


@dataclass(frozen=True)
class Setting:
    """One call. `order`: how the definition chooses, with its number; `strategy`: its name for the library."""

    models: Models
    rows: list[list[int]]
    seeds: list[int]
    more: int
    window: int | None
    temperature: float
    top_k: int
    order: tuple[str, float]
    strategy: str | None
    weight: float
    threshold: float
    correction: bool
    block: int | None
    kv_window: int | None
    needs_verifier: bool

    def call(self) -> list[list[int]]:
        """What the library makes of it, up to the first pad token behind a row's end."""
        width = max(map(len, self.rows))
        settings: dict[str, Any] = {"window_size": self.window, "max_new_tokens": self.more, "eos_token_id": STOP}
        if self.temperature:
            settings |= {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "seed": self.seeds}
        if self.strategy is None:
            settings |= {"mixture_weight": self.weight, "acceptance_threshold": self.threshold}
            settings |= {"correction": self.correction}
        if self.kv_window is not None:
            settings["kv_window"] = self.kv_window
        ids = torch.tensor([[0] * (width - len(row)) + row for row in self.rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in self.rows])
        found = self.models.sampler.generate(
            ids, attention_mask=mask, pad_token_id=0, strategy=self.strategy, **settings
        )
        return [row[width - len(mine) :] for row, mine in zip(found.tolist(), self.rows, strict=True)]

    def is_refused(self) -> bool:
        """Whether a row asks for what cannot be: a prediction from nothing, or a right side that nobody reads."""
        reads_before = self.needs_verifier or self.models.kind == SHIFTED
        for row in self.rows:
            masks = [i for i, token in enumerate(row) if token == self.models.mask]
            if masks and masks[0] == 0 and reads_before:
                return True
            behind = [i for i, token in enumerate(row) if token != self.models.mask and masks and i > masks[0]]
            if behind and self.order[0] in ("autoregressive", "wino"):
                return True
            if behind and self.models.block and masks[0] // self.models.block != behind[-1] // self.models.block:
                return True
        return False


class Definition:
    """One row of a setting, decoded by definition. `margin`: how close its closest decision was."""

    def __init__(self, setting: Setting, row: int) -> None:
        self.setting, self.models, self.seed = setting, setting.models, setting.seeds[row]
        prompt, mask = setting.rows[row], setting.models.mask
        self.ids: list[int | None] = [None if token == mask else token for token in prompt] + [None] * setting.more
        self.given = [token is not None for token in self.ids]
        self.prompt_end = len(prompt)
        self.given_end = max((i + 1 for i, given in enumerate(self.given) if given), default=0)
        self.margin = math.inf

    def decode(self) -> list[int]:
        while None in self.ids:
            window = self.window()
            drafts = self.drafts(window)
            chosen = self.judged(window, drafts) if self.setting.strategy is None else self.chosen(window, drafts)
            for column, token in chosen.items():
                self.ids[column] = token
            frontier = self.ids.index(None) if None in self.ids else len(self.ids)
            ends = [i for i in range(self.given_end, frontier) if self.ids[i] == STOP and not self.given[i]]
            if ends:
                return self.ids[: ends[0] + 1]  # type: ignore[return-value]
        return self.ids  # type: ignore[return-value]

    def window(self) -> list[int]:
        """The columns of a step: from the first mask to the M-th column that is not given."""
        first = self.ids.index(None)
        new = [i for i in range(first, len(self.ids)) if not self.given[i]][: self.setting.window]
        if size := self.models.block:
            new = [i for i in new if i // size == first // size]
        return list(range(first, new[-1] + 1))

    @torch.no_grad()
    def drafts(self, window: list[int]) -> dict[int, Tensor]:
        """log p_D at every mask of the window."""
        masks = [i for i in window if self.ids[i] is None]
        end = window[-1] + 1
        seen = [i for i, token in enumerate(self.ids) if token is not None or i < end]
        bias = torch.zeros(len(seen), len(seen))
        shift = int(self.models.kind == SHIFTED)
        if size := self.models.block:  # whole blocks stand in its input, and a column sees its own and earlier ones
            seen = list(range((window[0] // size + 1) * size))
            block = torch.tensor(seen) // size
            bias = torch.where(block[:, None] >= block, 0.0, -torch.inf)
        ids = [self.ids[i] if i < len(self.ids) and self.ids[i] is not None else self.models.mask for i in seen]
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([seen])}
        inputs["attention_mask"] = (
            torch.ones(1, len(seen)) if self.models.kind == BERT else bias[None, None]  # BERT takes no bias
        )
        logits = self.models.sampler.drafter.model(**inputs).logits[0].double()
        return {i: self.allowed(logits[seen.index(i - shift)], i) for i in masks}

    def allowed(self, logits: Tensor, column: int) -> Tensor:
        """log p at a column: never the mask token, and in a hole no stop token."""
        logits = logits.clone()
        logits[self.models.mask] = -math.inf
        if column < self.given_end:
            logits[STOP] = -math.inf
        return logits.log_softmax(-1)

    def drawn(self, logprobs: Tensor, column: int) -> int:
        """The token of a distribution under the noise of its column."""
        scores = logprobs
        if self.setting.temperature:
            scores = scores / self.setting.temperature
            if 0 < self.setting.top_k < len(scores):
                least = scores.topk(self.setting.top_k).values[-1]
                self.near(least - scores[scores < least].max())
                scores = scores.masked_fill(scores < least, -math.inf)
            scores = scores + gumbel(self.seed, column, len(scores))
        best = scores.topk(2)
        self.near(best.values[0] - best.values[1])
        return int(best.indices[0])

    def near(self, gap: Any) -> None:
        self.margin = min(self.margin, abs(float(gap)))

    def chosen(self, window: list[int], drafts: dict[int, Tensor]) -> dict[int, int]:
        """The tokens that a strategy without a verifier commits."""
        kind, number = self.setting.order
        candidates = list(drafts)
        if size := self.setting.block:  # of the strategy: they count from the end of the prompt
            first = (candidates[0] - self.prompt_end) // size
            candidates = [i for i in candidates if (i - self.prompt_end) // size == first]
        if kind == "left-to-right":
            return {i: self.drawn(drafts[i], i) for i in candidates[: int(number)]}
        tokens = {i: self.drawn(drafts[i], i) for i in candidates}
        sure = {i: float(drafts[i][token].exp()) for i, token in tokens.items()}
        ranked = sorted(candidates, key=lambda i: (-min(sure[i], 1 - 2.0**-19), i))
        for a, b in itertools.pairwise(ranked):
            self.near(sure[a] - sure[b])
        if kind == "threshold":
            for i in ranked[1:]:
                self.near(sure[i] - number)
            return {i: tokens[i] for i in candidates if sure[i] >= number or i == ranked[0]}
        return {i: tokens[i] for i in ranked[: int(number)]}

    def judged(self, window: list[int], drafts: dict[int, Tensor]) -> dict[int, int]:
        """The tokens that APD commits: the drafted ones up to the first that the mixture does not draw, too."""
        setting = self.setting
        tokens = {i: self.drawn(drafts[i], i) for i in drafts}
        verified = self.verified(window, tokens) if setting.weight < 1 else {}
        kept: dict[int, int] = {}
        for i, token in tokens.items():
            target = drafts[i]
            if setting.weight < 1:
                target = self.mixed(drafts[i], verified[i])
            own = self.drawn(target, i)
            sure = float(target[own].exp())
            if i != window[0] and setting.threshold:
                self.near(sure - setting.threshold)
            if i == window[0] or (own == token and sure >= setting.threshold):
                kept[i] = token
                continue
            if setting.correction and sure >= setting.threshold:
                kept[i] = own
            break
        return kept

    def mixed(self, drafted: Tensor, verified: Tensor) -> Tensor:
        """log p_T ∝ R log p_D + (1 − R) log p_AR."""
        impossible = drafted.isneginf() | verified.isneginf()
        mixture = self.setting.weight * drafted + (1 - self.setting.weight) * verified
        return mixture.masked_fill(impossible, -math.inf).log_softmax(-1)

    @torch.no_grad()
    def verified(self, window: list[int], tokens: dict[int, int]) -> dict[int, Tensor]:
        """log p_AR at every mask, given what stands before it: decided tokens and drafted ones."""
        ids = [tokens[i] if self.ids[i] is None else self.ids[i] for i in range(window[-1] + 1)]
        logits = self.models.sampler.verifier.model(input_ids=torch.tensor([ids])).logits[0].double()
        return {i: self.allowed(logits[i - 1], i) for i in tokens}


def gumbel(seed: int, column: int, size: int) -> Tensor:
    """The documented noise of a column, stream 0."""
    word = (1 << 64) - 1

    def mixed(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & word
        return x ^ x >> 31

    step = 0x9E3779B97F4A7C15
    key = mixed((mixed(seed) + step * (4 * column + 1)) & word)
    draws = [(mixed((key + step * (token + 1)) & word) >> 32) + 0.5 for token in range(size)]
    uniform = torch.tensor(draws, dtype=torch.float64).mul(2.0**-32).clamp(max=1 - 2.0**-24)
    return -(-(-uniform).log1p()).log()


def random_setting(rng: random.Random) -> Setting:
    kind = rng.choice((SHIFTED, SHIFTED, ALIGNED, BLOCKS, BERT))
    models = models_of(kind, rng.randrange(4))
    rows = [random_row(rng, models) for _ in range(rng.randint(1, 4))]
    order, strategy, block, needs_verifier = random_strategy(rng)
    weight = rng.choice((0.0, 0.3, 0.5, 0.8, 1.0))
    exact_cache = kind in (SHIFTED, ALIGNED) and (strategy is None or order[0] == "left-to-right") and block is None
    return Setting(
        models=models,
        rows=rows,
        seeds=[rng.randrange(1 << 40) for _ in rows],
        more=rng.choice((0, 0, 1, 4)),
        window=rng.choice((None, None, 1, 2, 3, 6)),
        temperature=rng.choice((0.0, 0.0, 0.7, 1.0, 1.5)),
        top_k=rng.choice((0, 0, 4)),
        order=order,
        strategy=strategy,
        weight=weight,
        threshold=rng.choice((0.0, 0.0, 0.4)),
        correction=rng.random() < 0.3,
        block=block,
        kv_window=rng.choice((None, 60)) if exact_cache else None,
        needs_verifier=weight < 1 if strategy is None else needs_verifier,
    )


def random_row(rng: random.Random, models: Models) -> list[int]:
    words = [i for i in range(models.sampler.vocab_size) if i not in (models.mask, STOP)]
    row = [rng.choice(words) for _ in range(rng.randint(2, 14))]
    if rng.random() < 0.05:
        row[rng.randrange(len(row))] = STOP  # a given one ends nothing
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        start = 0 if rng.random() < 0.05 else rng.randrange(1, len(row))
        for i in range(start, min(len(row), start + rng.randint(1, 5))):
            row[i] = models.mask
    return row


def random_strategy(rng: random.Random) -> tuple[tuple[str, float], str | None, int | None, bool]:
    """Order and number, name, blocks of the strategy, and whether a verifier runs."""
    if rng.random() < 0.35:
        return ("apd", 0), None, None, True
    if rng.random() < 0.04:
        name = rng.choice(("autoregressive", "wino:0.6"))
        return (name.partition(":")[0], 0), name, None, name == "autoregressive"
    kind = rng.choice(("left-to-right", "left-to-right", "threshold", "confidence"))
    number = rng.choice((0.1, 0.3, 0.6)) if kind == "threshold" else rng.choice((1, 1, 2, 3))
    name, block = f"{kind}:{number:g}", None
    if rng.random() < 0.2:
        block = rng.choice((2, 3, 5))
        name = f"blocks:{block}/{name}"
    if rng.random() < 0.5:
        proposer = rng.choice(("mixture", "verifier", "drafter", "lookup"))
        breadth = rng.choice(("", "", ",breadth=2"))
        name = f"checked:proposer={proposer},K={rng.choice(('2', '16', 'auto'))}{breadth}/{name}"
        return (kind, number), name, block, proposer in ("mixture", "verifier")
    return (kind, number), name, block, False


def outcome(setting: Setting) -> str:
    """`equal`, `refused`, `tie`, or what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if setting.is_refused():
            try:
                setting.call()
            except ValueError as error:
                return (
                    "refused"
                    if "hole" in str(error) or "first token" in str(error) or "revoke" in str(error)
                    else str(error)
                )
            return "not refused"
        found = setting.call()
    close = False
    for row, mine in enumerate(found):
        definition = Definition(setting, row)
        expected = definition.decode()
        if mine[: len(expected)] == expected and not any(mine[len(expected) :]):
            continue
        if definition.margin > TIE:
            return f"row {row}: {mine} instead of {expected}"
        close = True
    return "tie" if close else "equal"


def outcomes(settings: int, seed: int, tell: Callable[[str], None] = print) -> Iterator[str]:
    for number in range(settings):
        rng = random.Random(f"{seed} {number}")
        setting = random_setting(rng)
        while setting.order[0] in ("autoregressive", "wino") and not setting.is_refused():
            setting = random_setting(rng)  # these are refused for holes only, and have no definition here
        result = outcome(setting)
        if result not in ("equal", "refused", "tie"):
            tell(f"#{number} {result}\n    {setting}")
            result = "differ"
        yield result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally: Counter[str] = Counter()
    for number, result in enumerate(outcomes(options.settings, options.seed), 1):
        tally[result] += 1
        if number % 250 == 0:
            print(f"... {number}: {dict(tally)}", flush=True)
    print(
        f"{options.settings} settings: {tally['equal']} equal, {tally['tie']} ties, {tally['refused']} refused by both, "
        f"{tally['differ']} differ"
    )
    return 1 if tally["differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
