"""What the command line reads of a checkpoint before its tokenizer and its weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from apd.cli.report import say

#: New tokens of an answer where neither the options nor the drafter's generation_config.json name a number.
NEW_TOKENS = 256


def check_places(arguments: argparse.Namespace) -> None:
    """Refuse a `--drafter` and a `--verifier` that are no folder and can be no hub name, or whose folder holds no checkpoint.

    Raises:
        FileNotFoundError: the message names the option, and a checkpoint one level down.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for role in ("drafter", "verifier"):
        given = getattr(arguments, role)
        if given is None:
            continue
        place = Path(given)
        if place.is_dir():
            inner = {path.name: path for path in sorted(place.iterdir()) if (path / "config.json").is_file()}
            if inner and not (place / "config.json").is_file():
                meant = inner.get(role) or next(iter(inner.values()))
                raise FileNotFoundError(
                    f"--{role} must be a checkpoint's folder, got {given}, which has no config.json. Did you mean {meant}?"
                )
            continue
        if place.exists():
            raise FileNotFoundError(f"--{role} must be a checkpoint's folder, got the file {given}. Name its folder.")
        try:
            validate_repo_id(given)
        except HFValidationError:
            raise FileNotFoundError(f"--{role} must be a folder or a hub name, got {given}: no such folder.") from None


def settle_new_tokens(arguments: argparse.Namespace, *, is_told: bool = True) -> None:
    """Set an open `--max-new-tokens` to what the drafter's generation_config.json names, else to `NEW_TOKENS`.

    Args:
        is_told: say so if the option asks for more than the file names.
    """
    from apd.included import DRAFTER_DIR
    from apd.kinds import GENERATION
    from apd.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(arguments.drafter or DRAFTER_DIR, {"revision": getattr(arguments, "revision", None)})
    stored = (checkpoint.read_json("generation_config.json", GENERATION) or {}).get("max_new_tokens")
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = stored or NEW_TOKENS
    elif is_told and (told := too_many(arguments.max_new_tokens, stored)):
        say(f"apd: warning: --max-new-tokens {told}")


def too_many(asked: int, stored: int | None) -> str | None:
    """What to say of more new tokens than a drafter's generation config names; `None` if there are not more."""
    if stored is None or asked <= stored:
        return None
    return (
        f"{asked} is more than the {stored} of the drafter's generation_config.json: a drafter that never saw so many masks "
        "may answer with nothing."
    )
