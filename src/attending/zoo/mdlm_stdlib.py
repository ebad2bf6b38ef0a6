"""``mdlm-stdlib``: a small masked diffusion language model trained here on Python, and shipped.

It reads all of a text in which some tokens are :data:`MASK` and says what each of them may be.
:func:`attending.diffusion.sample_masked_text` writes text with it, by unmasking step by step.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attending.zoo import llama_stdlib
from attending.zoo.entry import ZooEntry, ZooModel, recipe_at
from attending.zoo.loading import load_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK = "<|mask|>"


def folder() -> Path:
    """The weights inside this package."""
    return Path(__file__).parent / "weights" / "mdlm-stdlib"


def load_tokenizer() -> "PreTrainedTokenizerBase":
    """The tokenizer of ``llama-stdlib`` and, as its last token, :data:`MASK`.

    The shipped file of that model is read, so there is no second copy to differ from it.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        llama_stdlib.folder(), local_files_only=True, trust_remote_code=False
    )
    tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def load(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    path: Path | None = None,
) -> ZooModel:
    """Load the shipped weights, or those of your own training.

    Args:
        device: Where the model goes; ``None`` leaves it on the CPU.
        dtype: Of the weights in memory; on disk they are float16.
        path: A folder written by the recipe's export, instead of the shipped one.
    """
    from transformers import EuroBertForMaskedLM

    path = folder() if path is None else path
    tokenizer = load_tokenizer()
    model, _ = load_folder(EuroBertForMaskedLM, path, device, dtype, tokenizer=tokenizer)
    card = json.loads((path / "card.json").read_text(encoding="utf-8"))
    return ZooModel(model, tokenizer, card, ENTRY.name)


NAME = "mdlm-stdlib"

ENTRY = ZooEntry(
    name=NAME,
    model_class="transformers.EuroBertForMaskedLM",
    description=(
        "a small masked diffusion language model of Python: 8 bidirectional layers, 6 query heads "
        "over 2 key heads"
    ),
    source=(
        "trained by attending.zoo.recipes.mdlm_stdlib on the Python standard library, from the "
        "weights of llama-stdlib"
    ),
    license="weights: Apache-2.0; training text: Python Software Foundation License Version 2",
    folder=folder,
    load=load,
    recipe=recipe_at("attending.zoo.recipes.mdlm_stdlib", "MdlmStdlibRecipe", NAME),
)
