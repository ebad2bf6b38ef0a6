"""Time and KV cache of a LLaVA against the number of image tokens that it keeps.

    python benchmarks/visual_tokens.py [--quick] [--rounds 3] [--threads 1]

The work: one image and 40 tokens of text into a `LlavaForConditionalGeneration` with random
weights, float32, batch 1: a CLIP tower of 6 layers with hidden 256 that sees 336 pixels as 576
patches, as that of LLaVA-1.5, and a Llama of 12 layers with hidden 768 and 12 heads (89 M
parameters). Weights do not change the time. Measured are the first token (tower, selection,
prefill) and 16 more, against the same model without pruning, in turns.

Then the selection alone, on 8 images of 576 tokens and dim 768: ours on all at once, and the walk
over tokens in Python with `.item()` that official codes are, one image at a time.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, machine, ratio, write
from rich.console import Console
from torch import Tensor

from attending.core.statistics import effective_rank
from attending.interventions.visual_token_pruning import cache_lengths, prune_visual_tokens
from attending.sparse.visual_tokens import METHODS, cosine_distance, select_tokens

PATCHES, TEXT, MORE = 576, 40, 16
PLAIN = "all 576"
KEPT = (288, 128, 64, 16)
OTHERS = ("divprune", "visionzip", "fastv", "sparsevlm")
IMAGE = 1


def make_llava(quick: bool) -> Any:
    """A LLaVA of middling size, newly drawn."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=4096,
        hidden_size=96 if quick else 768,
        intermediate_size=256 if quick else 2048,
        num_hidden_layers=4 if quick else 12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES
    )
    model = Llava(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


class Contender:
    """The model with so many image tokens, asked for so many new ones."""

    def __init__(self, model: Any, selector: str | None, keep: int, new: int) -> None:
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(2, 4096, (1, TEXT), generator=generator)
        ids = torch.cat([torch.full((1, PATCHES), IMAGE), text], 1)
        pixels = torch.randn(1, 3, 336, 336, generator=generator)
        self.inputs = {"input_ids": ids, "pixel_values": pixels}
        self.model, self.selector, self.keep, self.new = model, selector, keep, new
        self.cache: Any = None

    def __call__(self) -> None:
        """Generate once."""
        pruning: Any = nullcontext()
        if self.selector is not None:
            pruning = prune_visual_tokens(self.model, self.selector, self.keep, erank_avg=90.0)
        with pruning, torch.no_grad():
            out = self.model.generate(
                **self.inputs,
                max_new_tokens=self.new,
                do_sample=False,
                return_dict_in_generate=True,
            )
        self.cache = out["cache"]

    @property
    def megabytes(self) -> float:
        """Of the KV cache."""
        parts = (part for layer in self.cache.layers for part in (layer.keys, layer.values))
        return sum(part.numel() * part.element_size() for part in parts) / 2**20


def of_models(quick: bool, rounds: int) -> dict[str, Any]:
    """The first token and the others, by what is kept."""
    model = make_llava(quick)
    arms: dict[str, tuple[str | None, int]] = {PLAIN: (None, PATCHES)}
    arms |= {f"agile {keep}": ("agile", keep) for keep in ((64,) if quick else KEPT)}
    arms |= {f"{name} 64": (name, 64) for name in (("fastv",) if quick else OTHERS)}
    first = {name: Contender(model, *arm, 1) for name, arm in arms.items()}
    whole = {name: Contender(model, *arm, 1 + MORE) for name, arm in arms.items()}
    contenders: dict[str, Callable[[], object]] = dict(first)
    contenders |= {f"{name}, whole": one for name, one in whole.items()}
    seconds = interleaved(contenders, rounds)
    full = first[PLAIN].megabytes
    return {
        name: {
            "first token": ratio(seconds, name, PLAIN),
            f"first and {MORE} more": ratio(seconds, f"{name}, whole", f"{PLAIN}, whole"),
            "KV cache": first[name].megabytes / full,
            "KV cache, MB": first[name].megabytes,
            "tokens by layer": cache_lengths(first[name].cache),
            "first token, seconds": sorted(seconds[name])[rounds // 2],
        }
        for name in arms
    }


def walk_in_python(features: Tensor, attention: Tensor, keep: int) -> list[list[int]]:
    """The adaptive rule, one token at a time, as one would write it down."""
    chosen = []
    for image, scores in zip(features, attention, strict=True):
        distance = cosine_distance(image[None])[0]
        slope = 0.01 * effective_rank(image, center=True).item() / 90.0
        order = scores.argsort(descending=True)
        removed = torch.zeros(len(order), dtype=torch.bool)
        kept: list[int] = []
        for rank, token in enumerate(order):
            if removed[token].item():
                continue
            kept.append(int(token.item()))
            if len(kept) == keep:
                break
            removed |= distance[token] < min(0.25, slope * (rank + 1))
        kept += [int(one) for one in order if int(one) not in kept][: keep - len(kept)]
        chosen.append(sorted(kept))
    return chosen


def of_selection(rounds: int, images: int = 8, keep: int = 64) -> dict[str, Any]:
    """Milliseconds for an image, of each selector alone."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 768, generator=generator)
    group = torch.randint(40, (images, PATCHES), generator=generator)
    features = centres[group] + torch.randn(images, PATCHES, 768, generator=generator)
    attention = torch.randn(images, PATCHES, generator=generator).softmax(-1)
    naive = "agile, in Python"
    assert select_tokens(features, attention, keep).tolist() == walk_in_python(
        features, attention, keep
    )
    contenders: dict[str, Callable[[], object]] = {
        method: (lambda method=method: select_tokens(features, attention, keep, method))
        for method in METHODS
    }
    contenders |= {
        naive: lambda: walk_in_python(features, attention, keep),
        "effective rank alone": lambda: effective_rank(features, center=True),
    }
    seconds = interleaved(contenders, rounds)
    found: dict[str, Any] = {
        name: 1000 * sorted(times)[rounds // 2] / images for name, times in seconds.items()
    }
    return found | {"in Python / ours": ratio(seconds, naive, "agile")}


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model: does it run?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/visual_tokens.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    rounds = 1 if arguments.quick else arguments.rounds
    models = of_models(arguments.quick, rounds)
    console.print(models)
    selection = of_selection(rounds)
    console.print("milliseconds an image:", selection)
    if arguments.quick and arguments.out is None:  # figures of a small model are not kept
        return
    figures = {"against all tokens": models, "selection, ms an image": selection}
    console.print(f"wrote {write('visual_tokens', figures, arguments.out)}")


if __name__ == "__main__":
    main()
