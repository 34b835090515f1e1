"""`Stored`: what the files of a checkpoint say about it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from apd.models.checkpoint import Checkpoint
from apd.models.families import recognise
from apd.models.spec import ModelSpec


@dataclass(frozen=True)
class Stored:
    """What the files of a checkpoint say.

    Attributes:
        path: the directory or the id on the hub; "" for a model that was made in memory.
        config, generation: the fields of config.json and of generation_config.json; empty where there is none.
        spec: the family that config.json names; `None` if it names none.
    """

    path: str
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    spec: ModelSpec | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, revision: str | None = None) -> Stored:
        """The files that a model was loaded from, if they are at hand; nothing is downloaded."""
        path = str(getattr(model.config, "_name_or_path", "") or "")
        if not path:
            return cls("")
        files, read = Checkpoint(path, offline(path, revision)), {}
        for name in ("config.json", "generation_config.json"):
            with suppress(ValueError, OSError):  # not in the cache, or damaged since it was loaded
                read[name] = files.read_json(name) or {}
        config, spec = read.get("config.json", {}), None
        with suppress(ValueError):  # no family: only `spec=` says what it is
            spec = recognise(config, path)
        return cls(path, config, read.get("generation_config.json", {}), spec)

    @property
    def is_known(self) -> bool:
        return bool(self.config)

    @property
    def stop_token_ids(self) -> list[int]:
        """Stop tokens that the files name."""
        found = []
        for source in (self.generation, self.config):
            ids = source.get("eos_token_id")
            found += ids if isinstance(ids, list) else [] if ids is None else [ids]
        return sorted({token for token in found if isinstance(token, int)})


def offline(path: str, revision: str | None) -> dict[str, Any]:
    """Arguments with which a checkpoint is found on the disk alone."""
    return {} if Path(path).is_dir() else {"local_files_only": True, "revision": revision}
