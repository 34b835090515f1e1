"""`Checkpoint`: finds and reads the files of a checkpoint, in a directory or on the hub, and names a damaged file.

The errors of json, tokenizers and safetensors do not name the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open

from apd.kinds import OBJECT, TEXT, Kind, misfit

#: Arguments that say how a checkpoint is fetched, as in transformers.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin", "consolidated.00.pth")
_OF_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)

_POINTER = b"version https://git-lfs"
# The first bytes of damaged files, with cause and remedy.
_CAUSES = (
    (_POINTER, "It is a git-lfs pointer, what `git clone` leaves without git-lfs: run `git lfs pull` in the clone."),
    (b"\xef\xbb\xbf", "It begins with a byte order mark: save it as UTF-8 without one."),
    (b"<", "It is a page of HTML or XML, as a failed download leaves it: fetch the file again."),
)
_CONVERT = (
    "Convert them once, where you trust them: `safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
    '"model.safetensors", {"format": "pt"})`.'
)


#: Fields of tokenizer_config.json that a tokenizer uses after it was loaded.
TOKENIZER = {
    "model_max_length": Kind("a number", lambda value: isinstance(value, (int, float))),
    "padding_side": TEXT,
    "tokenizer_class": TEXT,
}


class Checkpoint:
    """The files of one checkpoint.

    Args:
        path: a directory, or a model id of the hub.
        hub: `HUB_ARGUMENTS`, for `hf_hub_download`.
    Raises:
        TypeError: `hub` has another argument.
    """

    def __init__(self, path: str | Path, hub: Mapping[str, Any]) -> None:
        for name in hub:
            if name not in HUB_ARGUMENTS:
                raise TypeError(
                    f"Unknown argument `{name}`. Besides the named ones, loading takes {', '.join(HUB_ARGUMENTS)}."
                )
        self.path = path
        self.hub = dict(hub)

    def find(self, name: str) -> Path | None:
        """Local path of a file, which is downloaded if necessary; `None` if the checkpoint has no such file."""
        found = self._look_up(name)
        return None if found is None else Path(found)

    def has(self, name: str) -> bool:
        """True if the checkpoint has this file. Nothing is downloaded."""
        return self._look_up(name, dry_run=True) is not None

    def _look_up(self, name: str, **how: Any) -> Any:
        if Path(self.path).is_dir():
            file = Path(self.path, name)
            return file if file.is_file() else None
        try:
            return hf_hub_download(str(self.path), name, **self.hub, **how)
        except (EntryNotFoundError, HFValidationError):  # no such file; not a valid model id
            return None

    def read_json(self, name: str, kinds: Mapping[str, Kind] | None = None) -> dict[str, Any] | None:
        """The fields of a JSON file; `None` if there is no such file.

        Args:
            name: file name.
            kinds: the required kind of each field, for the fields that are present.
        Raises:
            ValueError: the file does not hold a JSON object, or a field has another kind.
        """
        file = self.find(name)
        if file is None:
            return None
        content = file.read_bytes()
        try:
            fields = json.loads(content.decode())
        except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
            raise ValueError(f"{file} is not JSON ({error}). {_cause(content)}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{file} must hold a JSON object, {{…}}, got {content[:40].decode(errors='replace')!r}.")
        if complaint := misfit(fields, kinds or {}, f" in {file}"):
            raise ValueError(complaint)
        return fields

    def refuse_adapter(self) -> None:
        """Refuse a LoRA or other adapter: transformers would load its base model from any place that the adapter names.

        Raises:
            ValueError: the checkpoint has an adapter_config.json.
        """
        adapter = self.read_json("adapter_config.json")
        if adapter is not None:
            raise ValueError(
                f"{str(self.path)!r} holds an adapter (adapter_config.json, {adapter.get('peft_type')}), which is not merged "
                f"into a model here. Load its base model, {adapter.get('base_model_name_or_path')!r}, and give "
                f"`peft.PeftModel.from_pretrained(base_model, {str(self.path)!r}).merge_and_unload()`, or a directory where "
                "that was saved. Remove adapter_config.json if it is left over."
            )

    def weight_files(self) -> list[str]:
        """Names of the safetensors files from which transformers will read the weights.

        config.json may name a file or an index, and an index may name any file. transformers would unpickle files that
        do not end in `.safetensors`.

        Raises:
            ValueError: the index is damaged, or config.json or the index names a pickle.
            OSError: there are no weights, or only pickled ones.
        """
        field = "transformers_weights"
        config = self.read_json("config.json", {field: TEXT}) or {}
        name: str = config.get(field) or (_WHOLE if self.has(_WHOLE) else _INDEX)
        if name.endswith(".safetensors"):
            return [name]
        if not name.endswith(".safetensors.index.json"):
            raise ValueError(
                f"`{field}` in config.json of {str(self.path)!r} must name a safetensors file or index, got {name!r}: "
                f"pickled weights are never read. {_CONVERT}"
            )
        index = self.read_json(name, {"metadata": OBJECT, "weight_map": OBJECT})
        if index is None:
            raise FileNotFoundError(self._no_weights(name))
        if missing := [field for field in ("metadata", "weight_map") if index.get(field) is None]:
            raise ValueError(f"`{missing[0]}` is missing in {self.find(name)}: it is no index of weights.")
        files = sorted(set(map(str, index["weight_map"].values())))
        for file in files:
            if not file.endswith(".safetensors"):
                raise ValueError(
                    f"{self.find(name)} must name safetensors files only, got {file!r}: pickled weights are never read. "
                    f"{_CONVERT}"
                )
        if Path(self.path).is_dir() and (lost := [file for file in files if not self.has(file)]):
            raise FileNotFoundError(
                f"{str(self.path)!r} lacks {len(lost)} of the {len(files)} files of weights that {name} names, such as "
                f"{lost[0]}. Fetch them."
            )
        return files

    def _no_weights(self, name: str) -> str:
        if pickled := [file for file in _PICKLES if self.has(file)]:
            return (
                f"{str(self.path)!r} has its weights in {pickled[0]} and not in safetensors: pickled weights are never read. "
                f"{_CONVERT}"
            )
        return f"No weights found in {str(self.path)!r}: neither {_WHOLE} nor {name} is there. Fetch them."

    @contextmanager
    def reading_weights(self) -> Iterator[None]:
        """Name the damaged file if transformers fails to read the weights inside this context.

        Raises:
            ValueError: a file is damaged, or as in `weight_files`.
            OSError: as in `weight_files`.
        """
        names = self.weight_files()
        try:
            yield
        except SafetensorError as error:
            at_hand = Checkpoint(self.path, self.hub | {"force_download": False, "local_files_only": True})
            for file in filter(None, map(at_hand.find, names)):
                try:
                    safe_open(file, framework="pt")
                except SafetensorError as reason:
                    raise ValueError(f"{file} is not safetensors ({reason}). {_cause(_head(file))}") from error
            raise ValueError(f"The weights of {str(self.path)!r} cannot be read: {error}.") from error

    @contextmanager
    def reading_tokenizer(self) -> Iterator[None]:
        """Name the damaged file if transformers fails to read the tokenizer inside this context.

        Raises:
            ValueError: a file is damaged, or the files do not make a tokenizer.
        """
        template = self.find("chat_template.jinja")
        if template is not None:  # transformers accepts any text as a template, a git-lfs pointer too
            _refuse_pointer(template)
        try:
            yield
        except ImportError:  # its message names the missing package
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            at_hand = Checkpoint(self.path, self.hub | {"force_download": False})
            for name in _OF_TOKENIZER:
                if name.endswith(".json"):
                    at_hand.read_json(name)
                elif file := at_hand.find(name):
                    _refuse_pointer(file)
            found = [name for name in _OF_TOKENIZER if at_hand.has(name)]
            if not found:
                raise
            raise ValueError(
                f"The tokenizer of {str(self.path)!r} cannot be read from {', '.join(found)}: {type(error).__name__}: {error}"
            ) from error


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(100)


def _refuse_pointer(file: Path) -> None:
    if (head := _head(file)).startswith(_POINTER):
        raise ValueError(f"{file} is damaged. {_cause(head)}")


def _cause(head: bytes) -> str:
    """The likely cause of the damage and the remedy, from the first bytes of the file."""
    if not head.strip():
        return "It is empty, as an interrupted download or a full disk leaves it: fetch it again."
    for beginning, cause in _CAUSES:
        if head.lstrip().startswith(beginning):
            return cause
    return "It is cut off, or was edited or written by something else: fetch it again."
