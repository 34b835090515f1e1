"""The protocol of strategies, which select the tokens of the window that one step commits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from apd.decoding.commit import Proposal
from apd.decoding.protocols import RowMemory
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import Window

if TYPE_CHECKING:
    from typing_extensions import Self

    from apd.decoding.pair import ModelPair


class StrategySession(RowMemory, Protocol):
    """A strategy's memory for the length of one call."""

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        """Select the tokens of the window to commit.

        A finished row has no mask in the window; none of its positions may be decisive. Every other row must get a token
        committed within as many steps as it has masks.

        Args:
            state: the rows before the step.
            window: the columns to draft.
            pair: drafts and scores tokens, and counts forwards.
            sampling: temperature, truncation and keyed noise.
        """


class Strategy(Protocol):
    """Selects the tokens that a step commits. `APD` is a strategy; the others are in `apd.strategies`.

    Attributes:
        needs_drafter: True if the drafter runs.
        needs_verifier: True if the verifier runs.
        left_to_right: True if every commit is a prefix of the window. A strategy that commits in any order needs
            `kv_window=None` and processors that do not read earlier tokens.
        is_random: True if the strategy draws noise from the row's seed even in greedy decoding.
    """

    @property
    def needs_drafter(self) -> bool: ...

    @property
    def needs_verifier(self) -> bool: ...

    @property
    def left_to_right(self) -> bool: ...

    @property
    def is_random(self) -> bool: ...

    def open(self, state: DecodeState) -> StrategySession:
        """Start a session for these rows."""


def check_strategy(strategy: Any) -> None:
    """Refuse an object that does not implement `Strategy`.

    Raises:
        TypeError: a class, or an object without the attributes of the protocol.
    """
    if isinstance(strategy, type):
        raise TypeError(f"`strategy` must be an instance, got the class {strategy.__name__}. Call it.")
    names = ("needs_drafter", "needs_verifier", "left_to_right", "is_random", "open")
    missing = [name for name in names if not hasattr(strategy, name)]
    if len(missing) == len(names) and not hasattr(strategy, "propose"):
        raise TypeError(
            f"`strategy` must be an object such as `apd.Confidence(2)` or a name such as 'confidence:2', got {strategy!r}."
        )
    if missing:
        raise TypeError(
            f"`strategy` must have the attribute `{missing[0]}`, which {strategy!r} has not. Subclass `apd.Memoryless`, "
            "which has them all, or see `apd.Strategy`."
        )
    if not callable(strategy.open):
        raise TypeError(f"`strategy` must be a `Strategy`, got {strategy!r} without a method `open`.")


class OwnSession:
    """Base of objects that remember nothing from step to step, and are their own session."""

    def open(self, state: DecodeState) -> Self:
        return self

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, state: DecodeState) -> None:
        pass


class Memoryless(OwnSession):
    """A stateless strategy, which is its own session. Subclasses define `propose`."""

    needs_drafter = True
    needs_verifier = False
    left_to_right = False
    is_random = False
