"""Makes a verifier for a drafter that has none.
Runs on the included pair in seconds: python examples/make_verifier.py

The drafter answers prompts; a small causal LM of its vocabulary is distilled
from them. It may start from a model of another vocabulary: a token begins as
the mean of old ones that spell it. docs/verifiers.md has LLaDA's call.
"""

import argparse

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from apd import APDSampler, load_drafter, load_tokenizer
from apd.included import DRAFTER_DIR, tasks


def small(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))


def transplanted(path, tokenizer):
    """A trained causal LM, its embeddings exchanged for those of another vocabulary."""
    model, old = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), load_tokenizer(path)
    spelled = [old(tokenizer.decode([i]), add_special_tokens=False).input_ids or [0] for i in range(len(tokenizer))]
    layers = model.get_input_embeddings, model.get_output_embeddings
    tables = [torch.stack([layer().weight.data[ids].mean(0) for ids in spelled]) for layer in layers]
    model.resize_token_embeddings(len(tokenizer))
    for layer, table in zip(layers, tables, strict=True):
        layer().weight.data.copy_(table)
    return model


def make(drafter, tokenizer, prompts, start=None, epochs=40, rows=16, new_tokens=32):
    """A causal LM, trained on prompts with the drafter's own greedy answers."""
    alone, eos = APDSampler(drafter, tokenizer=tokenizer, strategy="left-to-right:1"), tokenizer.eos_token_id
    answers = alone.generate_many(prompts, batch_size=rows, max_new_tokens=new_tokens)
    texts = [tokenizer(prompt).input_ids + answer.tokens for prompt, answer in zip(prompts, answers, strict=True)]
    model = (small(tokenizer) if start is None else transplanted(start, tokenizer)).to(alone.drafter.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if start is None else 1e-4)
    for _ in range(epochs):
        for picked in torch.randperm(len(texts)).split(rows):
            batch = [torch.tensor(texts[i], device=model.device) for i in picked]
            ids, labels = (pad_sequence(batch, batch_first=True, padding_value=value) for value in (eos, -100))
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    drafter, tokenizer = load_drafter(DRAFTER_DIR), APDSampler.from_included().tokenizer
    train, test = (tasks.instances("insert_random", n, 0, split) for n, split in ((200, "train"), (40, "test")))
    made = make(drafter, tokenizer, [each.prompt for each in train])
    for name, verifier in {"untrained": small(tokenizer).eval(), "made": made}.items():
        pair = APDSampler(drafter, verifier, tokenizer)
        found = list(pair.generate_many([each.prompt for each in test], max_new_tokens=32))
        speed = sum(len(answer.tokens) for answer in found) / sum(answer.drafter_forwards for answer in found)
        right = sum(tasks.is_right(x, answer.text) for x, answer in zip(test, found, strict=True))
        print(f"{name}: {right} of {len(test)} right, {speed:.1f} tokens per drafter forward")
