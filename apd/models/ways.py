"""`find_way`: how a causal LM can be run as a verifier. Found by running it, because no common config field says so."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from apd.decoding.protocols import VerifierSession
from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.models.cache import cache_argument
from apd.models.own_cache import OwnCacheSession, rewindable_cache
from apd.models.transformer import attention_mask, check_evaluating, input_device
from apd.models.verifier import CausalVerifier, Way

#: Largest difference from the model's own logits, in units of the largest logit, that is taken for rounding.
MOST_DIFFERENCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}

#: What a model may raise when it is run in a way that it does not support.
UNSUPPORTED = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)


def find_way(model: PreTrainedModel) -> Way:
    """The fastest way in which the model's logits are those of each row alone, whatever was drafted before.

    Runs the model on a few tokens, several times. A model that can only be run without a cache gets a warning.

    Raises:
        ValueError: there is none: the model is not causal, or needs more than token ids; or it is in training mode.
    """
    check_evaluating(model, model.named_modules(), "verifier")
    way, reasons = try_ways(model)
    if way is None:
        raise ValueError(
            f"The verifier must score every token from the token ids before it, which {type(model).__name__} does not "
            f"({'; '.join(reasons)}). Choose another causal model, such as a Qwen or Llama with the drafter's tokenizer."
        )
    if way == "no cache":
        warnings.warn(
            f"{type(model).__name__} has no cache that can go back ({'; '.join(reasons)}). As a verifier it computes whole rows "
            "in every pass: the work of a pass grows with the row's length instead of the window's.",
            stacklevel=4,
        )
    return way


def try_ways(model: PreTrainedModel) -> tuple[Way | None, list[str]]:
    """The fastest right way, `None` if there is none, and why faster ones are not right."""
    reasons: list[str] = []
    for way in possible_ways(model, reasons):
        try:
            difference = largest_difference(model, way)
        except torch.OutOfMemoryError:
            raise
        except UNSUPPORTED as error:
            reasons.append(f"{way}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if difference <= MOST_DIFFERENCE.get(model.dtype, 2e-2):
            return way, reasons
        reasons.append(f"{way}: logits differ from the model's own by {difference:.2g} of the largest")
    return None, reasons


def possible_ways(model: PreTrainedModel, reasons: list[str]) -> Iterator[Way]:
    """Ways to try, the fastest first. Says in `reasons` why others are not possible."""
    own_mask = getattr(model.config, "is_causal", True) is False  # only a mask from outside makes this model causal
    if own_mask or _has_attention_only(model, reasons):
        yield "columns" if has_plain_head(model) else "own head"
    if own_mask:
        return
    try:
        cache_argument(model.__class__)
        rewindable_cache(model)
    except UNSUPPORTED as error:
        reasons.append(f"own cache: {error}")
    else:
        yield "own cache"
        yield "own cache, one by one"
    yield "no cache"


def _has_attention_only(model: PreTrainedModel, reasons: list[str]) -> bool:
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        reasons.append("columns: the model takes no `position_ids`")
    elif getattr(model, "_is_stateful", False) or any(
        not hasattr(layer, "keys") or hasattr(layer, "recurrent_states")
        for layer in DynamicCache(config=model.config).layers
    ):
        reasons.append("columns: the model has recurrent layers")
    else:
        return True
    return False


class _Recorder(nn.Module):
    """An output layer that gives the same logits whatever comes in, and keeps what came in."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.seen: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden)
        return self.logits.to(hidden)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its output layer's, given the last hidden states: neither scaled nor capped.

    Seen on large logits, where a cap shows, from a twin that shares all parts but the output layer.
    """
    head = model.get_output_embeddings()
    names = [name for name, module in model._modules.items() if module is head]
    weight = getattr(head, "weight", None)
    if head is None or len(names) != 1 or weight is None:
        return False
    ids = torch.arange(3, device=input_device(model))[None]
    noise = torch.randn(1, 3, weight.shape[0], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    recorder = _Recorder(100 * noise)
    twin = copy.copy(model)
    twin.__dict__["_modules"] = {**model._modules, names[0]: recorder}
    try:
        logits = type(model).forward(twin, input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    except torch.OutOfMemoryError:
        raise
    except UNSUPPORTED:
        return False
    if len(recorder.seen) != 1 or recorder.seen[0].shape != hidden.shape or logits.shape != recorder.logits.shape:
        return False
    same_logits = torch.equal(logits.float().cpu(), recorder.logits.to(recorder.seen[0].dtype).float())
    return same_logits and relative_difference(recorder.seen[0], hidden) <= MOST_DIFFERENCE.get(model.dtype, 2e-2)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected number; infinite if a number is not finite."""
    found, expected = found.cpu().double(), expected.cpu().double()
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    return difference if difference == difference else float("inf")


