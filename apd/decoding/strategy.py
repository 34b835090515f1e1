"""What decoding asks of a strategy: which tokens of the window one step commits."""

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
        """Which tokens of the window to commit.

        A row that is done has no mask in the window, and nothing in it may be decisive. Of every other row a token must be
        committed within as many steps as it has masks.
        """


class Strategy(Protocol):
    """Decides which tokens a step commits. `APD` is one; the others are in `apd.strategies`.

    Attributes:
        needs_drafter: whether the drafter ever runs.
        needs_verifier: whether the verifier ever runs.
        left_to_right: whether it commits prefixes of the window only. Else it may commit in any order, which needs
            `kv_window=None` and processors that do not look at earlier tokens.
        is_random: whether it draws from the row's seed even where tokens are not sampled.
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
    """Refuse what cannot be a `Strategy`.

    Raises:
        TypeError: a class, or an object without the protocol's attributes, such as a name.
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


class Memoryless:
    """A strategy that is its own session: its proposal depends on the state alone. Subclasses define `propose`."""

    needs_drafter = True
    needs_verifier = False
    left_to_right = False
    is_random = False

    def open(self, state: DecodeState) -> Self:
        return self

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, state: DecodeState) -> None:
        pass
