"""`ModelSpec`: everything that distinguishes one family of diffusion LMs from another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from apd.models.config_fields import RawConfig, decoder_fields, need
from apd.models.horizon import Attention, Kind
from apd.models.masked_lm import is_masked_lm


@dataclass(frozen=True)
class ModelSpec:
    """Everything that distinguishes one family of masked-diffusion models from another.

    Args:
        name: the family's name, as in `spec="dream"`.
        model_class: the transformers class that computes the model: a decoder, with `config.is_causal=False` for "full"
            attention, or a masked LM, which needs nothing else.
        logit_shift: 1 if row i-1 of the logits predicts the token at position i, as in models adapted from a causal one
            (Dream); 0 if row i does (LLaDA).
        config_fields: function from the content of `config.json` to the arguments of the config class.
        key_mapping: regular expressions over the checkpoint's weight names, and their replacements in `model_class`. Each
            may have one capture group at most: transformers leaves the weights of a pattern with two at random values.
        model_types, architectures: values in `config.json` that identify the family; both must match. If empty, the family
            is used only if `spec=` names it.
        attention: which columns see each other: "full", "causal", "prefix" or "block", see `apd.models.horizon`.
        block_size: length of the blocks, or of a causal or prefix model's draft, where `config.json` does not say it;
            `None`: it must be given, for "causal" and "prefix" there is no limit then.
        block_field: name of the block length in `config.json`; "" if it has none.
        anchored: for "prefix": blocks stand still until they are decided, see `apd.models.horizon`.
        mask_token_id: id of the mask token where neither `config.json` nor the tokenizer says it, as in families whose
            code has it as a default argument.
        mask_field: name of the mask token's id in `config.json`.
        where: further values of `config.json` that identify the family.
        reads_causally: True if the model was trained to predict the next token under a causal mask, too, so that it can
            verify its own draft (`verifier="self"`).
        config_class: the config class, where it is another than `model_class` names.

    Raises:
        ValueError: `logit_shift` is neither 0 nor 1, an unknown kind of attention, a block size with "full" attention,
            `anchored` with another than "prefix", or a masked LM with a shift, with another than "full" attention, or that reads causally.
        TypeError: the block size is not a whole number.

    Example:
        >>> mine = ModelSpec("mine", Qwen3ForCausalLM, logit_shift=1)
        >>> drafter = load_drafter("path/to/checkpoint", spec=mine, mask_token_id=151669)
    """

    name: str
    model_class: type[PreTrainedModel]
    logit_shift: int
    config_fields: Callable[[RawConfig], dict[str, Any]] = decoder_fields
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    attention: Kind = "full"
    block_size: int | None = None
    block_field: str = ""
    anchored: bool = False
    mask_token_id: int | None = None
    mask_field: str = "mask_token_id"
    where: Mapping[str, Any] = field(default_factory=dict)
    reads_causally: bool = False
    config_class: type[PreTrainedConfig] | None = None

    def __post_init__(self) -> None:
        if self.logit_shift not in (0, 1):
            raise ValueError(
                f"`logit_shift` must be 0 (token i predicted at row i) or 1 (at row i-1), got {self.logit_shift!r}."
            )
        named = (self.logit_shift, self.attention, self.reads_causally)
        if self.is_masked_lm and named != (0, "full", False):
            raise ValueError(
                f"A masked LM such as {self.model_class.__name__} predicts each mask at its own row and sees the whole row: "
                "`logit_shift` must be 0, `attention` 'full' and `reads_causally` False, got "
                f"{self.logit_shift}, {self.attention!r} and {self.reads_causally}."
            )
        needs_size = self.attention == "block" or self.anchored
        Attention(self.attention, 1 if needs_size and self.block_size is None else self.block_size, self.anchored)

    @property
    def is_masked_lm(self) -> bool:
        """True if the class is a masked LM of transformers (`MaskedLMDrafter`)."""
        return is_masked_lm(self.model_class)

    @property
    def keeps_keys(self) -> bool:
        """True if the drafter can keep keys and values between passes."""
        return not self.is_masked_lm

    def matches(self, raw: RawConfig) -> bool:
        """True if a checkpoint with this `config.json` belongs to the family."""
        return self.is_named(raw) and all(raw.get(name) == value for name, value in self.where.items())

    def is_named(self, raw: RawConfig) -> bool:
        """True if model type and architecture are the family's, whatever `where` says."""
        named = raw.get("architectures") or ()
        return raw.get("model_type") in self.model_types and any(name in self.architectures for name in named)

    def config(self, fields: Mapping[str, Any]) -> PreTrainedConfig:
        """A config of the class that computes the model, with these fields."""
        return (self.config_class or self.model_class.config_class)(**fields)

    def attention_of(self, raw: RawConfig, block_size: int | None) -> Attention:
        """What the columns of a checkpoint with this `config.json` see.

        Args:
            raw: the content of `config.json`.
            block_size: overrides the one in `config.json`, which overrides the family's.
        Raises:
            ValueError: a block size below 1 or with "full" attention, or none where it is needed.
            TypeError: the block size is not a whole number.
        """
        if block_size is None and raw.get(self.block_field) is not None:
            need(raw, self.block_field)
            block_size = raw[self.block_field]
        return Attention(self.attention, self.block_size if block_size is None else block_size, self.anchored)