#: Tokens of the rows that `find_way` runs: the prompts, and the lengths of the rows.
PROMPTS, LENGTH = (5, 1), 14


@torch.no_grad()
def largest_difference(model: PreTrainedModel, way: Way) -> float:
    """The largest relative difference between logits of a verifier and of the model alone.

    Ragged rows, a draft that is taken back in the middle, one that goes on from there, and single tokens.
    """
    verifier = CausalVerifier(model, way)
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    ids = [7, 3, 11, 5, 2, 13, 3, 7, 1, 4, 9, 6, 8, 0]
    rows = [ids, ids[::-1][: LENGTH + PROMPTS[1] - PROMPTS[0]]]
    rows = [[each % verifier.vocab_size for each in row] for row in rows]
    if pad is not None and 0 <= pad < verifier.vocab_size:
        rows[0][2] = pad  # some models count positions by it
    expected = [_alone(model, row) for row in rows]
    paddings = [LENGTH - len(row) for row in rows]
    tokens = torch.tensor([[0] * padding + row for padding, row in zip(paddings, rows, strict=True)], device="cpu")
    prompt_end = PROMPTS[0]
    state = DecodeState.start(
        tokens[:, :prompt_end],
        max_new_tokens=LENGTH - prompt_end,
        mask_token_id=0,
        padding=torch.tensor(paddings, device="cpu"),
    )
    # An own cache saves recurrent states at every chance here, so that all that it can do is tried.
    session: VerifierSession = OwnCacheSession(model, state, again=0) if way == "own cache" else verifier.open(state)
    worst = 0.0
    calls = [(5, 9, True), (7, 12, False), (11, 12, False), (12, 13, False), (9, 13, False)]
    if way in ("columns", "own head"):
        calls = calls[:2]  # a single token is run as several are
    for frontier, end, is_wrong in calls:
        decided = torch.arange(LENGTH, device="cpu").expand(len(rows), -1) < frontier
        at = state.with_decided(torch.where(decided, tokens, 0), decided)
        window = Window.of_rows(at, [end] * len(rows))
        draft = window.gather(tokens)
        if is_wrong:
            draft[:, 2:] = (draft[:, 2:] + 1) % verifier.vocab_size
        logits = session.logits(at, window, draft)[:, :]
        if is_wrong:
            continue
        for row, padding, theirs in zip(logits, paddings, expected, strict=True):
            worst = max(
                worst, relative_difference(row, theirs[frontier - 1 - padding : end - 1 - padding].to(row.device))
            )
    return worst


def _alone(model: PreTrainedModel, row: list[int]) -> Tensor:
    """The model's own logits for one row without padding: `l v`."""
    ids = torch.tensor([row], device=input_device(model))
    mask = None  # a causal model builds its own mask
    if getattr(model.config, "is_causal", True) is False:
        causal = torch.ones(1, 1, len(row), len(row), dtype=torch.bool, device=ids.device).tril_()
        mask = attention_mask(causal, model)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
