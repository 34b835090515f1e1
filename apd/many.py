"""The path of `apd.generation.many` in release 0.1.0, kept for scripts that import it."""

from apd.generation.many import Generated, Prompt, check_prompts, encode

__all__ = ["Generated", "Prompt", "check_prompts", "encode"]
