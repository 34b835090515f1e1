"""Design a loop of an antibody.

A masked LM over amino acids fills a hole of 20 residues, both sides given.
Protein language models fill any hole, and `apd` draws many variants of it in
one batch, several residues per forward pass, with the probability of each
residue.

The model is AntiBERTy (MIT licence; Ruffolo, Gray, Sulam 2021,
arXiv:2112.07782), a BERT of 26 million parameters from the Python package
`antiberty`, which needs no download beside it. Without --loop: residues 97 to
116 of the heavy chain below.

    pip install --no-deps antiberty==0.1.3
    python examples/antibody.py
    python examples/antibody.py --fasta chain.fasta --loop 97-116 \\
        --variants 32 --out variants.fasta --picture loop.png

What the numbers are worth: the likelihood says how usual a residue is among
the natural antibodies that the model has read, given the rest of the chain. It
knows nothing of the antigen, and does not say that a variant binds, folds or
can be made. Use it to propose variants that look natural, and to throw out
those that do not; the rest is for the laboratory.
"""

import argparse
import importlib.util
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from apd import APDSampler

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Variable domain of the heavy chain of trastuzumab, a published therapeutic antibody.
EXAMPLE = (
    "trastuzumab heavy chain, variable domain",
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
)


def convert(folder: Path) -> Path:
    """The model of the package `antiberty` as a checkpoint of transformers, converted once. Returns its folder.

    The package has its weights as a pickle. `torch.load(weights_only=True)` reads tensors only and runs no code; the
    library itself opens no pickle at all.
    """
    if (folder / "model.safetensors").exists():
        return folder
    found = importlib.util.find_spec("antiberty")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The package is missing: pip install --no-deps antiberty==0.1.3")
    package = Path(found.submodule_search_locations[0]) / "trained_models"
    source = package / "AntiBERTy_md_smooth"
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    # The heads for species, chain and grafting are no part of the language model, and the pooler serves them only.
    kept = {
        name: tensor.contiguous().clone()
        for name, tensor in weights.items()
        if name.startswith(("bert.embeddings.", "bert.encoder.", "cls.predictions.")) and "position_ids" not in name
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert", "tie_word_embeddings": False}
    del config["_name_or_path"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer_of((package / "vocab.txt").read_text().split()).save_pretrained(folder)
    save_file(kept, folder / "model.safetensors.part", {"format": "pt"})
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")
    return folder


def tokenizer_of(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per residue, without spaces."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def read_fasta(path: Path) -> tuple[str, str]:
    """Name and sequence of the first record."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines or not lines[0].startswith(">"):
        raise SystemExit(f"{path} is no FASTA file: its first line must start with '>'.")
    end = next((i for i, line in enumerate(lines[1:], 1) if line.startswith(">")), len(lines))
    sequence = "".join(lines[1:end]).upper()
    if unknown := sorted(set(sequence) - set(RESIDUES)):
        raise SystemExit(f"{path} has letters that are no residue: {', '.join(unknown)}.")
    return lines[0][1:], sequence


def residue_table(loops: Sequence[str], first: int, native: str) -> str:
    """For every position of the loop: the native residue and the most frequent ones of the variants."""
    lines = ["position  native  variants"]
    for i, residue in enumerate(native):
        counts = Counter(loop[i] for loop in loops).most_common(4)
        shares = "  ".join(f"{letter} {count / len(loops):4.0%}" for letter, count in counts)
        lines.append(f"{first + i:8d}  {residue:>6}  {shares}")
    return "\n".join(lines)


def draw(path: Path, loops: Sequence[str], first: int, native: str) -> None:
    """A picture of how often each residue stands at each position; the native one is framed."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    shares = [
        [sum(loop[i] == letter for loop in loops) / len(loops) for i in range(len(native))] for letter in RESIDUES
    ]
    figure, axes = pyplot.subplots(figsize=(0.35 * len(native) + 2, 5))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, letter in enumerate(native):
        axes.add_patch(Rectangle((i - 0.5, RESIDUES.index(letter) - 0.5), 1, 1, fill=False, edgecolor="black"))
    axes.set_xticks(range(len(native)), [f"{letter}\n{first + i}" for i, letter in enumerate(native)], fontsize=8)
    axes.set_yticks(range(len(RESIDUES)), list(RESIDUES), fontsize=8)
    axes.set_xlabel("native residue and position")
    figure.colorbar(image, label="share of the variants")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, help="a chain; only its first record is read")
    parser.add_argument("--loop", default="97-116", help="first and last residue of the loop, counted from 1")
    parser.add_argument("--variants", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is the likeliest loop")
    parser.add_argument(
        "--strategy", default="checked:proposer=drafter,c=0.9", help="how residues are drawn, see the docs"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="FASTA file of the variants")
    parser.add_argument("--picture", type=Path, help="PNG file; needs matplotlib")
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache" / "apd" / "antiberty")
    arguments = parser.parse_args()

    name, chain = read_fasta(arguments.fasta) if arguments.fasta else EXAMPLE
    first, last = (int(edge) for edge in arguments.loop.split("-"))
    if not 1 <= first <= last <= len(chain):
        raise SystemExit(f"--loop must lie within 1-{len(chain)}, got {arguments.loop}.")
    native = chain[first - 1 : last]

    sampler = APDSampler.from_pretrained(str(convert(arguments.model)), mixture_weight=1.0)
    text = [chain[: first - 1], len(native), chain[last:]]
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0} if arguments.temperature else {}
    count = arguments.variants if arguments.temperature else 1
    started = time.perf_counter()
    found = sampler.infill(
        [text] * count,
        seed=[arguments.seed + i for i in range(count)],
        strategy=arguments.strategy,
        eos_token_id=None,
        **sampling,
    )
    seconds = time.perf_counter() - started

    variants = sorted(found, key=lambda variant: -variant.score)
    loops = [variant.holes[0].text for variant in variants]
    passes = sum(variant.drafter_forwards for variant in variants) / count
    same = [sum(a == b for a, b in zip(loop, native, strict=True)) / len(native) for loop in loops]
    print(
        f"{name}: residues {first}-{last} ({native}), {count} variants in {seconds:.1f} s, {len(native) / passes:.1f} residues per pass"
    )
    print(f"{len(set(loops))} different; {sum(same) / count:.0%} of their residues are the native ones\n")
    print(residue_table(loops, first, native))
    print("\nmean probability per residue, loop")
    for variant, loop in list(zip(variants, loops, strict=True))[:8]:
        print(f"{math.exp(variant.score):.3f}  {loop}")
    if arguments.out:
        records = [
            f">variant_{i} mean_log_probability={variant.score:.3f} loop={first}-{last}\n{variant.text}\n"
            for i, variant in enumerate(variants, 1)
        ]
        arguments.out.write_text("".join(records))
        print(f"\nwritten to {arguments.out}")
    if arguments.picture:
        draw(arguments.picture, loops, first, native)
        print(f"drawn to {arguments.picture}")


if __name__ == "__main__":
    main()
