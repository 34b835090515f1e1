"""What people type from other scripts (Dream, LLaDA, Fast-dLLM, dInfer, vLLM, older transformers), and what it becomes here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from apd.config import KNOBS, LETTERS, letter_hint
from apd.kinds import GENERATION

#: Arguments of a call, by what they become. `{value}` is the value that was given.
_CALL = {
    "Write max_new_tokens={value}": "gen_length gen_len max_gen_length max_gen_toks max_tokens max_completion_tokens",
    "Write strategy='blocks:{value}/confidence:1' to decode block by block; the blocks of a block-causal drafter are "
    "`block_size` of from_pretrained()": "block_length block_size",
    "Write strategy='confidence:1' for low_confidence, 'random:1' for random": "remasking remasking_strategy",
    "Write strategy='confidence:1' for maskgit_plus, 'margin:1' for topk_margin, 'entropy:1' for entropy, 'random:1' for "
    "origin; without `strategy` it is APD": "alg",
    "Leave it out: orders are not randomised here, except strategy='random:1'": "alg_temp algorithm_temp",
    "The number of steps follows from what is accepted. A fixed one is strategy='confidence:K', K tokens per step: new "
    "tokens divided by steps": "steps diffusion_steps num_steps num_inference_steps timesteps",
    "Write strategy='confidence:{value}'": "tokens_per_step num_transfer_tokens transfer_tokens",
    "Write strategy='threshold:{value}'; the τ of APD is `acceptance_threshold`": "threshold confidence_threshold",
    "Write strategy='factor:{value}'": "factor",
    "Leave it out: guidance would take a second pass of the drafter": "cfg_scale cfg unsupervised_cfg_scale",
    "Give it to APDSampler or from_pretrained() as `mask_token_id`": "mask_id mask_token mask_token_id",
    "Write kv_window=N: keys and values are frozen N committed tokens behind the frontier": "dual_cache prefix_cache cache_type",
    "Write return_dict_in_generate=True: `output.trace` holds what every step drafted and committed": (
        "output_history return_history"
    ),
    "Give a `logits_processor`; it acts on both models": "generation_logits_hook_func logits_hook logits_eos_inf",
    "Use `sampler.stream(...)`, which yields what each step makes final": "generation_tokens_hook_func tokens_hook stream",
    "Leave it out: there is no noise schedule": "eps noise_schedule",
    "Leave it out: rows end at their stop tokens; eos_token_id=None goes on behind them": "early_termination early_stop",
    "Write num_return_sequences={value}, with do_sample=True": "num_samples best_of n",
    "Write stop_strings={value}": "stop until stop_words",
    "Encode it first: `inputs = sampler.tokenizer(text, return_tensors='pt')`, then `generate(**inputs)`. "
    "`generate_many` takes text and chats": "prompt prompts text texts messages",
    "Name the verifier when the sampler is made": "verifier verifier_model",
    "Write device_map={value} where the models are loaded, or move them: `sampler.device` says where they are": "device",
}
#: Arguments of loading, likewise.
_LOADING = {
    "Leave it out: no code of a checkpoint is ever run, so none needs to be trusted": "trust_remote_code",
    "Write quantization_config=transformers.BitsAndBytesConfig({name}=True)": "load_in_8bit load_in_4bit",
    "Write dtype={value}": "torch_dtype",
    "Write device_map={value}": "device",
    "Leave it out: it is read from the drafter's directory. APDSampler(drafter, verifier, tokenizer) takes another one": (
        "tokenizer"
    ),
    "Leave it out: weights are read from safetensors only, and never twice": "use_safetensors low_cpu_mem_usage",
    "Write attn_implementation={value}": "attn use_flash_attention_2 attention_implementation",
    "It is the first argument, `drafter`": "model model_path pretrained pretrained_model_name_or_path",
    "It is the second argument, `verifier`": "verifier_model assistant_model draft_model",
    "Write mask_token_id={value}": "mask_id",
    "Write block_size={value}": "block_length",
    "Write spec={value}": "family model_type",
    "Give it to generate(), or as `generation_config` there": "max_new_tokens temperature do_sample",
}


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    return {name: becomes for becomes, names in table.items() for name in names.split()}


#: By name, what an argument of another script becomes in a call, and where models are loaded.
CALL, LOADING = _by_name(_CALL), _by_name(_LOADING)


def refuse_unknown(
    given: Iterable[str], known: Iterable[str], where: str, elsewhere: Mapping[str, str] = CALL
) -> None:
    """Refuse the first argument that is not `known`.

    Args:
        given: names, or values by name.
        known: the names that `where` takes.
        where: what was called, such as "generate()".
        elsewhere: what arguments of other scripts become, `CALL` or `LOADING`.

    Raises:
        TypeError: the message has what the argument becomes here, or the nearest known name.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            value = given[name] if isinstance(given, Mapping) else ...
            raise TypeError(f"{where} has no argument `{name}`. {_hint(name, value, known, elsewhere)}")


def refuse_idle_attribute(name: str, value: Any) -> None:
    """Refuse that a sampler is given an attribute by the name of an argument, which no call would read.

    Raises:
        AttributeError: a knob, also by its letter or misspelt, or a field of a generation configuration.
    """
    meant = LETTERS.get(name, name)
    if meant not in KNOBS and meant not in GENERATION:
        [meant] = difflib.get_close_matches(name, KNOBS, n=1, cutoff=0.85) or [""]
    if meant:
        passed = f"{meant}={value!r:.60} to generate()" + ", or make the sampler with it" * (meant in KNOBS)
        raise AttributeError(
            f"`{name}` is no attribute of a sampler, got {value!r:.60}: no call would read it. Pass {passed}."
        )


def _hint(name: str, value: Any, known: list[str], elsewhere: Mapping[str, str]) -> str:
    shown = "..." if value is ... else f"{value!r:.60}"
    if LETTERS.get(name) in known:
        return letter_hint(name, shown)
    if name in elsewhere:
        return elsewhere[name].replace("{value}", shown).replace("{name}", name) + "."
    # A short name is near to many others.
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if len(name) > 4 else 0.75)
    folded = {each.replace("_", ""): each for each in known}.get(name.replace("_", "").lower())
    if nearest or folded:
        return f"Did you mean `{folded or nearest[0]}`?"
    return f"Known: {', '.join(known)}."
